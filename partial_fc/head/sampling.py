"""Which negatives a step uses: functions of (seed, step, class), whatever the number of ranks."""

import numpy as np
import torch
from torch import Tensor

from partial_fc.seeds import keyed_bytes

DRAW_BLOCK = 1 << 16  # classes that share one permutation of the negatives' draw


def random_negatives(head, step: int, labels: Tensor) -> Tensor:
    """The default sampler: every class with probability head.sample_rate, whatever the labels."""
    return draw_negatives(head.seed, step, head.classes, head.num_classes, head.sample_rate)


def draw_negatives(seed: int, step: int, classes: range, num_classes: int, sample_rate: float) -> Tensor:
    """The negatives of a step inside `classes`: distinct class ids (n,), int64, in no order.

    Every class is drawn with probability `sample_rate` exactly. Class ids are cut into blocks of 2^16; in each, the
    first floor(rate * size + u) entries of a permutation of its ids are drawn, with u uniform in [0, 1) and both
    keyed by (seed, step, block). So a rank evaluates the blocks that its range touches and nothing else, the cost
    is that of the drawn rows (no sort over C, no random number per class), and neighbouring ids do not share their
    fate.
    """
    drawn = [torch.empty(0, dtype=torch.int64)]
    if len(classes) == 0:
        return drawn[0]
    for block in range(classes.start // DRAW_BLOCK, -(-classes.stop // DRAW_BLOCK)):
        first = block * DRAW_BLOCK
        size = min(DRAW_BLOCK, num_classes - first)
        key = keyed_bytes(24, "negatives", seed, step, block)
        uniform = int.from_bytes(key[:7], "little") / 2**56
        ids = first + _first_of_permutation(int(sample_rate * size + uniform), size, key[8:])
        drawn.append(torch.from_numpy(ids[(ids >= classes.start) & (ids < classes.stop)]))
    return torch.cat(drawn)


def _first_of_permutation(count: int, size: int, key: bytes) -> np.ndarray:
    """The first `count` entries of a keyed permutation of range(size), int64; `size` at most 2^16.

    Four rounds of an odd multiplication and a xor-shift, both bijections of [0, 2^bits). A size that is no power of
    two takes the entries below it in order, which needs the whole of the next power: only the last block is like that.
    """
    bits = max((size - 1).bit_length(), 1)
    mask = (1 << bits) - 1
    whole = size == mask + 1
    x = np.arange(count if whole else mask + 1, dtype=np.int64)
    for multiplier, increment in np.frombuffer(key, dtype=np.uint16).astype(np.int64).reshape(-1, 2):
        x = (x * (multiplier | 1) + increment) & mask
        x ^= x >> ((bits + 1) // 2)
    return x if whole else x[x < size][:count]
