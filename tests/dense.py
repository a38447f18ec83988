"""The dense reference: one process, whole weight, autograd, torch.optim. Each loss is written out per element.

And the partitioned side of the same run, for any number of ranks.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partial_fc import (
    AdaFace,
    ArcFace,
    CenterLoss,
    CombinedMargin,
    ContrastiveLoss,
    CosFace,
    CurricularFace,
    ElasticArcFace,
    ElasticCosFace,
    L2Softmax,
    LSoftmax,
    MagFace,
    Margin,
    NormSoftmax,
    PartialFC,
    SoftMarginSoftmax,
    Softmax,
    SphereFace,
    SubCenterArcFace,
    TripletLoss,
    WarmUp,
)
from partial_fc.head.embedding_losses import EmbeddingLoss
from partial_fc.head.sampling import HardNegatives, draw_negatives
from partial_fc.parallel import distributed
from partial_fc.parallel.engine import DDPEngine
from tests.conftest import run_ranks

EXACT = 1e-11  # of the largest reference value, in float64


@dataclass(frozen=True, kw_only=True)
class CenterNorm(CosFace):
    """n = |w|: a margin on centers that are not normalized, as a user may write one."""

    normalize_centers: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Biased(ArcFace):
    has_bias: ClassVar[bool] = True


MARGINS: dict[str, Margin] = {  # one of each kind of logit: for what depends on that alone (cache, AdamW, compiler)
    "softmax": Softmax(),
    "normsoftmax": NormSoftmax(scale=16.0),
    "cosface": CosFace(scale=24.0, margin=0.35),
    "cosface-unnormalized": CosFace(scale=None, margin=0.35),
    "arcface": ArcFace(scale=24.0, margin=0.5),
    "center-norm": CenterNorm(scale=6.0, margin=0.3),
    "biased": Biased(scale=16.0, margin=0.4),
    "cosface-s200": CosFace(scale=200.0, margin=0.4),  # too large for exp in float32: the online maximum
}
# Parameters such that the cases' embeddings, 0.2 to 3 long, meet every branch; lambda falls in every step.
MORE_MARGINS: dict[str, Margin] = {
    "soft-margin": SoftMarginSoftmax(margin=0.5),
    "l2softmax": L2Softmax(scale=8.0),
    "lsoftmax": LSoftmax(margin=3, lambda_max=2.0, lambda_min=0.0, gamma=0.5),
    "sphereface": SphereFace(margin=4, lambda_max=3.0, lambda_min=0.5, gamma=1.0),
    "arcface-straight": ArcFace(scale=24.0, margin=0.5, straight_through=True),
    "combined": CombinedMargin(scale=16.0, m1=1.2, m2=0.3, m3=0.2),
    "combined-0.9": CombinedMargin(scale=16.0, m1=0.9, m2=0.4, m3=0.15),
    "magface": MagFace(scale=16.0, low=0.8, high=1.8, low_margin=0.3, high_margin=0.9, regularization=2.0),
    "adaface": AdaFace(scale=24.0, margin=0.4, h=1.2, momentum=0.95),
    "elasticcosface": ElasticCosFace(scale=24.0, margin=0.35, deviation=0.1),
    "elasticarcface": ElasticArcFace(scale=24.0, margin=0.5, deviation=0.2),
}
# What changes negatives, the scale or the step; t is a mean cosine, near 0 here, where half of the negatives are hard.
CHANGING_MARGINS: dict[str, Margin | WarmUp] = {
    "curricularface": CurricularFace(scale=24.0, margin=0.3, momentum=0.6),
    "curricularface-filtered": CurricularFace(scale=8.0, margin=0.5, momentum=0.6, interclass_filtering_threshold=0.6),
    "cosface-filtered": CosFace(scale=16.0, margin=0.2, interclass_filtering_threshold=0.3),
    "magface-filtered": MagFace(scale=96.0, low=0.8, high=1.8, interclass_filtering_threshold=0.4),
    "subcenterarcface": SubCenterArcFace(scale=24.0, margin=0.3, sub_centers=3),
    "subcenterarcface-2": SubCenterArcFace(scale=90.0, sub_centers=2, interclass_filtering_threshold=0.7),
    "learned-scale": CosFace(scale=12.0, margin=0.35, learn_scale=True),
    "learned-scale-elastic": ElasticCosFace(scale=1.1, learn_scale=True, interclass_filtering_threshold=0.5),
    "learned-scale-adaface": AdaFace(scale=16.0, h=1.2, momentum=0.95, learn_scale=True),
    "learned-scale-l2softmax": L2Softmax(scale=4.0, learn_scale=True),
    "warm-up": WarmUp(ArcFace(scale=24.0, margin=0.5), 2, {"margin": 0.0, "scale": 80.0}),
    "warm-up-adaface": WarmUp(AdaFace(scale=24.0, h=1.2), 4, {"margin": 0.1}),
}
ALL_MARGINS = MARGINS | MORE_MARGINS | CHANGING_MARGINS


def full(margin: Margin | WarmUp) -> Margin:
    """Without its warm-up."""
    return margin.margin if isinstance(margin, WarmUp) else margin


@dataclass
class Seen:
    """What a paper's formula looks at beside x and w, and is the same for all samples but for the drawn numbers."""

    step: int = 0
    length_mean: Tensor | float = 20.0  # AdaFace's before the first batch
    length_deviation: Tensor | float = 100.0
    normal: Tensor | None = None  # (B,) ElasticFace's draws
    t: Tensor | float = 0.0  # CurricularFace's


def seen_by(
    margin: Margin, x: Tensor, before: Seen, step: int, forward: int, seed: int, cosine: Tensor | None = None
) -> Seen:
    """What the formulas see of a batch (B, D) with target cosines (B,): statistics with it in them, drawn numbers."""
    key = int.from_bytes(hashlib.blake2b(f"margin/{seed}/{step}/{forward}".encode(), digest_size=16).digest(), "little")
    normal = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(len(x)))
    seen = Seen(step, before.length_mean, before.length_deviation, normal, before.t)
    if isinstance(margin, CurricularFace):
        seen.t = margin.momentum * cosine.detach().mean() + (1 - margin.momentum) * before.t
    if isinstance(margin, AdaFace) and len(x) > 1:
        lengths = x.detach().norm(dim=1).clamp(0.001, 100)
        seen.length_mean = margin.momentum * lengths.mean() + (1 - margin.momentum) * before.length_mean
        seen.length_deviation = margin.momentum * lengths.std() + (1 - margin.momentum) * before.length_deviation
    return seen


def continued_cosine(phi: Tensor) -> Tensor:
    """(-1)^k cos(phi) - 2k with phi in [k pi, (k + 1) pi], of a single angle ()."""
    k = math.floor(phi.item() / math.pi)
    return (-1) ** k * torch.cos(phi) - 2 * k


def naive_target_logit(margin: Margin, x: Tensor, w: Tensor, bias: Tensor, seen: Seen, normal: float) -> Tensor:
    """The target logit () of one sample (D,) and its center (D,), as the paper's formula reads."""
    if isinstance(margin, SoftMarginSoftmax):
        return x @ w + bias - margin.margin
    if isinstance(margin, Softmax):
        return x @ w + bias
    if isinstance(margin, L2Softmax):
        return margin.scale * x / x.norm() @ w + bias
    length = x.norm()
    cosine = (x @ w) / (length * w.norm())
    theta = torch.acos(cosine.clamp(-1, 1))
    if isinstance(margin, LSoftmax):
        annealing = max(margin.lambda_min, margin.lambda_max / (1 + margin.gamma * seen.step))
        psi = continued_cosine(margin.margin * theta)
        factor = length if isinstance(margin, SphereFace) else length * w.norm()
        return (annealing * factor * cosine + factor * psi) / (1 + annealing)
    scale = length if margin.scale is None else margin.scale
    if isinstance(margin, CenterNorm):
        return scale * w.norm() * (cosine - margin.margin)
    if isinstance(margin, ElasticCosFace):
        return scale * (cosine - (margin.margin + margin.deviation * normal))
    if isinstance(margin, ElasticArcFace):
        return scale * continued_cosine(theta + (margin.margin + margin.deviation * normal))
    if isinstance(margin, CosFace):
        return scale * (cosine - margin.margin)
    if isinstance(margin, ArcFace):
        psi = continued_cosine(theta + margin.margin)
        if margin.straight_through:  # the value of psi, the derivative of the cosine
            psi = psi.detach() + (cosine - cosine.detach())
        return scale * psi + (bias if isinstance(margin, Biased) else 0)
    if isinstance(margin, CombinedMargin):
        return scale * (continued_cosine(margin.m1 * theta + margin.m2) - margin.m3)
    if isinstance(margin, MagFace):
        a = length.clamp(margin.low, margin.high)
        slope = (margin.high_margin - margin.low_margin) / (margin.high - margin.low)
        return scale * continued_cosine(theta + slope * (a - margin.low) + margin.low_margin)
    if isinstance(margin, AdaFace):
        quality = (length.detach().clamp(0.001, 100) - seen.length_mean) / (seen.length_deviation + 0.001)
        quality = min(max(float(margin.h * quality), -1), 1)
        g_angle, g_add = -margin.margin * quality, margin.margin * quality + margin.margin
        return scale * (torch.cos((theta + g_angle).clamp(0.001, math.pi - 0.001)) - g_add)
    return scale * cosine


def nearest_rows(margin: Margin, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(B,) rows of the weight (k C, D): each sample's target, of k sub-centers the nearest."""
    k = margin.sub_centers
    rows = []
    for sample, label in zip(x.detach(), labels.tolist(), strict=True):
        cosines = nn.functional.cosine_similarity(sample, weight.detach()[label * k : (label + 1) * k])
        rows.append(label * k + int(cosines.argmax()))
    return torch.tensor(rows, dtype=torch.int64)


def negative_logits(
    margin: Margin, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor | None = None, t: Tensor | float = 0.0
) -> Tensor:
    """(B, C) logits of negatives; targets (B,) logits, for CurricularFace."""
    if isinstance(margin, Softmax):
        return x @ weight.T + bias
    scale = x.norm(dim=1, keepdim=True) if margin.scale is None else margin.scale
    centers = weight / weight.norm(dim=1, keepdim=True)
    if type(margin) in (CenterNorm, L2Softmax, LSoftmax):
        centers = weight
    cosine = (x / x.norm(dim=1, keepdim=True)) @ centers.T
    if margin.sub_centers > 1:
        cosine = cosine.unflatten(1, (-1, margin.sub_centers)).amax(dim=2)
    f = cosine
    if isinstance(margin, CurricularFace):
        hard = scale * cosine.detach() > targets.detach()[:, None]
        f = torch.where(hard, cosine * (t + cosine), cosine)
    logits = scale * f
    if margin.interclass_filtering_threshold is not None:
        logits = logits.masked_fill(cosine > margin.interclass_filtering_threshold, -torch.inf)
    return logits + bias if type(margin) in (Biased, L2Softmax) else logits


def dense_logits(
    margin: Margin, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, seen: Seen | None = None
) -> Tensor:
    """(B, C) logits with the margin at the targets; `seen` unset: as in the first step of a head of seed 0."""
    rows = nearest_rows(margin, x, weight, labels)
    if seen is None:
        cosine = nn.functional.cosine_similarity(x, weight[rows])
        seen = seen_by(margin, x, Seen(), step=0, forward=0, seed=0, cosine=cosine)
    targets = torch.stack(
        [
            naive_target_logit(margin, x[i], weight[row], bias[y], seen, seen.normal[i].item())
            for i, (row, y) in enumerate(zip(rows.tolist(), labels.tolist(), strict=True))
        ]
    )
    return negative_logits(margin, x, weight, bias, targets, seen.t).scatter(1, labels[:, None], targets[:, None])


def regularization(margin: Margin, x: Tensor) -> Tensor | float:
    """What MagFace adds to the loss of a batch (B, D): the mean of lambda_g g(a), g(a) = 1 / a + a / u_a^2."""
    if not isinstance(margin, MagFace):
        return 0.0
    a = x.norm(dim=1).clamp(margin.low, margin.high)
    return margin.regularization * (1 / a + a / margin.high**2).mean()


def naive_distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, with the gradient 0 where it is 0."""
    squares = ((a - b) ** 2).sum()
    return squares.sqrt() if squares > 0 else squares


def naive_loss(loss: EmbeddingLoss, x: Tensor, labels: Tensor, centers: Tensor | None = None) -> Tensor:
    """weight * loss () of a batch without padding."""
    n, labels = len(x), labels.tolist()
    if getattr(loss, "normalize", False):
        x = torch.stack([row / row.norm() for row in x]) if n else x
    zero = x.sum() * 0
    if isinstance(loss, CenterLoss):
        squares = [((x[i] - centers[labels[i]]) ** 2).sum() for i in range(n)]
        return loss.weight / 2 * sum(squares, zero) / max(n, 1)
    if isinstance(loss, ContrastiveLoss):
        same, other = [], []
        for i in range(n):
            for j in range(i):
                d = naive_distance(x[i], x[j])
                if labels[i] == labels[j]:
                    same.append(d**2 / 2)
                else:
                    other.append(max(loss.margin - d, zero) ** 2 / 2)
        return loss.weight * (sum(same, zero) / max(len(same), 1) + sum(other, zero) / max(len(other), 1))
    terms = []
    for a in range(n):
        d = [naive_distance(x[a], x[i]) ** (2 if loss.squared else 1) for i in range(n)]
        positives = [d[i] for i in range(n) if labels[i] == labels[a] and i != a]
        negatives = [d[i] for i in range(n) if labels[i] != labels[a]]
        if positives and negatives:
            gap = max(positives) - min(negatives)  # the first of equals, as ours
            terms.append(torch.log1p(torch.exp(gap)) if loss.margin == "soft" else max(loss.margin + gap, zero))
    return loss.weight * sum(terms, zero) / max(len(terms), 1)


EMBEDDING_LOSSES: dict[str, EmbeddingLoss] = {
    "triplet": TripletLoss(weight=0.7, margin=0.3),
    "contrastive": ContrastiveLoss(weight=0.5, margin=1.5, normalize=True),
    "center": CenterLoss(weight=0.4, alpha=0.5),
}


def moved(loss: CenterLoss, centers: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Feature centers (C, D) after a step that saw `batches` of embeddings (n, D) and labels (n,)."""
    after = centers.clone()
    for j in range(len(centers)):
        own = [x[i].detach() for x, labels in batches for i in range(len(x)) if labels[i] == j]
        after[j] += loss.alpha * sum((x - centers[j] for x in own), 0 * centers[j]) / (1 + len(own))
    return after


@dataclass
class Case:
    """One training run that both sides make: `steps` updates of a linear backbone and the class centers."""

    margin: str
    num_classes: int = 23
    dim: int = 5
    sample_rate: float = 1.0
    sampler: Callable | None = None  # a plain function, or HardNegatives
    chunk: int = 4
    sizes: tuple[int, ...] = (6,)  # local batch sizes, one per rank
    labels: str = "random"  # random | one_rank | duplicates
    forwards: int = 1  # micro-batches per step, through begin_step
    loss_scale: float = 1.0
    loss_factor: float = 1.0  # (factor * loss + auxiliary).backward()
    auxiliary: bool = False
    steps: int = 3
    seed: int = 3
    dtype: torch.dtype = torch.float64
    init_std: float = 0.5
    optimizer: str = "sgd"
    dropout: float = 0.0
    embedding_losses: tuple[str, ...] = ()
    clip: float | None = None  # of the norm over backbone and centers
    hyper: dict = field(default_factory=lambda: dict(momentum=0.9, weight_decay=5e-3))
    head: dict = field(default_factory=dict)  # options of PartialFC that must not change the result

    INPUTS = 7

    @property
    def batch(self) -> int:
        return sum(self.sizes)

    def lr(self, step: int) -> float:
        return 0.1 / (1 + step)

    def data(self, step: int, forward: int) -> tuple[Tensor, Tensor]:
        """The global batch: inputs (B, INPUTS), labels (B,)."""
        generator = torch.Generator().manual_seed(1000 * step + forward)
        inputs = torch.randn(self.batch, self.INPUTS, generator=generator, dtype=torch.float64).to(self.dtype)
        high = 2 if self.labels == "one_rank" else self.num_classes
        labels = torch.randint(high, (self.batch,), generator=generator)
        if self.labels == "duplicates":
            labels[:] = labels[0]
        return inputs, labels

    def backbone(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(self.INPUTS, self.dim, dtype=torch.float64).to(self.dtype)


def auxiliary_loss(embeddings: Tensor) -> Tensor:
    return (embeddings**2).mean(dim=1).sum()


def nearest_classes(weight: Tensor, count: int) -> Tensor:
    """(C, count) the nearest other classes by cosine, of equal ones the lower class first; -1 past the last."""
    rows = nn.functional.normalize(weight.double())
    cosine = (rows @ rows.T).float()
    table = torch.full((len(weight), count), -1)
    for row in range(len(weight)):
        others = sorted(set(range(len(weight))) - {row}, key=lambda other: (-cosine[row, other].item(), other))
        table[row, : len(others)] = torch.tensor(others[:count], dtype=torch.int64)
    return table


def sample(case: Case, step: int, labels: Tensor, neighbours: Tensor) -> Tensor:
    """The negatives of a step, class ids; neighbours (C, K) as of the last refresh."""
    everyone = range(case.num_classes)
    drawn = draw_negatives(case.seed, step, everyone, case.num_classes, case.sample_rate)
    if case.sampler is None:
        return drawn
    if isinstance(case.sampler, HardNegatives):
        near = neighbours[labels].flatten()
        return torch.cat([drawn, near[near >= 0]])
    head = SimpleNamespace(classes=everyone, num_classes=case.num_classes, seed=case.seed, sample_rate=case.sample_rate)
    return case.sampler(head, step, labels)


def dropped(case: Case, x: Tensor, step: int, forward: int) -> Tensor:
    """Embeddings (B, D) after the dropout of `case`."""
    if not case.dropout:
        return x
    key = hashlib.blake2b(f"dropout/{case.seed}/{step}/{forward}".encode(), digest_size=16).digest()
    drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(x.shape, dtype=np.float32)
    return torch.where(torch.from_numpy(drawn) < case.dropout, 0, x / (1 - case.dropout))


RESULTS = ("loss", "embedding_grad", "backbone_grad", "norm", "weight", "scale", "feature_centers")


def run_dense(case: Case, weight: Tensor, feature_centers: Tensor | None = None) -> dict:
    """Losses, embedding gradients, backbone gradients and the centers after every step."""
    schedule, seen = ALL_MARGINS[case.margin], Seen()
    learn_scale, per_class = full(schedule).learn_scale, full(schedule).sub_centers
    backbone = case.backbone()
    weight = weight.clone().requires_grad_()
    bias = torch.zeros(len(weight), dtype=case.dtype, requires_grad=True)
    optimizers = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    centers = optimizers[case.optimizer]([weight, bias], lr=0.0, **case.hyper)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.0, momentum=0.9)
    scale = torch.tensor(full(schedule).scale or 0.0, dtype=torch.float64, requires_grad=True)
    scales = optimizers[case.optimizer]([scale], lr=0.0, **case.hyper | {"weight_decay": 0.0})
    out: dict = {name: [] for name in RESULTS}
    neighbours = torch.empty(case.num_classes, 0, dtype=torch.int64)
    for step in range(case.steps):
        margin = schedule.at(step)
        if learn_scale:  # a parameter now
            object.__setattr__(margin := replace(margin), "scale", scale)
        batches = [case.data(step, forward) for forward in range(case.forwards)]
        used = torch.ones(case.num_classes, dtype=torch.bool)
        if isinstance(case.sampler, HardNegatives) and step > 0 and step % case.sampler.every == 0:
            neighbours = nearest_classes(weight.detach(), case.sampler.neighbours)
        if case.sample_rate < 1 or case.sampler is not None:
            positives = torch.cat([labels for _, labels in batches])
            used = torch.zeros(case.num_classes, dtype=torch.bool)
            used[sample(case, step, positives, neighbours)] = True
            used[positives] = True
        centers.zero_grad()
        optimizer.zero_grad()
        scales.zero_grad()
        seen_embeddings = []
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        for forward, (inputs, labels) in enumerate(batches):
            embeddings = backbone(inputs)
            embeddings.retain_grad()
            x = dropped(case, embeddings, step, forward)
            cosine = nn.functional.cosine_similarity(x, weight[nearest_rows(margin, x, weight, labels)])
            seen = seen_by(margin, x, seen, step, forward, case.seed, cosine)
            logits = dense_logits(margin, x, weight, bias, labels, seen).masked_fill(~used, -torch.inf)
            loss = nn.functional.cross_entropy(logits, labels) + regularization(margin, x)
            for name in case.embedding_losses:
                loss = loss + naive_loss(EMBEDDING_LOSSES[name], embeddings, labels, feature_centers)
            seen_embeddings.append((embeddings, labels))
            objective = case.loss_factor * loss
            if case.auxiliary:  # each rank's own mean, averaged over ranks
                parts = embeddings.split(list(case.sizes))
                objective = objective + sum(auxiliary_loss(p) for p in parts) / len(case.sizes)
            objective.backward()
            out["loss"].append(loss.item())
            out["embedding_grad"].append(embeddings.grad.clone())
        out["backbone_grad"].append(backbone.weight.grad.clone())
        if case.clip is not None:
            learned = [*backbone.parameters(), weight, bias, *([scale] if learn_scale else [])]
            out["norm"].append(nn.utils.clip_grad_norm_(learned, case.clip).item())
        for group in (*centers.param_groups, *optimizer.param_groups, *scales.param_groups):
            group["lr"] = case.lr(step)
        if case.optimizer == "adamw":
            step_rows(centers, used.repeat_interleave(per_class))
        else:
            centers.step()
        optimizer.step()
        if learn_scale:
            scales.step()
            scale.data.clamp_(min=1)
        if feature_centers is not None:
            feature_centers = moved(EMBEDDING_LOSSES["center"], feature_centers, seen_embeddings)
            out["feature_centers"].append(feature_centers)
        out["weight"].append(weight.detach().clone())
        out["scale"].append(scale.item())
    return out


def step_rows(optimizer: torch.optim.Optimizer, used: Tensor) -> None:
    """The optimizer's step on the rows `used` (C,); the others, and what it keeps of them, stay as they are."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:  # torch makes the state in the first step
        optimizer.state[parameter].setdefault("step", torch.tensor(0.0))
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter].setdefault(name, torch.zeros_like(parameter))
    kept = [(p, *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))) for p in parameters]
    before = [[tensor.detach().clone() for tensor in tensors] for tensors in kept]
    optimizer.step()
    with torch.no_grad():
        for tensors, old in zip(kept, before, strict=True):
            for tensor, value in zip(tensors, old, strict=True):
                tensor[~used] = value[~used]


def make_head(case: Case) -> PartialFC:
    return PartialFC(
        case.num_classes,
        case.dim,
        ALL_MARGINS[case.margin],
        case.sample_rate,
        sampler=case.sampler,
        dropout=case.dropout,
        embedding_losses=[EMBEDDING_LOSSES[name] for name in case.embedding_losses],
        chunk=case.chunk,
        seed=case.seed,
        dtype=case.dtype,
        init_std=case.init_std,
        optimizer=case.optimizer,
        **case.hyper,
        **case.head,
    )


def run_partitioned(case: Case) -> dict:
    """One rank's side of `case`, through DDP where there are several ranks."""
    rank, world_size = distributed.rank(), distributed.world_size()
    head = make_head(case)
    backbone = case.backbone()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.0, momentum=0.9)
    engine = DDPEngine(backbone, optimizer, head.device, accumulate=case.forwards, clip=case.clip)
    start = sum(case.sizes[:rank])
    mine = slice(start, start + case.sizes[rank])
    out: dict = {name: [] for name in RESULTS}
    out |= {"start": head.full_weight(), "feature_start": feature_centers_of(head)}
    for step in range(case.steps):
        batches = [case.data(step, forward) for forward in range(case.forwards)]
        if case.forwards > 1:
            head.begin_step(step, torch.cat([labels for _, labels in batches]))
        for inputs, labels in batches:
            embeddings = engine(inputs[mine])
            embeddings.retain_grad()
            loss = head(embeddings, labels[mine])
            objective = case.loss_factor * loss
            if case.auxiliary:
                objective = objective + auxiliary_loss(embeddings)
            engine.backward(objective * case.loss_scale)
            out["loss"].append(loss.item())
            # W times the gradient of the loss; the auxiliary loss is this rank's own, 1/W of which counts
            out["embedding_grad"].append(embeddings.grad / world_size / case.loss_scale)
        for parameter in backbone.parameters():
            parameter.grad /= case.loss_scale
        out["backbone_grad"].append(backbone.weight.grad.clone())
        grad_scale = case.loss_scale
        if case.clip is not None:
            grad_scale = engine.clip(head.gradient_norm(case.loss_scale)) * case.loss_scale
            out["norm"].append(engine.gradient_norm.item())
        head.step(case.lr(step), grad_scale=grad_scale)
        engine.step(case.lr(step))
        out["weight"].append(head.full_weight())
        out["feature_centers"].append(feature_centers_of(head))
        if full(ALL_MARGINS[case.margin]).learn_scale:
            out["scale"].append(head.scale.item())
    return out


def feature_centers_of(head: PartialFC) -> Tensor | None:
    """(C, D), of all ranks; None without a center loss. A collective."""
    if head.feature_centers is None:
        return None
    parts = distributed.gather_objects(head.feature_centers.value.clone())
    return torch.cat(parts)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def assert_equals_dense(case: Case) -> None:
    ranks = run_ranks(run_partitioned, len(case.sizes), case)
    wanted = run_dense(case, ranks[0]["start"], ranks[0]["feature_start"])
    for result in ranks:
        assert result["loss"] == ranks[0]["loss"], "the loss differs between ranks"
        assert result["scale"] == ranks[0]["scale"]
        assert result["scale"] == pytest.approx(wanted["scale"][: len(result["scale"])], rel=EXACT)
        assert result["norm"] == pytest.approx(wanted["norm"], rel=EXACT)
        losses = (torch.tensor(some["loss"], dtype=torch.float64) for some in (result, wanted))
        assert error(*losses) < EXACT
        for name in ("backbone_grad", "weight", *(["feature_centers"] if wanted["feature_centers"] else [])):
            for step in range(case.steps):
                assert error(result[name][step], wanted[name][step]) < EXACT, (name, step)
    for i, reference in enumerate(wanted["embedding_grad"]):
        assert error(torch.cat([result["embedding_grad"][i] for result in ranks]), reference) < EXACT, i


class HeadLoss(torch.autograd.Function):
    """loss(x, head, labels) through forward and backward as a user runs them, for numerical derivatives by x (B, D)."""

    @staticmethod
    def forward(ctx, x, head, labels):
        head.begin_step(3, labels)  # what depends on the step is there
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            loss = head(inner, labels)
            loss.backward()
        head.skip_step()
        ctx.save_for_backward(inner.grad)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None
