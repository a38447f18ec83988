"""The learning rate as a pure function of the step."""

import pytest
import torch

from partial_fc.config import Optim
from partial_fc.optim import learning_rate


def test_warm_up_then_polynomial():
    optim = Optim(warmup_steps=10, power=2.0)
    rates = [learning_rate(step, 110, 0.4, optim) for step in range(110)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10] == 0.4 and rates[60] == pytest.approx(0.4 * 0.5**2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] > 0


def test_constant_and_no_warm_up():
    assert [learning_rate(step, 5, 0.1, Optim(schedule="constant")) for step in range(5)] == [0.1] * 5
    assert learning_rate(0, 5, 0.1, Optim()) == 0.1


def test_step_schedule_is_torchs():
    """MultiStepLR, which is Caffe's "multistep": milestone 7 is the first step, from 0, with the lower rate."""
    optim = Optim(schedule="step", milestones=(7, 10, 14), factor=0.3)
    parameter = torch.nn.Parameter(torch.zeros(()))
    sgd = torch.optim.SGD([parameter], lr=0.4)
    theirs = torch.optim.lr_scheduler.MultiStepLR(sgd, [7, 10, 14], gamma=0.3)
    for step in range(20):
        assert learning_rate(step, 20, 0.4, optim) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        sgd.step()
        theirs.step()
    warm = Optim(schedule="step", milestones=(7,), warmup_steps=4)
    assert [learning_rate(step, 9, 0.4, warm) for step in range(9)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.04, 0.04]
    )


def test_a_run_shorter_than_its_warm_up_or_longer_than_planned():
    assert learning_rate(3, 4, 0.1, Optim(warmup_steps=10)) == pytest.approx(0.04)
    assert learning_rate(10, 10, 0.1, Optim(warmup_steps=10)) == 0.1
    assert learning_rate(20, 10, 0.1, Optim()) == 0.0
