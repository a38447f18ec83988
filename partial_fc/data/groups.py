"""Batches of K samples of each identity, for losses that compare samples with each other."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from partial_fc.config import Data
from partial_fc.data.order import Order
from partial_fc.data.shards import Index
from partial_fc.seeds import seed_for

MOST_EPOCHS = 1000  # until each sample of a set has come as often as its weight says; weights are rounded to that


@dataclass(frozen=True, eq=False)
class Groups:
    """The global batch of any step: an Order's samples, each followed by K - 1 others of its class.

    anchors: the order of the first ones, B / K a step, which reads the shards as any order does; each sample is one
    once in K epochs. The others are drawn at random from their class, none twice before all have come; a class of
    fewer than K repeats its samples. label: (N,) class of every sample. They come from anywhere in the shards: K - 1
    of K reads are random ones. A pure function of (seed, step) like the Order.
    """

    anchors: Order
    label: np.ndarray
    samples_per_identity: int

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the samples, class by class, and (C + 1,) where each class begins."""
        counts = np.bincount(self.label)
        return np.argsort(self.label, kind="stable"), np.concatenate([[0], np.cumsum(counts)])

    @property
    def global_batch_size(self) -> int:
        return self.anchors.global_batch_size * self.samples_per_identity

    @property
    def num_samples(self) -> int:
        return self.anchors.num_samples

    @property
    def steps_per_epoch(self) -> int:
        return max(self.num_samples // self.global_batch_size, 1)

    def batch(self, step: int) -> np.ndarray:
        """(B,) int64: the sample numbers of the global batch of `step`, K successive ones of a class each."""
        random = np.random.Generator(np.random.Philox(seed_for("groups", self.anchors.seed, step)))
        return np.concatenate([self._group(anchor, random) for anchor in self.anchors.batch(step)])

    def _group(self, anchor: np.int64, random: np.random.Generator) -> np.ndarray:
        samples, starts = self._by_class
        label = self.label[anchor]
        own = samples[starts[label] : starts[label + 1]]
        others = random.permutation(own[own != anchor])[: self.samples_per_identity - 1]
        return np.resize(np.concatenate([[anchor], others]), self.samples_per_identity)


def _weights(settings: Data, index: Index) -> tuple[tuple[int, Fraction], ...] | None:
    """Shards and weight of each set; None where all are 1."""
    if not isinstance(settings.train, list) or all(one.weight == 1 for one in settings.train):
        return None
    several = len(settings.train) > 1
    shards = [one["shards"] for one in index.prepared["sets"]] if several else [len(index.shards)]
    weights = [Fraction(one.weight).limit_denominator(MOST_EPOCHS) for one in settings.train]
    return tuple(zip(shards, weights, strict=True))


def build_order(settings: Data, index: Index, seed: int) -> Order | Groups:
    """The data order that a config asks for. Raises ValueError for a batch that does not fit."""
    k = settings.samples_per_identity
    if settings.global_batch_size % (k * settings.streams):
        raise ValueError(
            f"got a global batch of {settings.global_batch_size} samples, {k} of an identity, and {settings.streams} "
            "streams, wanted a multiple of their product: change data.global_batch_size, data.samples_per_identity or "
            "data.streams"
        )
    order = Order(
        index.samples_per_shard,
        settings.global_batch_size // k,
        settings.streams,
        seed,
        settings.shuffle_window,
        _weights(settings, index),
    )
    return order if k == 1 else Groups(order, index.label, k)
