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

from partial_fc.head.margin import Margin
from partial_fc.head.optimizers import Learned, Optimizer, Rate

LN_2 = 0.6931471805599453
# A shorter center counts as this long, as target too. Then 2^logit / |w| fits float32 for every s <= 68.
SHORTEST = 1e-8


def _power_of_two(logits: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler vectorizes exp, not exp2: half the time
        return logits.mul_(LN_2).exp_()
    return logits.exp2_()


class Negatives(NamedTuple):
    """What a margin does to the logits of negatives; there is none where it leaves them as they are."""

    margin: Margin
    scale: float | Tensor  # s log2(e)
    psi: Tensor  # (B,) f of the targets
    statistics: dict[str, Tensor]

    @classmethod
    def of(
        cls, margin: Margin, scale: float | Tensor, psi: Tensor, statistics: dict[str, Tensor]
    ) -> "Negatives | None":
        return cls(margin, scale, psi, statistics) if margin.changes_negatives else None

    def change(self, logits: Tensor, dim: int) -> Tensor | None:
        """Logits s cos (B, c), or (c, B), the rows along `dim`, become s f(cos), in place. Returns f', None where 1."""
        if self.margin.sub_centers > 1:  # of each class the first of the largest stays
            groups = logits.unflatten(dim, (-1, self.margin.sub_centers))
            largest, index = groups.max(dim=dim + 1, keepdim=True)
            groups.fill_(-torch.inf).scatter_(dim + 1, index, largest)
        slope = None
        threshold = self.margin.interclass_filtering_threshold
        if self.margin.reweights or threshold is not None:
            cosine = logits / self.scale
            if self.margin.reweights:
                f, slope = self.margin.negatives(cosine, self.psi.unsqueeze(dim), self.statistics)
                torch.mul(f, self.scale, out=logits)
            if threshold is not None:
                logits.masked_fill_(cosine > threshold, -torch.inf)
        return slope


def exponentials(
    products: Tensor,
    inverse_norm: Tensor | None,
    bias: Tensor | None,
    maximum: Tensor | None,
    negatives: Negatives | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Products xs w (B, c) become f' 2^(logit - maximum) / |w|, in place: what dX multiplies the chunk's rows with.

    inverse_norm (c,), or None where centers are not normalized; bias (c,). maximum (B,) of what came before, or None
    for bounded logits. Returns the sums of 2^(logit - maximum) (B,), and the new maximum.
    """
    if inverse_norm is not None:
        products.mul_(inverse_norm)
    if bias is not None:
        products.add_(bias)
    slope = None if negatives is None else negatives.change(products, dim=1)
    if maximum is not None:
        maximum = torch.maximum(maximum, products.amax(dim=1))
        products.sub_(maximum.unsqueeze(1))
    _power_of_two(products)
    total = products.sum(dim=1)
    if slope is not None:
        products.mul_(slope)
    if inverse_norm is not None:
        products.mul_(inverse_norm)
    return total, maximum


def probabilities(
    products: Tensor,
    inverse_norm: Tensor | None,
    bias: Tensor | None,
    log2_z: Tensor,
    negatives: Negatives | None = None,
) -> None:
    """Products w xs (c, B) become f' 2^(logit - log2_z) / |w|, in place: transposed, as dW needs it. log2_z (B,)."""
    if inverse_norm is not None:
        products.mul_(inverse_norm.unsqueeze(1))
    if bias is not None:
        products.add_(bias.unsqueeze(1))
    slope = None if negatives is None else negatives.change(products, dim=0)
    products.sub_(log2_z)
    if negatives is not None:  # rounded another way, a negative may be filtered here and not in the forward: p <= 1
        products.clamp_max_(0)
    _power_of_two(products)
    if slope is not None:
        products.mul_(slope)
    if inverse_norm is not None:
        products.mul_(inverse_norm.unsqueeze(1))


def update(
    optimizer: Optimizer, rows: Learned, multiple: Tensor | None, gradient: Tensor, rates: tuple[Rate, ...]
) -> None:
    """The optimizer's step on rows (c, D) or (c,), in place, with `gradient` + multiple (c,) times the rows.

    `multiple` takes out of a gradient what is along w, and puts the weight decay in; None: the weight decay alone.
    """
    value = rows.value
    if multiple is not None:
        gradient = torch.addcmul(gradient, value, multiple.unsqueeze(1))
    elif optimizer.coupled_decay:
        gradient = torch.add(gradient, value, alpha=optimizer.coupled_decay)
    optimizer.update(rows, gradient, *rates)


def inverse_norms(weight: Tensor, out: Tensor) -> Tensor:
    """1 / |w| of rows (c, D), into `out` (c,)."""
    return torch.linalg.vector_norm(weight, dim=1, out=out).clamp_min_(SHORTEST).reciprocal_()


class Elementwise(NamedTuple):
    exponentials: Callable
    probabilities: Callable
    update: Callable


PLAIN = Elementwise(exponentials, probabilities, update)


@functools.cache
def compiled() -> Elementwise:
    """The same functions through torch.compile, of any chunk length. Nothing is compiled before the first call."""
    # one a combination of dtype, margin kind and optimizer; past the default of 8 the rest would silently run plain
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    functions = [torch.compile(part, dynamic=True) for part in PLAIN]

    def update_at(optimizer, rows, multiple, gradient, rates):
        functions[2](optimizer, rows, multiple, gradient, tuple(torch.tensor(r, dtype=torch.float64) for r in rates))

    return Elementwise(functions[0], functions[1], update_at)


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile can compile for this kind of device here; tried once, on one number."""
    try:
        torch.compile(_power_of_two, dynamic=True)(torch.zeros(2, device=device_type))
    except Exception:  # no compiler, no Python headers, no Triton: each has an error of its own
        return False
    return True
