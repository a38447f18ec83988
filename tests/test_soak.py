"""What takes minutes: `make soak`."""

import os
import random
import signal
import time

import pytest

from partial_fc import checkpoint
from tests.test_train import checksums, curve, finish, start, workers

pytestmark = pytest.mark.slow

KILLS = 15


@pytest.mark.soak("compiled")
@pytest.mark.timeout(900)
def test_a_compiled_backbone_resumes_bit_for_bit(glyphs_ci, tmp_path):
    """And follows the plain one; a compiled graph is made anew in every process."""
    options = ("optim.schedule=constant", "checkpoint.every=10", "evaluate.sets={}")
    finish(start(2, tmp_path / "plain", *options, "run.steps=20"))
    finish(start(2, tmp_path / "whole", *options, "run.steps=20", "engine.compile=true"))
    for steps in (10, 20):
        finish(start(2, tmp_path / "run", *options, f"run.steps={steps}", "engine.compile=true"))
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")
    assert curve(tmp_path / "whole") == pytest.approx(curve(tmp_path / "plain"), rel=1e-4)


@pytest.mark.soak("train")
@pytest.mark.timeout(1800)
def test_a_run_killed_at_random_moments_is_the_same_run(glyphs_ci, tmp_path):
    """Three ranks, 150 steps, kill -9 of a random worker at a random moment, start-up and saving included."""
    options = ("run.steps=150", "checkpoint.every=15", "data.workers=1", "evaluate.sets={}")
    finish(start(3, tmp_path / "whole", *options))
    moments = random.Random(0)
    survived = []
    for _ in range(KILLS):
        process = start(3, tmp_path / "killed", *options)
        time.sleep(moments.uniform(3, 14))
        if process.poll() is None and workers(process.pid):
            os.kill(moments.choice(workers(process.pid)), signal.SIGKILL)
        finish(process, code=None)
        found = checkpoint.find_latest(tmp_path / "killed")
        survived.append(0 if found is None else found.step)
    print("latest checkpoint after each kill:", survived)
    assert survived == sorted(survived)
    finish(start(3, tmp_path / "killed", *options))
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
