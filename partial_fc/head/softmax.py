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
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.head.elementwise import Elementwise, Negatives, update
from partial_fc.head.matmul import Precision, matmul_nt, rounded
from partial_fc.head.optimizers import Learned, Optimizer

LOG2_E = 1.4426950408889634
# What e^ may be of, a little less than the dtype allows.
LARGEST = {torch.float32: 87.0, torch.float64: 700.0}
# The largest 1 / Z: samples with negatives stay below e^69, or e^682 in float64. Without, Z is e^(s psi) alone, as
# small as that may be, and what it divides is 0.
LARGEST_INVERSE = {torch.float32: 75.0, torch.float64: 690.0}
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
    """Room for exponentials 2^logit / |w| that a step keeps from its forwards to its update: a budget of bytes.

    It is reserved whole when it is first used; on a CPU only what is written takes memory. What fits depends on this
    step alone: a resumed run keeps the same chunks, and rounds alike.
    """

    def __init__(self, budget: int, dtype: torch.dtype, device: torch.device):
        self._room, self._dtype, self._device = budget // dtype.itemsize, dtype, device
        # bfloat16 has float32's exponents
        self.largest = LARGEST.get(dtype, LARGEST[torch.float32]) if budget else math.inf
        self._flat: Tensor | None = None
        self._used = 0

    def clear(self) -> None:
        """Ends a step."""
        self._used = 0

    def reserve(self, samples: int, rows: int, chunk: int) -> Tensor:
        """A forward's part (samples * n,): n is a multiple of `chunk`, or all its `rows` where they fit."""
        if self._flat is None:
            self._flat = torch.empty(self._room, dtype=self._dtype, device=self._device)
        fit = min(rows, (self._room - self._used) // max(samples, 1))
        size = samples * (fit if fit == rows else fit - fit % chunk)
        self._used += size
        return self._flat[self._used - size : self._used]


class Kept(NamedTuple):
    """A chunk in the cache."""

    exponentials: Tensor  # (c, B) f' 2^(logit - maximum) / |w|, transposed: that is what dW multiplies
    maximum: Tensor | None  # (B,) what was subtracted


@dataclass(frozen=True)
class Way:
    """How a rank goes through its rows."""

    chunk: int
    precision: Precision
    elementwise: Elementwise
    kernels: ModuleType | None  # partial_fc.head.kernels, where they run
    fused: bool  # their exponentials, made where the product is: not in full float32, where the library's are faster

    def chunks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.chunk, rows)) for start in range(0, rows, self.chunk))


def default_chunk(dim: int, device: torch.device, fused: bool = False) -> int:
    """Rows of a chunk: on a CPU as many as its cache likes, 1024 at D >= 256 and 2048 at D <= 128; elsewhere 16384.

    65536 where exponentials are `fused`: a fourth of the launches, which the host has to keep up with, and no float32
    logits, which are 1 GB of 4096 samples.
    """
    if device.type == "cpu":
        return min(max(2**18 // dim, 1024), 2048)
    return 65536 if fused else 16384


class Places(NamedTuple):
    """Where the targets lie in the chunks."""

    chunk: Tensor  # (B,) number of the chunk, -1 where another rank owns the target
    row: Tensor  # (B,) row in that chunk
    first: Tensor  # (B,) first row of the target's class: `row` itself without sub-centers
    column: Tensor  # (B,) row among all rows in use, -1 where another rank owns the target
    sub_centers: int

    @classmethod
    def of(cls, column: Tensor, chunk: int, sub_centers: int = 1) -> "Places":
        """In: the row of each sample's target (B,) among the rows in use; -1 where another rank owns it.

        `chunk` is a multiple of `sub_centers`, so that a class lies in one chunk.
        """
        row = column % chunk
        number = torch.div(column, chunk, rounding_mode="floor")
        return cls(number, row, row - row % sub_centers, column, sub_centers)

    def exclude(self, products: Tensor, number: int, dim: int) -> None:
        """Sets the entries of the targets' classes to -inf in chunk `number`, in place; its rows lie along `dim`."""
        zero = products.new_zeros(())
        mask = torch.where(self.chunk == number, -torch.inf, zero)
        for other in range(self.sub_centers):
            # other samples add 0 to some row: one below the length, which the last chunk may have less of
            row = (self.first + other).clamp_max(products.shape[dim] - 1)
            products.scatter_add_(dim, row.unsqueeze(dim), mask.unsqueeze(dim))

    def add(self, gradient: Tensor, number: int, values: Tensor) -> None:
        """Adds the samples' values (B, ...) to their targets' rows in chunk `number` (c, ...), in place."""
        here = self.chunk == number
        if gradient.is_cuda:  # which samples are here the host would have to read: the others add 0, each elsewhere
            other = torch.arange(len(here), device=here.device) % len(gradient)
            values = torch.where(here.view(-1, *[1] * (values.ndim - 1)), values, values.new_zeros(()))
            gradient.index_add_(0, torch.where(here, self.row, other), values)
        else:
            some = here.nonzero().squeeze(1)
            gradient.index_add_(0, self.row[some], values[some])


def sum_negatives(
    xs: Tensor,
    take: Callable[[slice], Rows],
    count: int,
    places: Places,
    *,
    way: Way,
    bounded: bool,
    negatives: Negatives | None,
    weighted: bool,
    cache: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Kept]]:
    """One pass over the rows in use: this rank's part of the softmax denominator, and of the embedding gradient.

    take(slice) gives a chunk of the `count` rows; `cache` (n B,), where there is one, has room for the first n. Returns
    (maximum, total, mean, kept): the first two (B,) float64, mean (B, D) or None without `weighted`, and what went into
    the cache:

        total_i = sum_j 2^(logit_ij - maximum_i)          over this rank's negatives j
        mean_i  = sum_j f'_ij 2^(logit_ij - maximum_i) n_j w_hat_j

    `bounded` logits, whose 2^logit and its sum stay inside the dtype, have maximum 0. Otherwise the maximum is carried
    online per chunk and everything summed so far is rescaled when it grows (Milakov and Gimelshein, arXiv 1805.02867).
    """
    maximum = None if bounded else torch.full_like(xs[:, 0], LOWEST)
    total = torch.zeros(len(xs), dtype=torch.float64, device=xs.device)
    mean = torch.zeros_like(xs) if weighted else None
    kept: list[Kept] = []
    fused = way.fused and bounded
    operand = rounded(xs, way.precision) if fused else xs
    for number, selected in enumerate(way.chunks(count)):
        rows = take(selected)
        weight, bias = rows.weight.value, rows.scaled_bias
        room = None
        if cache is not None and selected.stop * len(xs) <= len(cache):
            room = cache[selected.start * len(xs) : selected.stop * len(xs)].view(len(weight), len(xs))
        if fused:  # at once what the lines below do one after the other, transposed; straight into the cache if it can
            weight = weight.to(operand.dtype)
            out = room if room is not None and room.dtype == weight.dtype else None
            if out is None and weighted:
                out = weight.new_empty(len(weight), len(xs))
            at = (rows.inverse_norm, places.column, selected.start)
            total += way.kernels.exponentials(weight, operand, *at, out=out, summed=True)
            if mean is not None:
                mean += matmul_nt(out.T, weight.T, way.precision)
            if room is not None:
                kept.append(Kept(out if out is room else room.copy_(out), None))
            continue
        entries = matmul_nt(xs, weight, way.precision)
        places.exclude(entries, number, dim=1)
        part, larger = way.elementwise.exponentials(entries, rows.inverse_norm, bias, maximum, negatives)
        if maximum is not None:
            shrink = torch.exp2(maximum - larger)
            total *= shrink
            if mean is not None:
                mean *= shrink.unsqueeze(1)
            maximum = larger
        total += part
        if mean is not None:
            mean += matmul_nt(entries, weight.T, way.precision)
        if room is not None:
            # transposed and rounded at once is four times as slow
            kept.append(Kept(room.copy_(entries.T if room.dtype == entries.dtype else entries.T.contiguous()), maximum))
    return torch.zeros_like(total) if maximum is None else maximum.double(), total, mean, kept


class Pass:
    """One forward's share of an update: B samples that pull at the rows."""

    def __init__(
        self,
        xs: Tensor,
        coefficient: Tensor,
        log2_z: Tensor,
        places: Places,
        by_center: Tensor,
        by_bias: Tensor,
        kept: list[Kept],
        negatives: Negatives | None,
    ):
        """xs (B, D) without log2(e); coefficient (B,), the derivative of the objective by each sample's loss; log2_z
        (B,) float64; by_center (B, D) and by_bias (B,), gradients by the samples' own targets, zeros for other ranks'.
        """
        self.xs, self.coefficient, self.log2_z = xs, coefficient, log2_z
        self.places, self.by_center, self.by_bias, self.kept = places, by_center, by_bias, kept
        self.negatives = negatives
        self.xs_2 = xs * LOG2_E
        self._operand: Tensor | None = None  # of xs_2, for a fused product
        self._order: Tensor | None = None  # of the samples, by target
        # log Z in two pieces: its rounding to the dtype would shift all probabilities of a sample alike
        self.log2_z_rounded = log2_z.to(xs.dtype)
        self._pull = self._pulled(self.log2_z_rounded)
        self._pull_of_bounded = self._pulled(None) if kept and kept[0].maximum is None else None

    def _pulled(self, maximum: Tensor | None) -> tuple[Tensor, Tensor]:
        """What multiplies 2^(logit - maximum): for rows (D, B), and for the bias (B,).

        Without a maximum 2^-log2_z may be as small as e^-87, and is still a normal number after the coefficient as long
        as log Z < 80, which takes cosines near 1 all over.
        """
        exponent = (-self.log2_z if maximum is None else maximum.double() - self.log2_z) / LOG2_E
        exponent = exponent.clamp_max(LARGEST_INVERSE[self.xs.dtype]) * LOG2_E
        factor = self.coefficient * torch.exp2(exponent).to(self.xs.dtype)
        return (self.xs * factor.unsqueeze(1)).T, factor

    def entries(self, rows: Rows, number: int, way: Way, buffers: Buffers) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Chunk `number`'s exponentials (c, B), from the cache or computed again, and what multiplies them."""
        if number < len(self.kept):
            entries, maximum = self.kept[number]
            as_it_is = entries.dtype == torch.bfloat16 and way.precision == "bfloat16" and rows.bias is None
            if entries.dtype != self.xs.dtype and not as_it_is:
                entries = buffers.get("cached", *entries.shape).copy_(entries)
            return entries, self._pull_of_bounded if maximum is None else self._pulled(maximum)
        if way.fused and rows.inverse_norm is not None and rows.bias is None:
            if self._operand is None:
                self._operand = rounded(self.xs_2, way.precision)
            weight = rows.weight.value.to(self._operand.dtype)
            entries = weight.new_empty(len(weight), len(self.xs_2))
            at = (rows.inverse_norm, self.places.column, number * way.chunk)
            way.kernels.exponentials(weight, self._operand, *at, out=entries, subtract=self.log2_z_rounded)
            return entries, self._pull
        entries = matmul_nt(rows.weight.value, self.xs_2, way.precision)
        self.places.exclude(entries, number, dim=0)
        way.elementwise.probabilities(entries, rows.inverse_norm, rows.scaled_bias, self.log2_z_rounded, self.negatives)
        return entries, self._pull

    def add_targets(self, gradient: Tensor, number: int, way: Way) -> None:
        """Adds the samples' own part to their targets' rows in chunk `number` (c, D), in place."""
        if way.kernels is None:
            self.places.add(gradient, number, self.by_center)
            return
        if self._order is None:
            self._order = self.places.column.argsort(stable=True)
        way.kernels.add_targets(gradient, self.by_center, self._order, self.places.column, number * way.chunk)


def row_gradients(
    rows: Rows, number: int, passes: list[Pass], way: Way, buffers: Buffers
) -> tuple[Tensor, Tensor | None]:
    """The gradient by the rows of chunk `number` (c, D), and by their bias (c,), None without one.

    Negatives: sum_i coefficient_i f'_ij p_ij xs_i, divided by |w| where centers are normalized: what is along w has
    still to be taken out. Targets, each sample's own part, are added to their rows; they have nothing along w then.
    """
    gradient = bias_gradient = None
    for one in passes:
        entries, (by_rows, by_bias) = one.entries(rows, number, way, buffers)
        part = matmul_nt(entries, by_rows, way.precision)
        one.add_targets(part, number, way)
        gradient = part if gradient is None else gradient.add_(part)
        if rows.bias is not None:
            part = torch.mv(entries, by_bias)
            if rows.inverse_norm is not None:
                part /= rows.inverse_norm
            one.places.add(part, number, one.by_bias)
            bias_gradient = part if bias_gradient is None else bias_gradient.add_(part)
    return gradient, bias_gradient


def update_rows(
    optimizer: Optimizer, rows: Rows, gradient: Tensor, bias_gradient: Tensor | None, rates: tuple, way: Way
) -> None:
    """The optimizer's step on a chunk, in place, but for its inverse norms.

    gradient (c, D): where centers are normalized by w_hat, divided by |w|; the rest of the normalization's backward,
    (g - (g.w_hat) w_hat) / |w|, and the weight decay are one multiple of w.
    """
    multiple = None
    if rows.inverse_norm is not None:
        along = torch.linalg.vecdot(gradient, rows.weight.value)
        multiple = optimizer.coupled_decay - along * rows.inverse_norm * rows.inverse_norm
    way.elementwise.update(optimizer, rows.weight, multiple, gradient, rates)
    if rows.bias is not None:
        update(optimizer, rows.bias, None, bias_gradient, rates)
