"""Optimizers of class centers: one update of a chunk of rows, given their gradient. Elementwise, in place.

`moments` are the tensors that an optimizer keeps beside the weight, of the weight's shape. Both equal torch's optimizer
of the same name on the rows in use. What happens to the rows that sat out differs: SGD's are caught up when they are
next used (see MissedUpdates), AdamW's stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Rate = float | Tensor  # a number, or a tensor ()


@dataclass(frozen=True)
class Learned:
    """A tensor that an optimizer changes, with what the optimizer keeps beside it."""

    value: Tensor
    moments: tuple[Tensor, ...]

    def __getitem__(self, rows):
        return Learned(self.value[rows], tuple(moment[rows] for moment in self.moments))

    def put(self, ids: Tensor, rows: "Learned") -> None:
        for tensor, values in zip((self.value, *self.moments), (rows.value, *rows.moments), strict=True):
            tensor.index_copy_(0, ids, values)


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD: v = mu v + g + wd w; w = w - lr v."""

    momentum: float = 0.9
    weight_decay: float = 5e-4

    moments: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise ValueError(
                f"momentum and weight_decay are {self.momentum} and {self.weight_decay}; give [0, 1) and 0 or more"
            )

    @property
    def coupled_decay(self) -> float:
        """What of the weight itself joins the gradient."""
        return self.weight_decay

    def rates(self, lr: float, number: int) -> tuple[float, ...]:
        """What of update `number` (from 1) is the same for all rows."""
        return (lr,)

    def update(self, rows: Learned, gradient: Tensor, lr: Rate) -> None:
        """In place; `gradient` has coupled_decay times the value in it already."""
        (velocity,) = rows.moments
        torch.add(gradient, velocity, alpha=self.momentum, out=velocity)
        _subtract(rows.value, velocity, lr)


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW (arXiv 1711.05101, alg. 2), with bias corrections by the number of updates of the head."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 5e-4

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    coupled_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not (all(0 <= beta < 1 for beta in self.betas) and self.eps > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"betas, eps and weight_decay are {self.betas}, {self.eps} and {self.weight_decay}; give two numbers "
                "in [0, 1), a positive one, and 0 or more"
            )

    def rates(self, lr: float, number: int) -> tuple[float, ...]:
        first, second = self.betas
        return (1 - lr * self.weight_decay, lr / (1 - first**number), (1 - second**number) ** -0.5)

    def update(self, rows: Learned, gradient: Tensor, keep: Rate, rate: Rate, root: Rate) -> None:
        mean, square = rows.moments
        first, second = self.betas
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        rows.value.mul_(keep)
        _subtract(rows.value, mean / (square.sqrt() * root + self.eps), rate)


Optimizer = SGD | AdamW


def _subtract(value: Tensor, direction: Tensor, rate: Rate) -> None:
    """value -= rate * direction, in one pass; torch.compile would compile anew for every number, not for tensors ()."""
    if isinstance(rate, Tensor):
        value.sub_(direction * rate)
    else:
        value.sub_(direction, alpha=rate)


def build_optimizer(
    name: str, momentum: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> Optimizer:
    if name == "sgd":
        return SGD(momentum, weight_decay)
    if name == "adamw":
        return AdamW(betas, eps, weight_decay)
    raise ValueError(f"optimizer is {name!r}; give 'sgd' or 'adamw'")
