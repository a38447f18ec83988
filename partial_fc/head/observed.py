"""What the last batch looked like: cosines and lengths that a forward has anyway, for whoever logs them."""

from typing import NamedTuple

import torch
from torch import Tensor

QUANTILES = (0.1, 0.5, 0.9)


class Observed(NamedTuple):
    """Of a forward's gathered batch, equal on all ranks; (B,) float64 each."""

    cosine: Tensor  # of a sample with its own class center
    center_length: Tensor  # |w| of that
    embedding_length: Tensor  # |x|
    real: Tensor  # bool: not padding

    def mean_cosine(self) -> Tensor:
        """() the mean target cosine; 0 for a batch of none."""
        return torch.where(self.real, self.cosine, 0).sum() / self.real.sum().clamp_min(1)

    def numbers(self) -> dict[str, float]:
        """Means, and quantiles of the target cosine, by name; NaN for a batch of none. Waits for them, once."""
        cosine, *lengths = (values[self.real] for values in self[:3])
        if not len(cosine):
            cosine, lengths = cosine.new_full((1,), torch.nan), [cosine.new_full((1,), torch.nan)] * 2
        quantiles = torch.quantile(cosine, cosine.new_tensor(QUANTILES))
        means = torch.stack([cosine.mean(), *(length.mean() for length in lengths)])
        names = [
            "target_cosine",
            "center_norm",
            "embedding_norm",
            *(f"target_cosine_q{q * 100:.0f}" for q in QUANTILES),
        ]
        return dict(zip(names, torch.cat([means, quantiles]).tolist(), strict=True))
