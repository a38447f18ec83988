"""How well a data order mixes identities: shards in order of identity give batches of few."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from partial_fc.data.groups import Groups
from partial_fc.data.order import Order
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
    first = (order.steps_per_epoch - steps) // 2
    samples = np.concatenate([order.batch(step) for step in range(first, first + steps)])
    of_class = np.bincount(label)
    of_class = of_class[of_class > 0]
    left = 1 - len(samples) / order.num_samples  # the chance that one sample is not among them
    return Mixing(steps, len(np.unique(label[samples])), float((1 - left**of_class).sum()))


def remedies(order: Order | Groups, label: np.ndarray, shard_bytes: int) -> str:
    """What would mix more, how much, and what it costs. shard_bytes: of a plain shard, on average."""
    order = order.anchors if isinstance(order, Groups) else order
    per_shard = order.num_samples / len(order.samples_per_shard)
    ways = []
    for streams, window in (
        (order.global_batch_size, order.shuffle_window),
        (order.streams, 32 * order.shuffle_window),
    ):
        share = mixing(replace(order, streams=streams, shuffle_window=window), label).share
        at_once = min(streams * math.ceil(1 + window / per_shard), len(order.samples_per_shard))
        name = f"data.streams={streams}" if streams != order.streams else f"data.shuffle_window={window}"
        size = size_text(at_once * shard_bytes)
        ways.append(f"{name} gives {min(share, 1):.0%}, and reads {at_once:,} shards of {size} at once")
    return "; ".join(ways)
