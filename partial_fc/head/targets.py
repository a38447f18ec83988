"""The targets' side of a step: cosines of samples with their own class centers, and derivatives, in float64.

Near cos = 1 an angular margin's derivative magnifies a cosine's error (float32: 6e-6 at .99, 5e-4 at .9999); these are
B cosines, so their precision costs nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.head.elementwise import SHORTEST
from partial_fc.head.margin import Margin


def unit(vectors: Tensor, shortest: float = 1e-12) -> tuple[Tensor, Tensor]:
    """(B, D) to unit vectors (B, D) and lengths (B, 1), of at least `shortest`; a zero vector stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(shortest)
    return vectors / length, length


class Target(NamedTuple):
    """Samples beside their targets, in float64; w_hat and w_length mean nothing where another rank owns the target."""

    owned: Tensor  # (B,) bool
    x_hat: Tensor  # (B, D)
    w_hat: Tensor  # (B, D)
    x_length: Tensor  # (B, 1) |x|
    w_length: Tensor  # (B, 1) |w|
    cosine: Tensor  # (B,), 0 where not owned
    bias: Tensor  # (B,), likewise


def find_targets(x: Tensor, w: Tensor, bias: Tensor | None, owned: Tensor) -> Target:
    """In: samples (B, D), their class centers (B, D) and biases (B,), which of them this rank owns (B,)."""
    x_hat, x_length = unit(x.double())
    w_hat, w_length = unit(w.double(), SHORTEST)
    cosine = (x_hat * w_hat).sum(dim=1).clamp(-1, 1)
    zero = torch.zeros_like(cosine)
    return Target(
        owned,
        x_hat,
        w_hat,
        x_length,
        w_length,
        torch.where(owned, cosine, zero),
        zero if bias is None else torch.where(owned, bias.double(), zero),
    )


def target_gradients(
    target: Target, by_cosine: Tensor, by_x_length: Tensor, by_w_length: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients by x and by w, (B, D) each, of something whose derivatives by the cosine, |x| and |w| are given.

    Those are (B,), all 0 where another rank owns the target; by_w_length None: it does not depend on |w|.

        by x: by_cosine (w_hat - cos x_hat) / |x| + by_x_length x_hat
        by w: by_cosine (x_hat - cos w_hat) / |w| + by_w_length w_hat
    """

    def by(own: Tensor, own_length: Tensor, other: Tensor, by_own_length: Tensor | None) -> Tensor:
        across = by_cosine.unsqueeze(1) / own_length
        along = -across * target.cosine.unsqueeze(1)
        if by_own_length is not None:
            along += by_own_length.unsqueeze(1)
        return (across * other).addcmul_(along, own)

    return (
        by(target.x_hat, target.x_length, target.w_hat, by_x_length),
        by(target.w_hat, target.w_length, target.x_hat, by_w_length),
    )


def regularized(margin: Margin, length: Tensor) -> tuple[Tensor, Tensor]:
    """The margin's regularizer of |x| (B,) and its derivative (B,); zeros where it has none."""
    with torch.enable_grad():
        length = length.detach().requires_grad_()
        term = margin.regularizer(length)
        if term is None:
            return torch.zeros_like(length), torch.zeros_like(length)
        (derivative,) = torch.autograd.grad(term.sum(), length)
    return term.detach(), derivative
