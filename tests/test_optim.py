"""The learning rate as a pure function of the step."""

import pytest

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


def test_a_run_shorter_than_its_warm_up_or_longer_than_planned():
    assert learning_rate(3, 4, 0.1, Optim(warmup_steps=10)) == pytest.approx(0.04)
    assert learning_rate(10, 10, 0.1, Optim(warmup_steps=10)) == 0.1
    assert learning_rate(20, 10, 0.1, Optim()) == 0.0
