"""Backbone optimizer, and the learning rate as a pure function of the step."""

import torch
from torch import nn

from partial_fc.config import Optim


def learning_rate(step: int, total_steps: int, peak: float, optim: Optim) -> float:
    """The rate of step number `step` (from 0) of `total_steps`.

    Linear warm-up to `peak`, reached in step warmup_steps - 1, then peak (1 - progress)^power, or constant, or peak
    times `factor` for every milestone that the step has reached.
    """
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "step":
        return peak * optim.factor ** sum(step >= milestone for milestone in optim.milestones)
    progress = (step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
    return peak * (1 - min(progress, 1.0)) ** optim.power


def build_optimizer(backbone: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """SGD over all trainable parameters; the learning rate is given to every step."""
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay)
