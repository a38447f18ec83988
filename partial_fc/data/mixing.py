"""How well a data order mixes identities: shards in order of identity give batches of few."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from partial_fc.data.description import Shard
from partial_fc.data.groups import Groups
from partial_fc.data.order import Order
from partial_fc.data.remote import Cache
from partial_fc.memory import size_text

STEPS = 128  # successive batches
LEAST = 0.5  # of what shuffled samples give; below, a softmax sees too few negatives that are new


class Mixing(NamedTuple):
    steps: int
    """Successive batches, from the middle of the first epoch."""
    identities: int
    """Different ones in these batches."""
    random: float
    """How many there would be on average if the samples came in random order."""

    @property
    def share(self) -> float:
        return self.identities / self.random

    def said(self) -> str:
        return (
            f"{self.steps} successive batches hold {self.identities:,} identities, {min(self.share, 1):.0%} of what "
            "shuffled samples would"
        )


def mixing(order: Order | Groups, label: np.ndarray) -> Mixing:
    """Counts them. label: (N,) class of every sample. Reads no shard."""
    order = order.anchors if isinstance(order, Groups) else order
    steps = min(STEPS, order.steps_per_epoch)
    middle = (order.steps_per_epoch - steps) // 2
    samples = np.concatenate([order.batch(step) for step in range(middle, middle + steps)])
    # A sample of weight n + f is n times in an epoch, and once more with chance f.
    left = max(1 - len(samples) / order.num_samples, 1e-300)
    missing, first = np.zeros(int(label.max()) + 1), 0  # of each class, log of the chance that none of it is there
    for count, weight in order.weight_of_sets():
        times, once_more = divmod(float(weight), 1)
        of_class = np.bincount(label[first : first + count], minlength=len(missing))
        missing += of_class * (times * math.log(left) + math.log1p(-once_more * (1 - left)))
        first += count
    return Mixing(steps, len(np.unique(label[samples])), float(-np.expm1(missing).sum()))


def shards_at_once(order: Order, windows: int = 1) -> int:
    """How many shards so many shuffle windows of all streams lie in, at most."""
    per_shard = order.num_samples / len(order.samples_per_shard)
    return min(order.streams * math.ceil(1 + windows * order.shuffle_window / per_shard), len(order.samples_per_shard))


def too_small(order: Order | Groups, shards: Sequence[Shard], cache: Cache) -> str:
    """What to say of a cache that copies of two windows do not fit into; empty where they do, or none is needed."""
    order = order.anchors if isinstance(order, Groups) else order
    copied = [shard.plain_bytes for shard in shards if shard.copied]
    if not copied:
        return ""
    wanted, most_bytes = min(shards_at_once(order, windows=2), len(copied)) * max(copied), cache.limit()
    if wanted <= most_bytes:
        return ""
    return (
        f"warning: the cache may hold {size_text(most_bytes)}, and two shuffle windows lie in shards of "
        f"{size_text(wanted)}: shards are fetched more than once an epoch; raise data.cache_bytes, or lower "
        "data.shuffle_window or data.streams"
    )


def remedies(order: Order | Groups, label: np.ndarray, shard_bytes: int) -> str:
    """What would mix more, how much, and what it costs. shard_bytes: of a plain shard, on average."""
    order = order.anchors if isinstance(order, Groups) else order
    ways = []
    for streams, window in (
        (order.global_batch_size, order.shuffle_window),
        (order.streams, 32 * order.shuffle_window),
    ):
        other = replace(order, streams=streams, shuffle_window=window)
        share, at_once = mixing(other, label).share, shards_at_once(other)
        name = f"data.streams={streams}" if streams != order.streams else f"data.shuffle_window={window}"
        size = size_text(at_once * shard_bytes)
        ways.append(f"{name} gives {min(share, 1):.0%}, and reads {at_once:,} shards of {size} at once")
    return "; ".join(ways)
