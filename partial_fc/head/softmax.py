"""The mathematics of one rank: masked logits in chunks, streaming softmax, gradients. No collectives.

Shapes: B global batch, D embedding size, U rows in use on this rank, c rows of a chunk.

    xs      (B, D)   what multiplies the rows: s x_hat, or x itself without feature normalization, times log2(e)
    column  (B,)     the row of each sample's target among the U rows; -1 where another rank owns it
    logits  (B, c)   xs @ w.T / |w| where centers are normalized, else xs @ w.T, plus the bias; in base 2

Sums run over negatives only: a target's entry is set to -inf before 2^logit. Subtracting the target from a full sum
would cancel catastrophically when it dominates.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.head.elementwise import Elementwise
from partial_fc.head.matmul import Precision, matmul_nt
from partial_fc.head.optimizers import Learned

LOG2_E = 1.4426950408889634
# Below every logit that occurs, finite so that differences of maxima stay numbers.
LOWEST = -1e30


class Rows(NamedTuple):
    """Rows of one rank, caught up: parts of the state itself where nothing is sampled, else copies in buffers."""

    weight: Learned  # (c, D)
    bias: Learned | None  # (c,)
    inverse_norm: Tensor | None  # (c,), None where centers are not normalized

    @property
    def scaled_bias(self) -> Tensor | None:
        """In the base 2 of the logits."""
        return None if self.bias is None else self.bias.value * LOG2_E


class Buffers:
    """Scratch tensors that live between steps: allocating (c, D) anew in every chunk costs page faults."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._flat: dict[str, Tensor] = {}
        self._dtype, self._device = dtype, device

    @classmethod
    def like(cls, tensor: Tensor) -> "Buffers":
        return cls(tensor.dtype, tensor.device)

    def get(self, name: str, *shape: int) -> Tensor:
        """An uninitialized tensor of this shape; the next call with the same name reuses its memory."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            self._flat.pop(name, None)  # free the old one before asking for the new
            flat = self._flat[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return flat[:size].view(shape)


class Cache:
    """Room for weights 2^logit / |w| that a step keeps from its forwards to its update, within a budget of bytes."""

    def __init__(self, budget: int, dtype: torch.dtype, device: torch.device):
        self._room = budget // dtype.itemsize
        self._none = torch.empty(0, dtype=dtype, device=device)
        self._blocks: list[Tensor] = []  # one a forward, kept between steps
        self.clear()

    def clear(self) -> None:
        """Ends a step."""
        self._forwards = self._used = 0

    def reserve(self, samples: int, rows: int, chunk: int) -> Tensor:
        """A forward's part (samples * n,): n is a multiple of `chunk`, or all its `rows` where they fit."""
        left = self._room - self._used
        fit = min(rows, left // max(samples, 1))
        size = samples * (fit if fit == rows else fit - fit % chunk)
        if self._forwards == len(self._blocks) or self._blocks[self._forwards].numel() < size:
            del self._blocks[self._forwards :]  # free the old ones before asking for the new
            # rows in use vary by a few percent from step to step
            self._blocks.append(self._none.new_empty(min(size + size // 16, left)))
        block = self._blocks[self._forwards]
        self._forwards += 1
        self._used += block.numel()
        return block[:size]


class Kept(NamedTuple):
    """A chunk in the cache."""

    weights: Tensor  # (B, c) 2^(logit - maximum) / |w|
    maximum: Tensor | None  # (B,) what was subtracted


@dataclass(frozen=True)
class Way:
    """How a rank goes through its rows."""

    chunk: int
    bounded: bool  # 2^logit and its sum stay inside the dtype without a maximum
    precision: Precision
    elementwise: Elementwise

    def chunks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.chunk, rows)) for start in range(0, rows, self.chunk))


def _mask_targets(logits: Tensor, column: Tensor, first: int, dim: int) -> None:
    """Sets the targets' entries to -inf, in place, in a chunk whose first row is `first`.

    Its rows lie along `dim`, the samples, `column` (B,), along the other.
    """
    count = logits.shape[dim]
    here = ((column >= first) & (column < first + count)).unsqueeze(dim)
    index = (column - first).clamp_(0, count - 1).unsqueeze(dim)
    logits.scatter_(dim, index, torch.where(here, -torch.inf, logits.gather(dim, index)))


def sum_negatives(
    xs: Tensor,
    take: Callable[[slice], Rows],
    count: int,
    column: Tensor,
    *,
    way: Way,
    weighted: bool,
    cache: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Kept]]:
    """One pass over the rows in use: this rank's part of the softmax denominator, and of the embedding gradient.

    take(slice) gives a chunk of the `count` rows; `cache` (n B,), where there is one, has room for the first n. Returns
    (maximum, total, mean, kept): the first two (B,) float64, mean (B, D) or None without `weighted`, and what went into
    the cache:

        total_i = sum_j 2^(logit_ij - maximum_i)          over this rank's negatives j
        mean_i  = sum_j 2^(logit_ij - maximum_i) n_j w_hat_j

    Bounded logits have maximum 0. Otherwise the maximum is carried online per chunk and everything summed so far is
    rescaled when it grows (Milakov and Gimelshein, arXiv 1805.02867).
    """
    maximum = None if way.bounded else torch.full_like(xs[:, 0], LOWEST)
    total = torch.zeros(len(xs), dtype=torch.float64, device=xs.device)
    mean = torch.zeros_like(xs) if weighted else None
    kept: list[Kept] = []
    for selected in way.chunks(count):
        rows = take(selected)
        weight, bias = rows.weight.value, rows.scaled_bias
        logits = matmul_nt(xs, weight, way.precision)
        _mask_targets(logits, column, selected.start, dim=1)
        part, larger = way.elementwise.weigh(logits, rows.inverse_norm, bias, maximum)
        if maximum is not None:
            shrink = torch.exp2(maximum - larger)
            total *= shrink
            if mean is not None:
                mean *= shrink.unsqueeze(1)
            maximum = larger
        total += part
        if mean is not None:
            mean += matmul_nt(logits, weight.T, way.precision)
        if cache is not None and selected.stop * len(xs) <= len(cache):
            copy = cache[selected.start * len(xs) : selected.stop * len(xs)].view(logits.shape).copy_(logits)
            kept.append(Kept(copy, maximum))
    return torch.zeros_like(total) if maximum is None else maximum.double(), total, mean, kept


class Pass(NamedTuple):
    """One forward's share of an update: B samples that pull at the rows."""

    xs: Tensor  # (B, D)
    x_pull: Tensor  # (B, D) xs without log2(e), times the derivative of the objective by each sample's loss
    column: Tensor  # (B,)
    log2_z: Tensor  # (B,) float64
    by_center: Tensor  # (B, D) gradient by the sample's own target row; zeros if another rank's
    by_bias: Tensor  # (B,) likewise
    coefficient: Tensor  # (B,) derivative of the objective by each sample's loss
    kept: list[Kept]  # the first chunks' weights


def row_gradients(rows: Rows, selected: slice, passes: list[Pass], way: Way, buffers: Buffers) -> tuple:
    """The gradient by the rows of a chunk (c, D), and by their bias (c,), None without one.

    Negatives: sum_i coefficient_i p_ij xs_i, divided by |w| where centers are normalized: what is along w has still to
    be taken out. Targets, each sample's own part, are added to their rows; they have nothing along w then.
    """
    count = selected.stop - selected.start
    number = selected.start // way.chunk
    gradient = bias_gradient = None
    for one in passes:
        if number < len(one.kept):
            weights = buffers.get("weights", count, len(one.xs)).copy_(one.kept[number].weights.T)
            maximum = one.kept[number].maximum
            log2_z = one.log2_z.neg() if maximum is None else maximum.double() - one.log2_z
            rest = torch.exp2(log2_z).to(weights.dtype)
        else:
            weights = matmul_nt(rows.weight.value, one.xs, way.precision)
            _mask_targets(weights, one.column, selected.start, dim=0)
            # log Z in two pieces: its rounding to the dtype would shift all probabilities of a sample alike
            log2_z = one.log2_z.to(weights.dtype)
            rest = torch.exp2(log2_z.double() - one.log2_z).to(weights.dtype)
            way.elementwise.weigh_again(weights, rows.inverse_norm, rows.scaled_bias, log2_z)
        part = matmul_nt(weights, (one.x_pull * rest.unsqueeze(1)).T, way.precision)
        gradient = part if gradient is None else gradient.add_(part)
        here = (one.column >= selected.start) & (one.column < selected.stop)
        index = torch.where(here, one.column - selected.start, 0)
        gradient.index_add_(0, index, torch.where(here.unsqueeze(1), one.by_center, 0))
        if rows.bias is not None:
            part = torch.mv(weights, one.coefficient * rest)
            if rows.inverse_norm is not None:
                part /= rows.inverse_norm
            part.index_add_(0, index, torch.where(here, one.by_bias, 0))
            bias_gradient = part if bias_gradient is None else bias_gradient.add_(part)
    return gradient, bias_gradient
