"""Backbone optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from partial_fc.config import Optim


def learning_rate(step: int, total_steps: int, peak: float, optim: Optim) -> float:
    """The rate of step number `step` (from 0) of `total_steps`.

    Linear warm-up to `peak`, reached in step warmup_steps - 1, then peak (1 - progress)^power, or half a cosine from
    peak to 0 (arXiv 1608.03983 without restarts), or constant, or peak times `factor` for every milestone that the step
    has reached.
    """
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "step":
        return peak * optim.factor ** sum(step >= milestone for milestone in optim.milestones)
    progress = min((step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1), 1.0)
    if optim.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) ** optim.power


def peak_rate(optim: Optim, global_batch_size: int) -> tuple[float, str]:
    """The peak of the learning rate, and why it is that: optim.lr, scaled linearly where it names its batch."""
    if optim.lr_batch is None:
        return optim.lr, f"{optim.lr:g}, optim.lr as it is: no optim.lr_batch says what batch it is stated for"
    peak = optim.lr * global_batch_size / optim.lr_batch
    reason = f"optim.lr {optim.lr:g}, stated for batches of {optim.lr_batch}, x {global_batch_size} / {optim.lr_batch}"
    return peak, f"{peak:g} = {reason}"


def build_optimizer(backbone: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """SGD or AdamW over all trainable parameters; the learning rate is given to every step.

    Both decay biases and norms like everything else: so do InsightFace's recipes, with SGD and with AdamW
    (arcface_torch/train_v2.py). A frozen backbone has none.
    """
    trainable = [{"params": [p for p in backbone.parameters() if p.requires_grad]}]  # torch refuses an empty list
    if optim.name == "adamw":
        return torch.optim.AdamW(trainable, lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    return torch.optim.SGD(trainable, lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay)
