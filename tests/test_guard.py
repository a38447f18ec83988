"""A test without a mark starts no process and compiles nothing: what holds `make check` to it."""

import os
import subprocess

import pytest
import torch

from tests.conftest import run_ranks


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"]),
        lambda: os.system("true"),
        lambda: os.fork(),
        lambda: run_ranks(len, 2),
        lambda: torch.compile(len),
    ],
    ids=["subprocess", "os.system", "os.fork", "run_ranks", "torch.compile"],
)
def test_a_test_without_a_mark_may_not(start):
    with pytest.raises(pytest.fail.Exception, match="in a test that is not marked slow"):
        start()


def test_git_may_be_asked():
    assert subprocess.run(["git", "--version"], capture_output=True, text=True).returncode == 0
