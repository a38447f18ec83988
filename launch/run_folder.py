"""Checks a config as training would and prints its run folder, for the scripts here:

    run=$(python launch/run_folder.py CONFIG.yaml [section.key=value ...])

A loss of one's own is imported, and may print what it likes: that goes to stderr.
Exit code 64: the config is not valid.
"""

import os
import sys

from partial_fc.build import build_losses
from partial_fc.config_file import load_config

answer = os.dup(1)
os.dup2(2, 1)  # for child processes, too
try:
    config = load_config(sys.argv[1], sys.argv[2:])
    build_losses(config)
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(64)
os.write(answer, f"{config.run.dir}\n".encode())
