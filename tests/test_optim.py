"""The learning rate as a pure function of the step."""

import pytest
import torch

from partial_fc.config import Optim
from partial_fc.optim import build_optimizer, learning_rate, peak_rate


def test_warm_up_then_polynomial():
    optim = Optim(warmup_steps=10, power=2.0)
    rates = [learning_rate(step, 110, 0.4, optim) for step in range(110)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10] == 0.4 and rates[60] == pytest.approx(0.4 * 0.5**2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] > 0


def test_constant_and_no_warm_up():
    assert [learning_rate(step, 5, 0.1, Optim(schedule="constant")) for step in range(5)] == [0.1] * 5
    assert learning_rate(0, 5, 0.1, Optim()) == 0.1


def test_cosine_schedule_is_torchs():
    """CosineAnnealingLR, after a warm-up that is ours."""
    optim = Optim(schedule="cosine", warmup_steps=5)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 20)
    assert learning_rate(3, 25, 0.4, optim) == pytest.approx(0.32)
    for step in range(5, 25):
        assert learning_rate(step, 25, 0.4, optim) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        sgd.step()
        theirs.step()
    assert learning_rate(30, 25, 0.4, optim) == 0


def test_the_rate_is_scaled_from_the_batch_that_it_is_stated_for():
    peak, reason = peak_rate(Optim(lr=0.1, lr_batch=512), 128)
    assert peak == pytest.approx(0.025) and reason == "0.025 = optim.lr 0.1, stated for batches of 512, x 128 / 512"
    assert peak_rate(Optim(lr=0.1), 128)[0] == 0.1 and "no optim.lr_batch" in peak_rate(Optim(lr=0.1), 128)[1]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_parameters_are_decayed_alike(name):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    net[1].weight.requires_grad = False
    optim = Optim(name=name, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6, momentum=0.7)
    optimizer = build_optimizer(net, optim)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name])
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 3  # without the frozen one
    wanted = dict(momentum=0.7) if name == "sgd" else dict(betas=(0.8, 0.9), eps=1e-6)
    assert {key: group[key] for key in wanted} == wanted


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
