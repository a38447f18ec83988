"""What is done to every entry of a chunk between its matrix products, in place; plain torch, or compiled from the same
source by torch.compile.

Shapes: B samples, c rows of a chunk, D embedding size. Logits are in base 2: exp2 is 4 times as fast as exp in plain
torch on a CPU (0.15 against 0.6 ns an entry with AVX-512).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.head.optimizers import Learned, Optimizer, Rate

LN_2 = 0.6931471805599453
# A shorter center counts as this long: its direction would be noise. Then 2^logit / |w| fits float32 for every s <= 68.
SHORTEST = 1e-8


def _power_of_two(logits: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler vectorizes exp, not exp2: half the time
        return logits.mul_(LN_2).exp_()
    return logits.exp2_()


def weigh(
    logits: Tensor, inverse_norm: Tensor | None, bias: Tensor | None, maximum: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Products xs w (B, c) become 2^(logit - maximum) / |w|, the weights that dX gives to the rows of the chunk.

    inverse_norm (c,), or None where centers are not normalized; bias (c,). maximum (B,) of what came before, or None
    for bounded logits. Returns the sums of 2^(logit - maximum) (B,), and the new maximum.
    """
    if inverse_norm is not None:
        logits.mul_(inverse_norm)
    if bias is not None:
        logits.add_(bias)
    if maximum is not None:
        maximum = torch.maximum(maximum, logits.amax(dim=1))
        logits.sub_(maximum.unsqueeze(1))
    _power_of_two(logits)
    total = logits.sum(dim=1)
    if inverse_norm is not None:
        logits.mul_(inverse_norm)
    return total, maximum


def weigh_again(logits: Tensor, inverse_norm: Tensor | None, bias: Tensor | None, log_z: Tensor) -> None:
    """Products w xs (c, B) become 2^(logit - log_z) / |w|: transposed, since that is what dW multiplies. log_z (B,)."""
    if inverse_norm is not None:
        logits.mul_(inverse_norm.unsqueeze(1))
    if bias is not None:
        logits.add_(bias.unsqueeze(1))
    logits.sub_(log_z)
    _power_of_two(logits)
    if inverse_norm is not None:
        logits.mul_(inverse_norm.unsqueeze(1))


def update(
    optimizer: Optimizer,
    rows: Learned,
    inverse_norm: Tensor | None,
    gradient: Tensor,
    rates: tuple[Rate, ...],
) -> None:
    """The optimizer's step on rows (c, D), in place; inverse_norm (c,) becomes that of the new rows.

    gradient (c, D): by w_hat, divided by |w|; its part along w is taken out here, (g - (g.w_hat) w_hat) / |w|, and the
    weight decay put in, both as one multiple of w. Not normalized centers: the gradient by w.
    """
    weight = rows.value
    if inverse_norm is None:
        if optimizer.coupled_decay:
            gradient = torch.add(gradient, weight, alpha=optimizer.coupled_decay)
    else:
        along = (gradient * weight).sum(dim=1) * inverse_norm * inverse_norm
        gradient = torch.addcmul(gradient, weight, (optimizer.coupled_decay - along).unsqueeze(1))
    optimizer.update(rows, gradient, *rates)
    if inverse_norm is not None:
        inverse_norms(weight, inverse_norm)


def inverse_norms(weight: Tensor, out: Tensor) -> Tensor:
    """1 / |w| of rows (c, D), into `out` (c,)."""
    return torch.linalg.vector_norm(weight, dim=1, out=out).clamp_min_(SHORTEST).reciprocal_()


class Elementwise(NamedTuple):
    weigh: Callable
    weigh_again: Callable
    update: Callable


PLAIN = Elementwise(weigh, weigh_again, update)


@functools.cache
def compiled() -> Elementwise:
    """The same functions through torch.compile, of any chunk length. Nothing is compiled before the first call."""
    # one a combination of dtype, margin kind and optimizer; past the default of 8 the rest would silently run plain
    weigh, weigh_again, update = (torch.compile(part, dynamic=True, recompile_limit=64) for part in PLAIN)

    def update_at(optimizer, rows, inverse_norm, gradient, rates):
        update(optimizer, rows, inverse_norm, gradient, tuple(torch.tensor(r, dtype=torch.float64) for r in rates))

    return Elementwise(weigh, weigh_again, update_at)


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile can compile for this kind of device here; tried once, on one number."""
    try:
        torch.compile(_power_of_two, dynamic=True)(torch.zeros(2, device=device_type))
    except Exception:  # no compiler, no Python headers, no Triton: each has an error of its own
        return False
    return True
