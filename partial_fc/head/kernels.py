"""Kernels for CUDA devices, by Triton, which torch brings there: what torch.compile cannot fuse with a matrix product.

A step in TF32 or bf16 is bound by memory, not by products, once logits are written and read: 1024 samples and 10^6
classes have 4 GB of them. Here a product's tile becomes exponentials before it leaves the chip. The tiles' sizes are
fixed, never tuned by timing, so that a resumed run rounds alike. Triton launches on the current device, hence
`device_of`.

Shapes: B samples, c rows of a chunk, D embedding size.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_fc.head.elementwise import SHORTEST
from partial_fc.head.optimizers import SGD, Learned


class Tile(NamedTuple):
    """What a program of `exponentials` has in hand: the fastest of a dozen on an H100, at D = 512 and B = 1024."""

    rows: int
    samples: int
    dim: int
    warps: int


def run_on(device: torch.device) -> bool:
    """Whether they are for this device: TF32 and bfloat16 came with NVIDIA's compute capability 8.0.

    Measured and tested on 9.0 alone.
    """
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


TILES = {torch.bfloat16: Tile(128, 256, 64, warps=8), torch.float32: Tile(128, 128, 32, warps=4)}


@triton.jit
def _round_to_tf32(x):
    # the product cuts 13 bits off, which makes every cosine smaller: to nearest, ties away from 0
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _exponentials(
    weight,  # (c, D)
    xs,  # (B, D)
    inverse_norm,  # (c,)
    column,  # (B,) int64: the target's row among all rows in use
    subtract,  # (B,)
    out,  # (c, B)
    sums,  # (tiles of rows, B)
    rows,
    samples,
    dim,
    first,  # the chunk's first row among all rows in use
    SUBTRACT: tl.constexpr,
    STORE: tl.constexpr,
    SUM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # neighbours share a tile of the weight, which is large; all samples stay in the L2 cache anyway
    tiles = tl.cdiv(samples, BLOCK_SAMPLES)
    tile = tl.program_id(0) // tiles
    i = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = (tl.program_id(0) % tiles) * BLOCK_SAMPLES + tl.arange(0, BLOCK_SAMPLES)
    k = tl.arange(0, BLOCK_DIM)
    # rows and samples past the end repeat the last one, and are not stored
    w_at = weight + tl.minimum(i, rows - 1).to(tl.int64)[:, None] * dim + k[None, :]
    x_at = xs + tl.minimum(j, samples - 1).to(tl.int64)[None, :] * dim + k[:, None]
    logits = tl.zeros((BLOCK_ROWS, BLOCK_SAMPLES), dtype=tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        if EVEN:
            w, x = tl.load(w_at), tl.load(x_at)
        else:
            inside = start + k < dim
            w, x = tl.load(w_at, mask=inside[None, :], other=0.0), tl.load(x_at, mask=inside[:, None], other=0.0)
        if x.dtype == tl.float32:
            w = _round_to_tf32(w)
        logits = tl.dot(w, x, logits, input_precision="tf32")
        w_at += BLOCK_DIM
        x_at += BLOCK_DIM
    norm = tl.load(inverse_norm + i, mask=i < rows, other=0.0)[:, None]
    logits *= norm
    if SUBTRACT:
        logits -= tl.load(subtract + j, mask=j < samples, other=0.0)[None, :]
    value = tl.exp2(logits)
    target = tl.load(column + j, mask=j < samples, other=-1)[None, :]
    value = tl.where((first + i)[:, None] == target, 0.0, value)
    if SUM:
        sums_of_tile = tl.sum(tl.where((i < rows)[:, None], value, 0.0), axis=0)
        tl.store(sums + tile.to(tl.int64) * samples + j, sums_of_tile, mask=j < samples)
    if STORE:
        at = out + i.to(tl.int64)[:, None] * samples + j[None, :]
        tl.store(at, (value * norm).to(out.dtype.element_ty), mask=(i < rows)[:, None] & (j < samples)[None, :])


def exponentials(
    weight: Tensor,
    xs: Tensor,
    inverse_norm: Tensor,
    column: Tensor,
    first: int,
    *,
    out: Tensor | None,
    subtract: Tensor | None = None,
    summed: bool = False,
) -> Tensor | None:
    """2^(xs w / |w| - subtract) / |w| into `out` (c, B), 0 at the targets; its sums without 1 / |w|, (B,) float64.

    weight (c, D) and xs (B, D), both float32, whose product is then TF32, or both bfloat16; sums are float32.
    inverse_norm (c,), subtract (B,) or None. column (B,): the targets' rows; the chunk's are `first` to first + c.
    out: contiguous, float32 or bfloat16; None: the sums alone. The sums are of tiles first, in a fixed order.
    """
    (rows, dim), samples = weight.shape, len(xs)
    tile = TILES[weight.dtype]
    tiles = triton.cdiv(rows, tile.rows)
    sums = torch.empty(tiles, samples, device=xs.device) if summed else None
    if rows and samples:
        with torch.cuda.device_of(weight):
            _exponentials[(tiles * triton.cdiv(samples, tile.samples),)](
                weight,
                xs,
                inverse_norm,
                column,
                xs if subtract is None else subtract,
                xs if out is None else out,
                xs if sums is None else sums,
                rows,
                samples,
                dim,
                first,
                SUBTRACT=subtract is not None,
                STORE=out is not None,
                SUM=summed,
                EVEN=dim % tile.dim == 0,
                BLOCK_ROWS=tile.rows,
                BLOCK_SAMPLES=tile.samples,
                BLOCK_DIM=tile.dim,
                num_warps=tile.warps,
                num_stages=_stages(tile, weight.element_size(), weight.device),
            )
    return None if sums is None else sums.sum(dim=0, dtype=torch.float64)


@functools.cache
def _stages(tile: Tile, itemsize: int, device: torch.device) -> int:
    """Tiles of both operands that are loaded ahead: 4, or what a multiprocessor's shared memory holds."""
    if device.type == "cpu":
        return 1
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return max(min(room // ((tile.rows + tile.samples) * tile.dim * itemsize), 4), 1)


@triton.jit
def _inverse_norm(w, shortest):
    # a center that is no number any more must make the loss one that is none: the step is then skipped
    length = tl.maximum(tl.sqrt(tl.sum(w * w, axis=1)), shortest, propagate_nan=tl.PropagateNan.ALL)
    return 1 / length


@triton.jit
def _inverse_norms(weight, out, rows, dim, shortest, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_DIM)
    inside = (i < rows)[:, None] & (k < dim)[None, :]
    w = tl.load(weight + i.to(tl.int64)[:, None] * dim + k[None, :], mask=inside, other=0.0)
    tl.store(out + i, _inverse_norm(w, shortest), mask=i < rows)


def inverse_norms(weight: Tensor, out: Tensor) -> None:
    """1 / |w| of rows (c, D), into `out` (c,): the bits that `sgd` leaves there, for a head that goes on."""
    rows, dim = weight.shape
    block_rows, block_dim = _block(dim)
    if rows:
        with torch.cuda.device_of(weight):
            _inverse_norms[(triton.cdiv(rows, block_rows),)](
                weight, out, rows, dim, SHORTEST, BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, num_warps=4
            )


@triton.jit
def _add_targets(
    gradient,  # (c, D)
    by_center,  # (B, D)
    order,  # (B,) int64: samples by their target's row
    column,  # (B,) int64: the target's row among all rows in use
    rows,
    samples,
    dim,
    first,
    BLOCK_DIM: tl.constexpr,
):
    place = tl.program_id(0)
    sample = tl.load(order + place)
    target = tl.load(column + sample)
    row = target - first
    before = tl.load(column + tl.load(order + place - 1, mask=place > 0, other=0))
    if (row >= 0) & (row < rows) & ((place == 0) | (before != target)):  # the first of those with this target
        k = tl.arange(0, BLOCK_DIM)
        total = tl.load(gradient + row * dim + k, mask=k < dim, other=0.0)
        more = True
        while more:
            total += tl.load(by_center + sample * dim + k, mask=k < dim, other=0.0)
            place += 1
            sample = tl.load(order + place, mask=place < samples, other=0)
            more = (place < samples) & (tl.load(column + sample) == target)
        tl.store(gradient + row * dim + k, total, mask=k < dim)


def add_targets(gradient: Tensor, by_center: Tensor, order: Tensor, column: Tensor, first: int) -> None:
    """Adds by_center (B, D) to the rows of their targets in `gradient` (c, D), in place and in one fixed order.

    order (B,) sorts column (B,), stably; the chunk's rows are `first` to first + c.
    """
    rows, dim = gradient.shape
    if rows and len(column):
        with torch.cuda.device_of(gradient):
            _add_targets[(len(column),)](
                gradient,
                by_center,
                order,
                column,
                rows,
                len(column),
                dim,
                first,
                BLOCK_DIM=triton.next_power_of_2(dim),
                num_warps=4,
            )


@triton.jit
def _take(
    ids,  # (c,) int64
    weight,  # (C_r, D)
    velocity,  # (C_r, D)
    missed,  # 4 rows, of `stride` numbers, of which the first c are these rows'
    out,  # (c, D)
    out_velocity,  # (c, D)
    out_inverse_norm,  # (c,)
    rows,
    dim,
    stride,
    shortest,
    VELOCITY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_DIM)
    inside = (i < rows)[:, None] & (k < dim)[None, :]
    at = tl.load(ids + i, mask=i < rows, other=0)[:, None] * dim + k[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
    v = tl.load(velocity + at, mask=inside, other=0.0)
    w_of_w = tl.load(missed + i, mask=i < rows, other=0.0)[:, None]
    w_of_v = tl.load(missed + stride + i, mask=i < rows, other=0.0)[:, None]
    now = w_of_w * w + w_of_v * v
    to = i.to(tl.int64)[:, None] * dim + k[None, :]
    tl.store(out + to, now, mask=inside)
    tl.store(out_inverse_norm + i, _inverse_norm(now, shortest), mask=i < rows)
    if VELOCITY:
        v_of_w = tl.load(missed + 2 * stride + i, mask=i < rows, other=0.0)[:, None]
        v_of_v = tl.load(missed + 3 * stride + i, mask=i < rows, other=0.0)[:, None]
        tl.store(out_velocity + to, v_of_w * w + v_of_v * v, mask=inside)


def take(
    learned: Learned, ids: Tensor, missed: Tensor, out: Tensor, out_velocity: Tensor | None, out_inverse_norm: Tensor
) -> None:
    """Rows `ids` (c,) of `learned` (C_r, D), caught up by missed (4, c), and 1 / |w| (c,), in one pass over them."""
    weight, (velocity,) = learned.value, learned.moments
    rows, dim = out.shape
    block_rows, block_dim = _block(dim)
    if rows:
        with torch.cuda.device_of(weight):
            _take[(triton.cdiv(rows, block_rows),)](
                ids,
                weight,
                velocity,
                missed,
                out,
                out if out_velocity is None else out_velocity,
                out_inverse_norm,
                rows,
                dim,
                missed.stride(0),
                SHORTEST,
                VELOCITY=out_velocity is not None,
                BLOCK_ROWS=block_rows,
                BLOCK_DIM=block_dim,
                num_warps=4,
            )


def _block(dim: int) -> tuple[int, int]:
    """Rows and numbers of each that a program has in hand."""
    block_dim = triton.next_power_of_2(dim)
    return max(2048 // block_dim, 1), block_dim


@triton.jit
def _sgd(
    gradient,  # (c, D)
    weight,  # (c, D)
    velocity,  # (c, D)
    inverse_norm,  # (c,)
    rows,
    dim,
    lr,
    momentum,
    weight_decay,
    shortest,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_DIM)
    at = i.to(tl.int64)[:, None] * dim + k[None, :]
    inside = (i < rows)[:, None] & (k < dim)[None, :]
    g = tl.load(gradient + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0)
    v = tl.load(velocity + at, mask=inside, other=0.0)
    norm = tl.load(inverse_norm + i, mask=i < rows, other=0.0)
    multiple = weight_decay - tl.sum(g * w, axis=1) * norm * norm
    v = momentum * v + g + multiple[:, None] * w
    w -= lr * v
    tl.store(velocity + at, v, mask=inside)
    tl.store(weight + at, w, mask=inside)
    tl.store(inverse_norm + i, _inverse_norm(w, shortest), mask=i < rows)


def sgd(optimizer: SGD, learned: Learned, inverse_norm: Tensor, gradient: Tensor, lr: float) -> None:
    """The optimizer's step on normalized rows (c, D), in place, in one pass; see softmax.update_rows.

    inverse_norm (c,), 1 / |w|, in place too; gradient (c, D).
    """
    weight, (velocity,) = learned.value, learned.moments
    rows, dim = weight.shape
    block_rows, block_dim = _block(dim)
    if rows:
        with torch.cuda.device_of(gradient):
            _sgd[(triton.cdiv(rows, block_rows),)](
                gradient,
                weight,
                velocity,
                inverse_norm,
                rows,
                dim,
                lr,
                optimizer.momentum,
                optimizer.weight_decay,
                SHORTEST,
                BLOCK_ROWS=block_rows,
                BLOCK_DIM=block_dim,
                num_warps=4,
            )
