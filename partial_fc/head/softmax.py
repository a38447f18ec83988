"""The mathematics of one rank: masked logits in chunks, streaming softmax, gradients. No collectives.

Shapes: B global batch, D embedding size, U rows in use on this rank, c rows of a chunk.

    xs      (B, D)   what multiplies the rows: s x_hat, or x itself without feature normalization
    column  (B,)     the row of each sample's target among the U rows; -1 where another rank owns it
    logits  (B, c)   xs @ w_hat.T where centers are normalized, else xs @ w.T, plus the bias where there is one

Sums run over negatives only: a target's entry is set to -inf before exp. Subtracting the target from a full sum
would cancel catastrophically when it dominates.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Below every logit that occurs, finite so that differences of maxima stay numbers.
LOWEST = -1e30


class Rows(NamedTuple):
    """The rows in use of one rank in a step, caught up. At sample rate 1 these are the state itself."""

    weight: Tensor  # (U, D)
    momentum: Tensor  # (U, D)
    inverse_norm: Tensor | None  # (U,), None where centers are not normalized
    bias: Tensor | None  # (U,)
    bias_momentum: Tensor | None  # (U,)

    def chunk(self, rows: slice) -> "Rows":
        return Rows(*(None if tensor is None else tensor[rows] for tensor in self))


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
            room = size + size // 16  # rows in use vary by a few percent from step to step
            flat = self._flat[name] = torch.empty(room, dtype=self._dtype, device=self._device)
        return flat[:size].view(shape)


def chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk))


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) to unit vectors (B, D) and lengths (B, 1); a zero vector stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1e-12)
    return vectors / length, length


def inverse_norms(weight: Tensor, chunk: int, out: Tensor) -> Tensor:
    """1 / |w| of every row, (U,). Always in the chunks of the update, so that it rounds as the update does."""
    for rows in chunks(len(weight), chunk):
        torch.linalg.vector_norm(weight[rows], dim=1, out=out[rows])
        out[rows].clamp_min_(1e-12).reciprocal_()
    return out


def _unit_rows(part: Rows, buffers: Buffers) -> Tensor:
    """What the samples are multiplied by, (c, D): w_hat in a buffer where centers are normalized, else w itself."""
    if part.inverse_norm is None:
        return part.weight
    return torch.mul(part.weight, part.inverse_norm.unsqueeze(1), out=buffers.get("unit", *part.weight.shape))


def _masked_logits(
    xs: Tensor, unit_rows: Tensor, bias: Tensor | None, column: Tensor, first: int, out: Tensor
) -> Tensor:
    """Logits (B, c) of a chunk whose first row is `first`, -inf at the targets."""
    logits = torch.mm(xs, unit_rows.T, out=out)
    if bias is not None:
        logits += bias
    count = len(unit_rows)
    here = ((column >= first) & (column < first + count)).unsqueeze(1)
    index = (column - first).clamp(0, count - 1).unsqueeze(1)
    return logits.scatter_(1, index, torch.where(here, -torch.inf, logits.gather(1, index)))


def sum_negatives(
    xs: Tensor, rows: Rows, column: Tensor, *, chunk: int, bounded: bool, weighted: bool, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass over the rows in use: this rank's part of the softmax denominator, and of the embedding gradient.

    Returns (maximum, total, mean), the first two (B,) float64, the last (B, D) or None without `weighted`:

        total_i = sum_j exp(logit_ij - maximum_i)          over this rank's negatives j
        mean_i  = sum_j exp(logit_ij - maximum_i) n_j w_hat_j

    `bounded` says that exp(logit) and its sum stay inside the dtype; then maximum is 0. Otherwise the maximum is
    carried online per chunk and everything summed so far is rescaled when it grows (Milakov and Gimelshein, arXiv
    1805.02867).
    """
    maximum = xs.new_zeros(len(xs), dtype=torch.float64)
    if not bounded:
        maximum.fill_(LOWEST)
    total = torch.zeros_like(maximum)
    mean = torch.zeros_like(xs) if weighted else None
    for selected in chunks(len(rows.weight), chunk):
        part = rows.chunk(selected)
        unit_rows = _unit_rows(part, buffers)
        out = buffers.get("logits", len(xs), len(unit_rows))
        logits = _masked_logits(xs, unit_rows, part.bias, column, selected.start, out)
        if not bounded:
            larger = torch.maximum(maximum, logits.amax(dim=1).double())
            shrink = torch.exp(maximum - larger)
            maximum = larger
            total *= shrink
            if mean is not None:
                mean *= shrink.unsqueeze(1).to(mean.dtype)
            logits -= maximum.unsqueeze(1).to(logits.dtype)
        exponentials = logits.exp_()
        total += exponentials.sum(dim=1)
        if mean is not None:
            mean.addmm_(exponentials, unit_rows)
    return maximum, total, mean


class Pass(NamedTuple):
    """One forward's share of an update: B samples that pull at the rows."""

    xs: Tensor  # (B, D)
    column: Tensor  # (B,)
    log_z: Tensor  # (B,) float64
    coefficient: Tensor  # (B,) derivative of the objective by each sample's loss
    by_center: Tensor  # (B, D) gradient by the sample's own target row; zeros if another rank's
    by_bias: Tensor  # (B,) likewise


def row_gradients(part: Rows, first: int, passes: list[Pass], buffers: Buffers) -> tuple[Tensor, Tensor | None]:
    """The gradient by the rows of a chunk (c, D) that starts at row `first`, and by their bias (c,), in buffers.

    Negatives: sum_i coefficient_i p_ij xs_i with p recomputed, through the backward of the row's normalization,
    (g - (g.w_hat) w_hat) / |w|. Targets: each sample's own part, added to its row.
    """
    count, dim = part.weight.shape
    unit_rows = _unit_rows(part, buffers)
    # one row more than the chunk has: it takes what belongs to other chunks
    padded = buffers.get("gradient", count + 1, dim).zero_()
    padded_bias = None if part.bias is None else buffers.get("bias_gradient", count + 1).zero_()
    gradient = padded[:count]
    for one in passes:
        logits = buffers.get("logits", len(one.xs), count)
        _masked_logits(one.xs, unit_rows, part.bias, one.column, first, logits)
        # log Z in two pieces: its rounding to the dtype would shift all probabilities of a sample alike
        log_z = one.log_z.to(logits.dtype)
        rest = torch.exp(log_z.double() - one.log_z).to(logits.dtype)
        probabilities = logits.sub_(log_z.unsqueeze(1)).exp_()
        coefficient = one.coefficient * rest
        gradient.addmm_(probabilities.T, one.xs * coefficient.unsqueeze(1))
        if padded_bias is not None:
            padded_bias[:count] += coefficient @ probabilities
    if part.inverse_norm is not None:
        along = torch.mul(gradient, unit_rows, out=buffers.get("product", count, dim)).sum(dim=1, keepdim=True)
        gradient.addcmul_(unit_rows, along, value=-1).mul_(part.inverse_norm.unsqueeze(1))
    for one in passes:
        here = (one.column >= first) & (one.column < first + count)
        index = torch.where(here, one.column - first, count)
        padded.index_add_(0, index, one.by_center)
        if padded_bias is not None:
            padded_bias.index_add_(0, index, one.by_bias)
    return gradient, None if padded_bias is None else padded_bias[:count]


def update_rows(
    part: Rows,
    gradient: Tensor,
    bias_gradient: Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """torch.optim.SGD's step on a chunk of rows, in place: v = mu v + g + wd w; w = w - lr v; new inverse norms."""
    pairs = [(part.weight, part.momentum, gradient)]
    if part.bias is not None:
        pairs.append((part.bias, part.bias_momentum, bias_gradient))
    for weight, velocity, grad in pairs:
        velocity.mul_(momentum).add_(grad).add_(weight, alpha=weight_decay)
        weight.add_(velocity, alpha=-lr)
    if part.inverse_norm is not None:
        torch.linalg.vector_norm(part.weight, dim=1, out=part.inverse_norm)
        part.inverse_norm.clamp_min_(1e-12).reciprocal_()


class Target(NamedTuple):
    """The targets that this rank owns, in float64; rows of zeros for the others."""

    owned: Tensor  # (B,) bool
    x_hat: Tensor  # (B, D)
    w_hat: Tensor  # (B, D)
    x_length: Tensor  # (B, 1) |x|
    w_length: Tensor  # (B, 1) |w|
    cosine: Tensor  # (B,), 0 where not owned
    bias: Tensor  # (B,), likewise


def find_targets(x: Tensor, rows: Rows, column: Tensor) -> Target:
    """Cosines of the samples (B, D) with their own class centers, in float64.

    Near cos = 1 an angular margin's derivative magnifies a cosine's error (float32: 6e-6 at .99, 5e-4 at .9999);
    these are B cosines, so their precision costs nothing.
    """
    owned = column >= 0
    if len(rows.weight) == 0:
        w = torch.zeros_like(x)
        bias = x.new_zeros(len(x))
    else:
        w = rows.weight[column.clamp_min(0)]
        bias = x.new_zeros(len(x)) if rows.bias is None else rows.bias[column.clamp_min(0)]
    x_hat, x_length = unit(x.double())
    w_hat, w_length = unit(w.double())
    cosine = (x_hat * w_hat).sum(dim=1).clamp(-1, 1)
    zero = torch.zeros_like(cosine)
    return Target(
        owned,
        x_hat,
        w_hat,
        x_length,
        w_length,
        torch.where(owned, cosine, zero),
        torch.where(owned, bias, zero),
    )


def target_gradient(
    own: Tensor,
    own_length: Tensor,
    other: Tensor,
    other_factor: Tensor,
    scale: Tensor | None,
    cosine: Tensor,
    psi: Tensor,
    psi_prime: Tensor,
) -> Tensor:
    """Derivative of the target logit r n psi(cos) by one of its two vectors, (B, D).

    For a vector a = |a| a_hat (`own`, `own_length` (B, 1)) facing b_hat (`other`), with a's factor f_a = `scale`
    (B, 1), or |a| where that is None, and f_b = `other_factor` (B, 1):

        f_b [ psi'(cos) (f_a / |a|) (b_hat - cos a_hat)  +  psi(cos) a_hat   if f_a = |a| ]
    """
    tangent = other - cosine.unsqueeze(1) * own
    if scale is None:
        return other_factor * (psi_prime.unsqueeze(1) * tangent + psi.unsqueeze(1) * own)
    return other_factor * (scale / own_length) * psi_prime.unsqueeze(1) * tangent
