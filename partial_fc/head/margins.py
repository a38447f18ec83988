"""The margins of the literature, each with its paper's defaults, and by the name that a config gives them."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from partial_fc.head.margin import Margin, Sample, WarmUp, check, continued, multiplied, sine
from partial_fc.head.named import choose, fill, read


@dataclass(frozen=True, kw_only=True)
class Softmax(Margin):
    """Plain softmax: x.w + bias, nothing normalized (torch.nn.Linear and cross entropy)."""

    scale: None = field(default=None, init=False)
    learn_scale: bool = field(default=False, init=False)
    interclass_filtering_threshold: None = field(default=None, init=False)

    normalize_centers: ClassVar[bool] = False
    has_bias: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class SoftMarginSoftmax(Softmax):
    """Soft-margin softmax: x.w + bias - m at the target. Liang et al., ICONIP 2017."""

    margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "margin", self.margin >= 0, "0 or more")

    def shift(self) -> float:
        return self.margin


@dataclass(frozen=True, kw_only=True)
class L2Softmax(Margin):
    """L2-constrained softmax: s x_hat.w + bias. Ranjan et al. 2017 (arXiv 1703.09507)."""

    scale: float | None = 24.0

    normalize_centers: ClassVar[bool] = False
    has_bias: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NormSoftmax(Margin):
    """Normalized softmax: s cos(theta). NormFace (Wang et al. 2017, arXiv 1704.06369), eq. 6."""


@dataclass(frozen=True, kw_only=True)
class LSoftmax(Margin):
    """Large-margin softmax: |x| |w| psi, psi = (-1)^k cos(m theta) - 2k. Liu et al. (arXiv 1612.02295), eqs. 4, 6.

    Training starts near plain softmax: psi is (psi + lambda cos) / (1 + lambda), lambda = max(lambda_min, lambda_max /
    (1 + gamma step)), step from 0. That schedule and its defaults are SphereFace's, whose code counts steps from 1.
    L-Softmax's code has 1000 (1 + gamma step)^-35 with lambda_min 0 and, on MNIST, gamma 2.5e-5.
    """

    scale: None = field(default=None, init=False)
    learn_scale: bool = field(default=False, init=False)
    interclass_filtering_threshold: None = field(default=None, init=False)
    margin: int = 4
    lambda_max: float = 1000.0
    lambda_min: float = 5.0
    gamma: float = 0.12

    normalize_centers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "margin", self.margin in (1, 2, 3, 4), "1, 2, 3 or 4")
        check(self, "lambda_min", 0 <= self.lambda_min <= self.lambda_max, "0 to lambda_max")
        check(self, "gamma", self.gamma >= 0, "0 or more")

    def annealing(self, step: int) -> float:
        """lambda."""
        return max(self.lambda_min, self.lambda_max / (1 + self.gamma * step))

    def target_of(self, sample: Sample) -> Tensor:
        weight = self.annealing(sample.step)
        return (multiplied(sample.cosine, self.margin) + weight * sample.cosine) / (1 + weight)


@dataclass(frozen=True, kw_only=True)
class SphereFace(LSoftmax):
    """A-Softmax: |x| psi(theta), L-Softmax with normalized centers. SphereFace (arXiv 1704.08063), eqs. 6-7.

    lambda falls from 1000 to 5, so that even at the end cos weighs five times what psi does.

    The gradients here are the true ones of the formula. The authors' code differs: it rescales centers to length 1 in
    each forward and gives them the gradient of plain softmax, x, without psi's derivative; and it scales the two
    coefficients of psi's gradient by x, that of w and that of x, to a norm of 1.
    """

    normalize_centers: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class CosFace(Margin):
    """Additive cosine margin: s (cos(theta) - m3).

    CosFace (arXiv 1801.09414), eq. 4; AM-Softmax (arXiv 1801.05599), eqs. 5-7. With `scale=None` it is AM-Softmax
    without feature normalization: |x| (cos(theta) - m3). The bounds of m3 are eq. 8.

    Here m3 is subtracted at every angle, as in the formula. AM-Softmax's code does so only where cos(theta) > m3, and
    rescales centers to length 1 in each forward.
    """

    margin: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "margin", 0 <= self.margin < 2, "one in [0, 2), the paper's is 0.35")

    def target(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin

    def cautions(self, num_classes: int, embedding_dim: int) -> list[str]:
        said, classes = super().cautions(num_classes, embedding_dim), max(num_classes, 2)
        most = 1 - math.cos(2 * math.pi / classes) if embedding_dim == 2 else classes / (classes - 1)
        if self.margin > most:
            name, room = type(self).__name__, f"{num_classes} centers in {embedding_dim} dimensions"
            said.append(f"{name}: margin is {self.margin:g}; give at most {most:.4g}: {room} have no room for more")
        return said


@dataclass(frozen=True, kw_only=True)
class ArcFace(Margin):
    """Additive angular margin: s cos(theta + m2), continued past pi. ArcFace (arXiv 1801.07698), eq. 3.

    The gradient is the true one: d psi / d cos = sin(theta + m2) / sin(theta), 1.15 at cos 0.5 and m2 0.5. With
    straight_through it is 1, as InsightFace's code has it, which computes psi without gradient.
    """

    margin: float = 0.5
    straight_through: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "margin", 0 <= self.margin < math.pi, "one in [0, pi), in rad; the paper's is 0.5")

    def target(self, cosine: Tensor) -> Tensor:
        psi = continued(cosine, self.margin)
        return cosine + (psi - cosine).detach() if self.straight_through else psi


@dataclass(frozen=True, kw_only=True)
class CombinedMargin(Margin):
    """s (cos(m1 theta + m2) - m3), as one formula, continued past pi. ArcFace (arXiv 1801.07698), eq. 4."""

    m1: float = 1.0
    m2: float = 0.3
    m3: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "m1", self.m1 > 0, "a positive number")
        check(self, "m2", 0 <= self.m2 < math.pi, "one in [0, pi), in rad")
        check(self, "m3", 0 <= self.m3 < 2, "one in [0, 2)")

    def target(self, cosine: Tensor) -> Tensor:
        return multiplied(cosine, self.m1, self.m2) - self.m3


@dataclass(frozen=True, kw_only=True)
class MagFace(Margin):
    """Additive angular margin that grows with |x|, and a regularizer. MagFace (arXiv 2103.06627), eq. 2.

    m(a) is linear from `low_margin` at a = `low` to `high_margin` at `high`, a = |x| clipped to them; the loss has
    `regularization` * (a / high^2 + 1 / a) beside it. Both let gradient flow through |x|.
    """

    low: float = 10.0
    high: float = 110.0
    low_margin: float = 0.45
    high_margin: float = 0.8
    regularization: float = 35.0

    looks_at_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "low", 0 < self.low < self.high, "a positive number below high")
        check(self, "low_margin", 0 <= self.low_margin <= self.high_margin < math.pi, "0 to high_margin < pi, in rad")
        check(self, "regularization", self.regularization >= 0, "0 or more")

    def target_of(self, sample: Sample) -> Tensor:
        slope = (self.high_margin - self.low_margin) / (self.high - self.low)
        length = sample.length.clamp(self.low, self.high)
        return continued(sample.cosine, self.low_margin + slope * (length - self.low))

    def least_target(self) -> float:
        return math.cos(self.high_margin)

    def caution_of_lengths(self, length: Tensor) -> str | None:
        share = ((length < self.low) | (length > self.high)).double().mean().item() if len(length) else 0.0
        if share <= 0.5:
            return None
        return (
            f"MagFace: |x| is {length.min().item():.3g} to {length.max().item():.3g} in a batch, {share:.0%} outside "
            f"low {self.low:g} to high {self.high:g}, where margin and regularizer are constants: give low and high "
            "around the lengths that the backbone has"
        )

    def regularizer(self, length: Tensor) -> Tensor:
        length = length.clamp(self.low, self.high)
        return self.regularization * (length / self.high**2 + 1 / length)


@dataclass(frozen=True, kw_only=True)
class AdaFace(Margin):
    """Angular and cosine margin by image quality, for which |x| stands. AdaFace (arXiv 2204.00964).

    z = h (|x| - mean) / deviation clipped to [-1, 1]; psi = cos(theta - m z) - (m z + m), the angle clipped to [0, pi].
    Mean and deviation of |x| are running ones, of weight `momentum` for each batch; no gradient flows through |x|.
    """

    margin: float = 0.4
    h: float = 0.333
    momentum: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "margin", 0 <= self.margin < 1, "one in [0, 1), the paper's is 0.4")
        check(self, "h", self.h > 0, "a positive number, the paper's is 0.333")
        check(self, "momentum", 0 < self.momentum <= 1, "one in (0, 1], the paper's is 0.01")

    def least_target(self) -> float:
        return 1 - 2 * self.margin  # at z = 1

    def first_statistics(self) -> dict[str, float]:
        return {"length_mean": 20.0, "length_deviation": 100.0}  # the authors' code

    def observe(self, sample: Sample) -> dict[str, Tensor]:
        lengths = torch.where(sample.real, sample.length.clamp(1e-3, 100), 0)
        count = sample.real.sum()
        mean = lengths.sum() / count.clamp_min(1)
        squares = torch.where(sample.real, (lengths - mean) ** 2, 0).sum()
        batch = {"length_mean": mean, "length_deviation": (squares / (count - 1).clamp_min(1)).sqrt()}
        before = {name: sample.statistics[name] for name in batch}
        return {
            name: torch.where(count > 1, before[name] + self.momentum * (batch[name] - before[name]), before[name])
            for name in batch
        }

    def target_of(self, sample: Sample) -> Tensor:
        deviation = sample.statistics["length_deviation"] + 1e-3
        quality = (sample.length.detach().clamp(1e-3, 100) - sample.statistics["length_mean"]) / deviation
        quality = (self.h * quality).clamp(-1, 1)
        theta = torch.atan2(sine(sample.cosine), sample.cosine) - self.margin * quality
        return torch.cos(theta.clamp(1e-3, math.pi - 1e-3)) - self.margin * (1 + quality)


@dataclass(frozen=True, kw_only=True)
class ElasticCosFace(CosFace):
    """CosFace whose margin is drawn anew for every sample, N(m, deviation^2). ElasticFace (arXiv 2109.09416), eq. 7."""

    deviation: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "deviation", self.deviation >= 0, "0 or more, the paper's is 0.05")

    def target_of(self, sample: Sample) -> Tensor:
        return sample.cosine - (self.margin + self.deviation * sample.normal())


@dataclass(frozen=True, kw_only=True)
class ElasticArcFace(Margin):
    """ArcFace whose margin is drawn anew for every sample, N(m, deviation^2), and clipped to [0, pi].

    ElasticFace (arXiv 2109.09416), eq. 6, which has no clip.
    """

    margin: float = 0.5
    deviation: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "margin", 0 <= self.margin < math.pi, "one in [0, pi), in rad; the paper's is 0.5")
        check(self, "deviation", self.deviation >= 0, "0 or more, the paper's is 0.05")

    def least_target(self) -> float:
        return math.cos(self.margin)

    def target_of(self, sample: Sample) -> Tensor:
        drawn = self.margin + self.deviation * sample.normal()
        return continued(sample.cosine, drawn.clamp(0, math.pi))


@dataclass(frozen=True, kw_only=True)
class CurricularFace(ArcFace):
    """ArcFace whose hard negatives weigh more as training goes on. CurricularFace (arXiv 2004.00288).

    A negative is hard for a sample where cos(theta_j) > cos(theta + m), continued past pi; its f is then
    (t + cos(theta_j)) cos(theta_j). t is a running mean of the target cosine, of weight `momentum` for each batch, and
    begins at 0. The paper gives that weight as 0.99, its authors' code is what is here: 0.01. No gradient flows through
    t nor through what is hard.

    Negatives wait for the target's cosine: one collective more a forward.
    """

    momentum: float = 0.01

    reweights: ClassVar[bool] = True
    largest_negative: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "momentum", 0 < self.momentum <= 1, "one in (0, 1], the authors' is 0.01")

    def first_statistics(self) -> dict[str, float]:
        return {"t": 0.0}

    def observe(self, sample: Sample) -> dict[str, Tensor]:
        count = sample.real.sum()
        mean = torch.where(sample.real, sample.cosine, 0).sum() / count.clamp_min(1)
        before = sample.statistics["t"]
        return {"t": torch.where(count > 0, before + self.momentum * (mean - before), before)}

    def negatives(self, cosine: Tensor, psi: Tensor, statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        hard = cosine > psi
        weighted = cosine + statistics["t"]
        slope = torch.where(hard, weighted + cosine, 1)
        return torch.where(hard, weighted * cosine, cosine), slope


@dataclass(frozen=True, kw_only=True)
class SubCenterArcFace(ArcFace):
    """ArcFace with several centers a class: each sample meets the nearest of every class, so that noisy samples gather
    at centers of their own. Sub-center ArcFace (Deng et al., ECCV 2020), k = 3.

    Row class * k + j of the centers is sub-center j; a class with its k rows is on one rank, and memory and time grow
    with k C. Of equally near centers the first counts.
    """

    sub_centers: int = 3  # type: ignore[misc]  # of the class in every other margin

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.sub_centers, int) and not isinstance(self.sub_centers, bool) and self.sub_centers >= 1
        check(self, "sub_centers", good, "a positive whole number")


BY_NAME: dict[str, type[Margin]] = {
    "softmax": Softmax,
    "softmarginsoftmax": SoftMarginSoftmax,
    "l2softmax": L2Softmax,
    "normsoftmax": NormSoftmax,
    "lsoftmax": LSoftmax,
    "sphereface": SphereFace,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": CombinedMargin,
    "magface": MagFace,
    "adaface": AdaFace,
    "elasticcosface": ElasticCosFace,
    "elasticarcface": ElasticArcFace,
    "curricularface": CurricularFace,
    "subcenterarcface": SubCenterArcFace,
}


def build_margin(name: str, parameters: dict, *, trust_code: bool = False) -> Margin | WarmUp:
    """The margin of a config: head.margin.name, its parameters, and `warmup`, {steps: n, parameter: first value, ...}.

    name: one of BY_NAME, or with trust_code module.Class of a module that can be imported, which runs that module.

    Raises ValueError naming what there is.
    """
    kind = choose(BY_NAME, name, "margin", "head.margin.name", Margin, trust_code)
    parameters = dict(parameters)
    warmup = parameters.pop("warmup", None)
    margin = fill(kind, name, parameters, "head.margin")
    if warmup is None:
        return margin
    if not isinstance(warmup, dict) or "steps" not in warmup:
        raise ValueError(f"head.margin.warmup: got {warmup!r}; wanted as {{steps: 1000, margin: 0.0}}")
    start = {parameter: read(f"head.margin.warmup.{parameter}", value, float) for parameter, value in warmup.items()}
    steps = start.pop("steps")
    return WarmUp(margin, int(steps) if steps.is_integer() else steps, start)
