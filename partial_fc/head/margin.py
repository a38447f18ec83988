"""What a margin is: a small function of the target cosine, and of what else a paper looks at.

Every logit of the head is

    logit_ij = r_i n_j f(cos_ij) + bias_j

with r the scale s or the embedding's norm |x|, n either 1 or the center's norm |w|, and f the identity for
negatives. A margin says which of these hold and what f is for the target: `target(cosine)`, a function of a (B,)
vector that autograd differentiates. A new loss is a subclass with one method; partition, sampling, streaming and
checkpoints come with the head. One that needs more than the cosine writes `target_of(sample)` instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


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
    """What all margins share. `scale`: s, or None for r = |x|, that is, no feature normalization."""

    scale: float | None = 64.0

    normalize_centers: ClassVar[bool] = True  # n = 1; False: n = |w|
    has_bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(
                f"{type(self).__name__}: scale is {self.scale}; give a positive number, "
                "or None for the embedding's own norm (no feature normalization)"
            )

    def target(self, cosine: Tensor) -> Tensor:
        """f of the target: (B,) cosines in [-1, 1] to (B,), decreasing in the angle over [0, pi]."""
        return cosine

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

    def shift(self) -> float:
        """What is taken from the target's logit itself, whatever its factors."""
        return 0.0

    def regularizer(self, length: Tensor) -> Tensor | None:
        """A term of the loss (B,) that depends on |x| (B,) alone; None: there is none."""
        return None

    def cautions(self, num_classes: int, embedding_dim: int) -> list[str]:
        """What speaks against these parameters in a head of this size."""
        if self.scale is None or not self.normalize_centers or self.has_bias or num_classes < 2:
            return []
        others = num_classes - 1
        least = others / num_classes * math.log(others * 0.9 / 0.1)  # CosFace (arXiv 1801.09414), eq. 6, P = 0.9
        said = f"{type(self).__name__}: scale is {self.scale:g}; give at least {least:.2f}: with less the target's "
        return [said + f"probability stays below 0.9 with {num_classes} classes"] if self.scale < least else []

    def first_statistics(self) -> dict[str, float]:
        """Running statistics before the first step, by name. They are equal on all ranks and in the checkpoint."""
        return {}

    def observe(self, sample: Sample) -> dict[str, Tensor]:
        """The statistics () after a training batch; its targets already see them."""
        return {}


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


def check(margin: Margin, name: str, good: bool, wanted: str) -> None:
    """Raises ValueError for a parameter of a margin that is not `good`."""
    if not good:
        raise ValueError(f"{type(margin).__name__}: {name} is {getattr(margin, name)}; give {wanted}")
