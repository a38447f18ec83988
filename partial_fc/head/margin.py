"""What a margin is: a small function of the target cosine, and of what else a paper looks at.

Every logit of the head is

    logit_ij = r_i n_j f(cos_ij) + bias_j

with r the scale s or the embedding's norm |x|, n either 1 or the center's norm |w|, and f the identity for
negatives. A margin says which of these hold and what f is for the target: `target(cosine)`, a function of a (B,)
vector that autograd differentiates. A new loss is a subclass with one method; partition, sampling, streaming and
checkpoints come with the head. One that needs more than the cosine writes `target_of(sample)` instead, and one that
changes the negatives too `negatives(cosine, psi, statistics)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor

FEASIBLE = 0.01  # a target's largest probability below which its loss cannot be met


class Sample(NamedTuple):
    """What a margin may look at: (B,) vectors in float64 over the global batch, equal on all ranks."""

    cosine: Tensor  # with the own class center
    length: Tensor  # |x|
    real: Tensor  # bool; the others are padding
    step: int  # number of the training step, from 0
    statistics: dict[str, Tensor]  # running ones (), as `observe` left them
    normal: Callable[[], Tensor]  # standard normal numbers (B,), functions of (seed, step, place in the batch)


@dataclass(frozen=True, kw_only=True)
class Margin:
    """What all margins share.

    scale: s, or None for r = |x|, that is, no feature normalization. learn_scale: s is where a scale begins that the
    head learns with the class centers' optimizer, without weight decay (AM-Softmax, arXiv 1801.05599; NormFace, arXiv
    1704.06369), and never below 1, where it would no longer tell classes apart. interclass_filtering_threshold:
    negatives whose cosine is larger are left out for that sample, since they may be the same identity under another
    label (InsightFace's code, where this is from, sets their logit to 0 instead).
    """

    scale: float | None = 64.0
    learn_scale: bool = False
    interclass_filtering_threshold: float | None = None

    normalize_centers: ClassVar[bool] = True  # n = 1; False: n = |w|
    has_bias: ClassVar[bool] = False
    reweights: ClassVar[bool] = False  # f of negatives is `negatives`; one collective more a forward
    looks_at_length: ClassVar[bool] = False  # has a `caution_of_lengths`
    largest_negative: ClassVar[float] = 1.0  # that f can be
    sub_centers: ClassVar[int] = 1  # centers of a class; the nearest of them counts

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(
                f"{type(self).__name__}: scale is {self.scale}; give a positive number, "
                "or None for the embedding's own norm (no feature normalization)"
            )
        cosines = self.scale is not None and self.normalize_centers and not self.has_bias
        threshold = self.interclass_filtering_threshold
        wanted = "one in (0, 1), or None" if cosines else "None: its logits are not s cos(theta)"
        check(self, "interclass_filtering_threshold", threshold is None or (cosines and 0 < threshold < 1), wanted)
        if self.reweights and not cosines:
            raise ValueError(
                f"{type(self).__name__} changes the cosines of negatives (reweights): that takes a scale, "
                f"normalize_centers and no bias; got scale {self.scale}, {self.normalize_centers}, {self.has_bias}"
            )
        wanted = "False: it has no scale" if self.scale is None else "False: its negatives are not s cos(theta)"
        check(self, "learn_scale", not self.learn_scale or not (self.scale is None or self.reweights), wanted)
        check(self, "scale", not self.learn_scale or (self.scale or 0) >= 1, "1 or more: a learned scale stays there")

    def at(self, step: int) -> "Margin":
        """The margin of a training step: itself, see WarmUp."""
        return self

    def target(self, cosine: Tensor) -> Tensor:
        """f of the target: (B,) cosines in [-1, 1] to (B,), decreasing in the angle over [0, pi]."""
        return cosine

    @property
    def changes_negatives(self) -> bool:
        """Whether negatives are something else than r n cos."""
        return self.reweights or self.interclass_filtering_threshold is not None or self.sub_centers > 1

    def target_of(self, sample: Sample) -> Tensor:
        """f of the target (B,), for a margin that looks at more than the cosine."""
        return self.target(sample.cosine)

    def derivatives(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Derivatives of `target_of` by the cosine and by |x|, (B,) each, by autograd."""
        with torch.enable_grad():
            cosine, length = (vector.detach().requires_grad_() for vector in (sample.cosine, sample.length))
            psi = self.target_of(sample._replace(cosine=cosine, length=length)).sum()
            by_cosine, by_length = torch.autograd.grad(psi, (cosine, length), allow_unused=True, materialize_grads=True)
        return by_cosine, by_length

    def negatives(self, cosine: Tensor, psi: Tensor, statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """f of negatives and its derivative (None: 1), elementwise; used where `reweights`.

        cosine (B, c), -inf where there is none; psi, f of the samples' targets, and statistics broadcast with it.
        """
        return cosine, None

    def shift(self) -> float:
        """What is taken from the target's logit itself, whatever its factors."""
        return 0.0

    def regularizer(self, length: Tensor) -> Tensor | None:
        """A term of the loss (B,) that depends on |x| (B,) alone; None: there is none."""
        return None

    def least_target(self) -> float:
        """f of the target at cosine 1, with the largest margin that the loss gives; of a drawn margin with its mean."""
        return self.target(torch.ones(1, dtype=torch.float64)).item()

    def largest_probability(self, num_classes: int) -> float | None:
        """Of the target, for a sample at its class center and centers as far from each other as can be.

            1 / (1 + (C - 1) exp(s (-1 / (C - 1) - psi(1))))

        with psi(1) = `least_target` and s the scale that training starts with. None where there is no such bound: the
        logits are not s cos(theta), or negatives are reweighted, or there is one class.
        """
        if self.scale is None or not self.normalize_centers or self.has_bias or self.reweights or num_classes < 2:
            return None
        others = num_classes - 1
        return 1 / (1 + math.exp(min(math.log(others) + self.scale * (-1 / others - self.least_target()), 700.0)))

    def cautions(self, num_classes: int, embedding_dim: int) -> list[str]:
        """What speaks against these parameters in a head of this size."""
        most = self.largest_probability(num_classes)
        if most is None or most >= FEASIBLE or self.scale is None:
            return []
        others, target = num_classes - 1, self.least_target()
        room = target + 1 / others
        advice = ["lower the margin"] if target < 1 else []
        if room > 0:
            advice.append(f"give a scale of {math.log(others * FEASIBLE / (1 - FEASIBLE)) / room:.3g} or more")
        return [
            f"{type(self).__name__} cannot be met: with {num_classes} classes and scale {self.scale:g} the target's "
            f"probability is at most {most:.3g}, where the largest margin makes {target:.3g} of cosine 1; "
            f"{', or '.join(advice)}"
        ]

    def caution_of_lengths(self, length: Tensor) -> str | None:
        """What speaks against these parameters for a batch's |x| (n,); asked where `looks_at_length`."""
        return None

    def first_statistics(self) -> dict[str, float]:
        """Running statistics before the first step, by name. They are equal on all ranks and in the checkpoint."""
        return {}

    def observe(self, sample: Sample) -> dict[str, Tensor]:
        """The statistics () after a training batch; its targets already see them."""
        return {}


@dataclass(frozen=True)
class WarmUp:
    """A margin whose parameters go linearly, over `steps` training steps, from those in `start` to its own.

        WarmUp(CosFace(scale=64, margin=0.4), steps=10_000, start={"margin": 0.0})

    Step 0 has the start, step `steps` and all later ones the margin itself. `start` names real parameters that both
    margins have: margin, scale, m2, ... Raises ValueError for others, and where a margin of the start is invalid.
    """

    margin: Margin
    steps: int
    start: dict[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.margin, Margin):
            raise ValueError(
                f"WarmUp: margin is {self.margin!r}; give an object such as CosFace(scale=64, margin=0.35)"
            )
        name = type(self.margin).__name__
        if not isinstance(self.steps, int) or self.steps < 1 or not self.start:
            raise ValueError(
                f"WarmUp: steps and start are {self.steps} and {self.start}; give a positive whole number, and a "
                "parameter with its first value"
            )
        kinds = get_type_hints(type(self.margin))  # f.type may be text
        numbers = [f.name for f in fields(self.margin) if kinds[f.name] in (float, float | None)]
        known = {number: getattr(self.margin, number) for number in numbers}
        for parameter, value in self.start.items():
            if not isinstance(known.get(parameter), float | int):
                can = ", ".join(p for p, own in known.items() if own is not None)
                raise ValueError(f"WarmUp: {name} has no number {parameter} to warm up; it has {can or 'none'}")
            if isinstance(value, bool) or not isinstance(value, float | int):
                raise ValueError(f"WarmUp: {parameter} starts at {value!r}; wanted a number")
        if self.margin.learn_scale and "scale" in self.start:
            raise ValueError(f"WarmUp: {name} learns its scale from {self.margin.scale:g} on; leave scale out of start")
        self.at(0)

    def at(self, step: int) -> Margin:
        if step >= self.steps:
            return self.margin
        part = step / self.steps
        return replace(
            self.margin,
            **{p: first + part * (getattr(self.margin, p) - first) for p, first in self.start.items()},
        )


def sine(cosine: Tensor) -> Tensor:
    """sin(theta) of (B,) cosines."""
    # The floor keeps derivatives finite at theta = 0 and pi. There the direction that they multiply, w_hat - cos x_hat,
    # has length sin(theta), so the gradient itself stays bounded.
    return (1 - cosine * cosine).clamp_min(torch.finfo(cosine.dtype).tiny).sqrt()


def continued(cosine: Tensor, angle: float | Tensor) -> Tensor:
    """cos(theta + angle), continued past theta + angle = pi; angle in [0, pi], () or (B,).

    There the cosine would turn back up and reward the worst samples; it is continued as (-1)^k cos(phi) - 2k with phi =
    theta + angle and k = floor(phi / pi) (SphereFace's construction, arXiv 1704.08063, eq. 7), which decreases over all
    of [0, pi] with a continuous derivative.
    """
    angle = angle if isinstance(angle, Tensor) else cosine.new_full((), angle)  # no copy, no wait
    shifted = cosine * torch.cos(angle) - sine(cosine) * torch.sin(angle)
    past_pi = cosine < -torch.cos(angle)  # theta > pi - angle
    return torch.where(past_pi, -2 - shifted, shifted)


def multiplied(cosine: Tensor, factor: float, angle: float = 0.0) -> Tensor:
    """cos(factor theta + angle), continued likewise: any positive factor, any number of turns."""
    phi = factor * torch.atan2(sine(cosine), cosine) + angle
    k = torch.floor(phi.detach() / math.pi)
    return (1 - 2 * (k % 2)) * torch.cos(phi) - 2 * k


def check(margin: object, name: str, good: bool, wanted: str) -> None:
    """Raises ValueError for a parameter of a margin or a loss that is not `good`."""
    if not good:
        raise ValueError(f"{type(margin).__name__}: {name} is {getattr(margin, name)}; give {wanted}")


def least_scale(num_classes: int) -> float:
    """From which the target's probability can be 0.9, without a margin: CosFace (arXiv 1801.09414), eq. 6. C >= 2."""
    others = num_classes - 1
    return others / num_classes * math.log(others * 0.9 / 0.1)
