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
    """The targets that this rank owns, in float64; rows of zeros for the others."""

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


def _target_gradient(
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


def target_part(
    margin: Margin,
    scale: float | Tensor | None,
    target: Target,
    psi: Tensor,
    psi_prime: Tensor,
    p_minus_one: Tensor,
    by_embedding: bool,
) -> Tensor:
    """(p_t - 1) times the target logit's derivative by x or by w, (B, D); zeros for targets of other ranks.

    scale: s, learned or not; None for r = |x|.
    """
    ones = torch.ones_like(target.w_length)
    scale = None if scale is None else scale * ones
    x_factor = target.x_length if scale is None else scale
    w_factor = ones if margin.normalize_centers else target.w_length
    curve = (target.cosine, psi, psi_prime)
    if by_embedding:
        derivative = _target_gradient(target.x_hat, target.x_length, target.w_hat, w_factor, scale, *curve)
    else:
        unit_scale = ones if margin.normalize_centers else None
        derivative = _target_gradient(target.w_hat, target.w_length, target.x_hat, x_factor, unit_scale, *curve)
    return torch.where(target.owned.unsqueeze(1), p_minus_one.unsqueeze(1) * derivative, 0)


def regularized(margin: Margin, length: Tensor) -> tuple[Tensor, Tensor]:
    """The margin's regularizer of |x| (B,) and its derivative (B,); zeros where it has none."""
    with torch.enable_grad():
        length = length.detach().requires_grad_()
        term = margin.regularizer(length)
        if term is None:
            return torch.zeros_like(length), torch.zeros_like(length)
        (derivative,) = torch.autograd.grad(term.sum(), length)
    return term.detach(), derivative
