"""Losses beside the classifier, on the embeddings that the head gathered: center, batch-hard triplet, contrastive.

Each rank evaluates its own anchors (or, for center loss, its own classes) against the whole gathered batch. What it
finds are shares (B,) of the loss, zero for what other ranks evaluate; their sum over ranks and rows is weight * loss of
the global batch. What a loss is divided by is a function of the labels, so each rank finds it alone.

Distances are float64 and subtract before they square: the product form |x|^2 - 2 x.y + |y|^2 in float32 is off by 90 %
(the median) at a distance of .005 with |x| = 20, D = 512. Each is a function of its two embeddings alone, so that the
hardest pairs are the same at any number of ranks. A distance of 0 has gradient 0.

Shapes: B gathered rows with padding, b this rank's rows among them, D embedding size, C_r classes of this rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_fc.head.centers import initial_centers
from partial_fc.head.margin import check
from partial_fc.head.named import choose, fill
from partial_fc.head.targets import unit
from partial_fc.seeds import seed_for

PAIR_NUMBERS = 2**25  # (anchors, B, D) that a chunk of anchors may make: 256 MiB, where cdist's backward makes them


class Batch(NamedTuple):
    """What the gathered rows are; the losses' anchors are the rows `own`."""

    labels: Tensor  # (B,) int64
    real: Tensor  # (B,) bool; the others are padding
    own: slice  # this rank's rows
    count: Tensor  # type: ignore[assignment]  # () real rows; tuple.count is not used
    alike: Tensor  # (B,) rows of the same class, itself included; 0 for padding

    @classmethod
    def of(cls, labels: Tensor, real: Tensor, own: slice) -> "Batch":
        in_order = torch.where(real, labels, -1).sort().values
        alike = torch.searchsorted(in_order, labels, right=True) - torch.searchsorted(in_order, labels)
        return cls(labels, real, own, real.sum(), torch.where(real, alike, 0))

    def pairs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Which of all rows are positives and which negatives of the anchors `rows`, (b, B) bool each."""
        real = self.real[rows, None] & self.real
        same = self.labels[rows, None] == self.labels
        itself = torch.arange(len(self.labels), device=real.device)
        return real & same & (itself[rows, None] != itself), real & ~same


class Term(Protocol):
    """What `evaluate` adds up."""

    def shares(self, x: Tensor, batch: Batch) -> Tensor:
        """(B,) float64 of x (B, D) float64, differentiable."""


def evaluate(
    terms: Sequence[Term], x: Tensor, labels: Tensor, real: Tensor, own: slice, training: bool = True
) -> tuple[Tensor, Tensor | None]:
    """This rank's shares (B,) float64, and in training the gradient (B, D) of their sum, in x's dtype.

    In: gathered embeddings (B, D), labels (B,), which rows are no padding (B,), this rank's rows. Both results are to
    be added over the ranks. No collective.
    """
    batch = Batch.of(labels, real, own)
    with torch.set_grad_enabled(training):
        x = x.detach().requires_grad_(training)
        shares = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if len(x):
            # zeros would give 0 / 0 where a loss normalizes, and no mask behind it keeps NaN out of a gradient
            everything = torch.where(real.unsqueeze(1), x.double(), 1.0)
            for term in terms:
                shares = shares + term.shares(everything, batch)
        if not training:
            return shares, None
        if not shares.requires_grad:
            return shares, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(shares.sum(), x)
    return shares.detach(), gradient


@dataclass(frozen=True, kw_only=True)
class EmbeddingLoss:
    """What all have; one of your own has `of_anchors`.

    weight: what the loss is multiplied by before it is added to the classifier's. compares: whether samples of a batch
    are compared with each other, so that micro-batches would change the loss.
    """

    compares: ClassVar[bool] = True
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, "weight", 0 < self.weight < math.inf, "a positive number")

    def of_anchors(self, x: Tensor, batch: Batch) -> Tensor:
        """(b,): what each of the anchors x[batch.own] adds to the loss of the global batch; their sum over the ranks is
        that loss. x (B, D) float64 are the embeddings of all ranks, and ones where batch.real is False: padding, which
        ranks with fewer samples have. What is returned for padding is left out. Differentiable, without collectives.
        """
        raise NotImplementedError(f"{type(self).__name__} has no of_anchors(x, batch)")

    def shares(self, x: Tensor, batch: Batch) -> Tensor:
        own, real = self.of_anchors(x, batch), batch.real[batch.own]
        if own.shape != real.shape:
            raise ValueError(
                f"{type(self).__name__}.of_anchors gave {tuple(own.shape)}, wanted {tuple(real.shape)}: what each of "
                "this rank's rows, batch.own, adds to the loss of the global batch; neither their mean nor all ranks'"
            )
        own = torch.where(real, self.weight * own, 0)
        return F.pad(own, (batch.own.start, len(batch.labels) - batch.own.stop))


@dataclass(frozen=True, kw_only=True)
class TripletLoss(EmbeddingLoss):
    """Batch-hard triplet loss: max(0, margin + d(x, hardest positive) - d(x, hardest negative)). Hermans, Beyer and
    Leibe (arXiv 1703.07737), eq. 5.

    The mean over the anchors of the global batch that have a positive and a negative in it; anchors whose triplet is
    satisfied count. margin "soft" is their log(1 + exp(.)) in place of max(0, margin + .). d is the Euclidean distance
    of the embeddings as they are. With normalize, squared and margin .2 it is that of FaceNet (arXiv 1503.03832), which
    chose other triplets. Of equally hard pairs the first in the batch counts.
    """

    margin: float | Literal["soft"] = "soft"
    normalize: bool = False
    squared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.margin == "soft" if isinstance(self.margin, str) else 0 <= self.margin < math.inf
        check(self, "margin", good, 'a number of 0 or more, or "soft"')

    def of_anchors(self, x: Tensor, batch: Batch) -> Tensor:
        x = unit(x)[0] if self.normalize else x
        with torch.no_grad():
            chosen = [_hardest(x, batch, rows) for rows in _chunks(x, batch.own)]
        positive, negative, has_both = (torch.cat(part) for part in zip(*chosen, strict=True))
        gap = self._distance(x[batch.own] - x[positive]) - self._distance(x[batch.own] - x[negative])
        loss = torch.logaddexp(torch.zeros_like(gap), gap) if self.margin == "soft" else F.relu(self.margin + gap)
        anchors = (batch.alike > 1).sum().clamp_min(1)  # all of them, unless there is but one identity: no loss then
        return torch.where(has_both, loss, 0) / anchors

    def _distance(self, difference: Tensor) -> Tensor:
        return difference.square().sum(dim=1) if self.squared else torch.linalg.vector_norm(difference, dim=1)


def _hardest(x: Tensor, batch: Batch, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """For the anchors `rows`: row of the farthest positive, of the nearest negative, and whether there are both."""
    distance = _distances(x[rows], x)
    positive, negative = batch.pairs(rows)
    farthest = torch.where(positive, distance, -math.inf).argmax(dim=1)
    nearest = torch.where(negative, distance, math.inf).argmin(dim=1)
    return farthest, nearest, positive.any(dim=1) & negative.any(dim=1)


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss(EmbeddingLoss):
    """Contrastive loss: d^2 / 2 of a positive pair, max(0, margin - d)^2 / 2 of a negative one. Hadsell, Chopra and
    LeCun, CVPR 2006, eq. 4.

    The mean over all positive pairs of the global batch plus the mean over all negative ones. (The paper sums over
    pairs that were listed before; of all pairs of a batch of many identities nearly all are negative.) d is the
    Euclidean distance of the embeddings, as they are, or normalized: then it is at most 2.
    """

    margin: float = 1.0
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "margin", 0 < self.margin < math.inf, "a positive number")

    def of_anchors(self, x: Tensor, batch: Batch) -> Tensor:
        x = unit(x)[0] if self.normalize else x
        positives = torch.where(batch.real, batch.alike - 1, 0).sum().clamp_min(1)  # ordered pairs, as the anchors see
        negatives = torch.where(batch.real, batch.count - batch.alike, 0).sum().clamp_min(1)
        parts = []
        for rows in _chunks(x, batch.own):
            distance = _distances(x[rows], x)
            positive, negative = batch.pairs(rows)
            pull = torch.where(positive, distance.square(), 0).sum(dim=1)
            push = torch.where(negative, F.relu(self.margin - distance).square(), 0).sum(dim=1)
            parts.append(pull / positives + push / negatives)
        return torch.cat(parts) / 2


@dataclass(frozen=True, kw_only=True)
class CenterLoss(EmbeddingLoss):
    """Center loss: |x - c_y|^2 / 2, c_y a center of the class's embeddings, beside the classifier's class center. Wen,
    Zhang, Li and Qiao, ECCV 2016, eqs. 2, 4.

    The mean over the real samples of the global batch, as the classifier's loss is; the paper writes a sum. weight is
    its lambda. Each step moves the centers of the batch's classes by alpha * sum(x_i - c_j) / (1 + n_j), with the
    embeddings x_i of class j that all forwards of the step saw.
    """

    compares: ClassVar[bool] = False
    weight: float = 0.003
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "alpha", 0 <= self.alpha <= 1, "one in [0, 1], the paper's is 0.5")


class FeatureCenters:
    """A center loss with its state: the feature centers (C_r, D) of this rank's classes.

    Initial values are N(0, 1 / D), a function of (seed, class) alone, and not those of the class centers.
    """

    def __init__(
        self, loss: CenterLoss, classes: range, dim: int, *, seed: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.loss, self.classes = loss, classes
        self.value = torch.empty(len(classes), dim, dtype=dtype, device=device)
        initial_centers(classes, dim, seed_for("feature_centers", seed), dim**-0.5, self.value)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps by class."""
        return {"feature_center": self.value}

    def shares(self, x: Tensor, batch: Batch) -> Tensor:
        _, difference = self._differences(x, batch)
        return self.loss.weight / 2 * difference.square().sum(dim=1) / batch.count.clamp_min(1)

    def update(self, x: Tensor, labels: Tensor, real: Tensor) -> None:
        """Moves the centers once, for all samples of the step: x (n, D), labels (n,), real (n,), of all forwards."""
        if not len(self.classes):
            return
        with torch.no_grad():
            batch = Batch.of(labels, real, slice(0, 0))
            row, difference = self._differences(x.double(), batch)
            moves = self.loss.alpha * difference / (1 + batch.alike.unsqueeze(1))
            self.value.index_add_(0, row, moves.to(self.value.dtype))  # zeros for samples of other ranks' classes

    def _differences(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Row of each sample's center (B,) and x - c (B, D); any row and zeros where the class is another rank's."""
        here = batch.real & (batch.labels >= self.classes.start) & (batch.labels < self.classes.stop)
        other = torch.arange(len(x), device=x.device) % max(len(self.classes), 1)  # all at one row would queue on a GPU
        row = torch.where(here, batch.labels - self.classes.start, other)
        center = self.value[row].to(x.dtype) if len(self.classes) else torch.zeros_like(x)
        return row, torch.where(here.unsqueeze(1), x - center, 0)


BY_NAME: dict[str, type[EmbeddingLoss]] = {"center": CenterLoss, "triplet": TripletLoss, "contrastive": ContrastiveLoss}


def build_embedding_loss(name: str, parameters: dict, *, trust_code: bool = False) -> EmbeddingLoss:
    """The loss of a config: head.embedding_losses.<name> and its parameters.

    name: one of BY_NAME, or with trust_code module.Class of a module that can be imported, which runs that module.
    Raises ValueError naming what there is.
    """
    key = f"head.embedding_losses.{name}"
    return fill(choose(BY_NAME, name, "embedding loss", key, EmbeddingLoss, trust_code), name, parameters, key)


# ---- pairs


def _distances(anchors: Tensor, x: Tensor) -> Tensor:
    """Euclidean distances (b, B), without the product form."""
    return torch.cdist(anchors, x, compute_mode="donot_use_mm_for_euclid_dist")


def _chunks(x: Tensor, own: slice) -> Iterator[slice]:
    """The rows `own` in chunks; one at least, which may be empty."""
    size = max(1, PAIR_NUMBERS // x.numel())
    starts = range(own.start, max(own.stop, own.start + 1), size)
    return (slice(start, min(start + size, own.stop)) for start in starts)
