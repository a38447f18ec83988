"""Checks a config as training would and writes its run folder to descriptor 3, for the scripts here:

    run=$(python launch/run_folder.py CONFIG.yaml [section.key=value ...] 3>&1 >&2)

A loss of one's own is imported, and may print what it likes. Exit code 64: the config is not valid.
"""

import os
import sys

from partial_fc.build import build_losses
from partial_fc.config_file import load_config

try:
    config = load_config(sys.argv[1], sys.argv[2:])
    build_losses(config)
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(64)
os.write(3, f"{config.run.dir}\n".encode())
