"""Random numbers for the samples of a batch: functions of (seed, step, forward, place in the batch).

The place counts real samples alone, so that padding and the number of ranks do not matter. All ranks draw all numbers.
"""

import numpy as np
import torch
from torch import Tensor

from partial_fc.head.side_stream import upload
from partial_fc.seeds import keyed_bytes


def _generator(purpose: str, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int.from_bytes(keyed_bytes(16, purpose, *key), "little")))


def _by_place(drawn: np.ndarray, real: Tensor) -> Tensor:
    """Rows of `drawn` (B, ...) in the order of the real samples (B,) bool; padding gets any."""
    return upload(torch.from_numpy(drawn), real.device)[(real.cumsum(0) - 1).clamp_min(0)]


def standard_normal(seed: int, step: int, forward: int, real: Tensor) -> Tensor:
    """(B,) float64."""
    return _by_place(_generator("margin", seed, step, forward).standard_normal(len(real)), real)


def dropout(rate: float, dim: int, dtype: torch.dtype, seed: int, step: int, forward: int, real: Tensor) -> Tensor:
    """(B, dim): 0 with probability `rate`, else 1 / (1 - rate)."""
    drawn = _generator("dropout", seed, step, forward).random((len(real), dim), dtype=np.float32)
    return _by_place(drawn >= rate, real).to(dtype) / (1 - rate)
