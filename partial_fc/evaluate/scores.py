"""Cosine scores that are exact, so that no number of an evaluation depends on how the work was cut.

A float32 matrix product changes its last bits with the shape of the block, the thread count and the device;
one changed bit moves a score across a threshold, or breaks a tie. Here embeddings are rounded to multiples of
2^-24 (an error of at most 3e-8 an entry, about what float32 itself leaves) and multiplied in float64: a
product is then a multiple of 2^-48, every partial sum is at most 1 and needs 49 of float64's 53 bits. No
addition rounds, so no order of additions matters.
"""

from torch import Tensor

GRID = 2.0**24
LONGEST_NORM = 1.01  # far from 2^5, where partial sums would no longer fit


def on_grid(embeddings: Tensor) -> Tensor:
    """(n, D) normalized embeddings → (n, D) float64 whose inner products are exact in any order.

    Raises ValueError naming the first row that is not finite or not normalized.
    """
    exact = (embeddings.double() * GRID).round_() / GRID
    norm = exact.norm(dim=1)
    wrong = ~((norm > 2 - LONGEST_NORM) & (norm < LONGEST_NORM))  # also true for NaN
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"embedding {row} has norm {norm[row].item():.6g}, wanted 1: normalize the embeddings; "
            "if it is nan, training has diverged"
        )
    return exact
