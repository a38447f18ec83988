"""Margins: small pure functions of the target cosine.

Every logit of the head is

    logit_ij = r_i n_j f(cos_ij) + bias_j

with r the scale s or the embedding's norm |x|, n either 1 or the center's norm |w|, and f the identity for
negatives. A margin says which of these hold and what f is for the target: `target(cosine)`, a function of a (B,)
vector that autograd differentiates. A new loss is a subclass with one method; partition, sampling, streaming and
checkpoints come with the head.
"""

import difflib
import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor


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

    def derivative(self, cosine: Tensor) -> Tensor:
        """d target / d cosine, (B,) to (B,), by autograd."""
        with torch.enable_grad():
            cosine = cosine.detach().requires_grad_()
            (derivative,) = torch.autograd.grad(self.target(cosine).sum(), cosine)
        return derivative


@dataclass(frozen=True, kw_only=True)
class Softmax(Margin):
    """Plain softmax: x.w + bias, nothing normalized (torch.nn.Linear and cross entropy)."""

    scale: None = field(default=None, init=False)

    normalize_centers: ClassVar[bool] = False
    has_bias: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NormSoftmax(Margin):
    """Normalized softmax: s cos(theta). NormFace (Wang et al. 2017, arXiv 1704.06369), eq. 6."""


@dataclass(frozen=True, kw_only=True)
class CosFace(Margin):
    """Additive cosine margin: s (cos(theta) - m3).

    CosFace (arXiv 1801.09414), eq. 4; AM-Softmax (arXiv 1801.05599), eqs. 5-7. With `scale=None` it is AM-Softmax
    without feature normalization: |x| (cos(theta) - m3).
    """

    margin: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.margin < 2:
            raise ValueError(f"CosFace: margin is {self.margin}; give one in [0, 2), the paper's is 0.35")

    def target(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


@dataclass(frozen=True, kw_only=True)
class ArcFace(Margin):
    """Additive angular margin: s cos(theta + m2), continued past pi. ArcFace (arXiv 1801.07698), eq. 3.

    Past theta + m2 = pi the cosine would turn back up and reward the worst samples; it is continued as (-1)^k
    cos(phi) - 2k with phi = theta + m2 and k = floor(phi / pi) (the construction of SphereFace, arXiv 1704.08063,
    eq. 7), which decreases over all of [0, pi] with a continuous derivative. The gradient is the true one: d psi /
    d cos = sin(theta + m2) / sin(theta), 1.15 at cos 0.5 and m2 0.5, where a straight-through margin has 1.
    """

    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.margin < math.pi:
            raise ValueError(f"ArcFace: margin is {self.margin} rad; give one in [0, pi), the paper's is 0.5")

    def target(self, cosine: Tensor) -> Tensor:
        # The floor keeps the derivative finite at theta = 0 and pi. There the direction that it multiplies,
        # w_hat - cos x_hat, has length sin(theta), so the gradient itself stays bounded by s.
        sine = (1 - cosine * cosine).clamp_min(torch.finfo(cosine.dtype).tiny).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        past_pi = cosine < -math.cos(self.margin)  # theta > pi - m2
        return torch.where(past_pi, -2 - shifted, shifted)


BY_NAME: dict[str, type[Margin]] = {
    "softmax": Softmax,
    "normsoftmax": NormSoftmax,
    "cosface": CosFace,
    "arcface": ArcFace,
}


def build_margin(name: str, parameters: dict) -> Margin:
    """The margin of a config: head.margin.name and its parameters. Raises ValueError naming what there is."""
    if name not in BY_NAME:
        nearest = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(BY_NAME)}"
        raise ValueError(f"head.margin.name: no margin is called {name!r}; {hint}")
    margin = BY_NAME[name]
    known = [f.name for f in fields(margin) if f.init]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"head.margin.{parameter}: {name} has no such parameter; it has {', '.join(known) or 'none'}"
            )
    return margin(**{parameter: _number(parameter, value) for parameter, value in parameters.items()})


def _number(parameter: str, value: object) -> float | None:
    if parameter == "scale" and value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)  # YAML reads 3e-1 as text
    except (TypeError, ValueError):
        raise ValueError(f"head.margin.{parameter}: got {value!r}; wanted a number") from None
