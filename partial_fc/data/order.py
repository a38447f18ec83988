"""Which sample comes when: a pure function of (seed, step), the same for every number of ranks.

Per epoch, for N samples, batches of B and S streams:

    row           the shards permuted, their samples laid end to end, the row rotated by a random distance
    cut           to its first floor(N / B) B samples; what is left out differs each epoch
    streams       S runs of equal length; a shard may straddle two
    windows       each stream is shuffled inside disjoint windows
    batch t       the next B / S samples of every stream, in stream order

A rank takes a contiguous part of the batch: whole streams if S is a multiple of the number of ranks, so that
most shards are read by one rank only.

Sets of other weights than 1 are rows of other lengths: of weight n + f every shard stands n times in the row, and once
more with a share f of its samples, other ones in each epoch until all have come.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from partial_fc.seeds import seed_for


class _Row(NamedTuple):
    """An epoch's row: shards laid end to end, some of them several times."""

    ends: np.ndarray  # where each ends
    shift: np.ndarray  # what turns a place in it into a sample; of a share, into a place in its set
    rotation: int
    length: int
    shares: tuple[np.ndarray, ...] | None  # per shard p, q, first sample of its set; p = 0 of a whole one
    epoch: int


@dataclass(frozen=True, eq=False)
class Order:
    """The global batch of any step, in time that does not grow with the step.

    samples_per_shard: (number of shards,) integers, zeros included; samples are numbered shard by shard.
    shuffle_window: how many successive samples of a stream are shuffled among each other.
    weights: of each set, in the order of the shards, its number of shards and how often an epoch holds each of its
    samples on average; None: all once. An epoch has the same number of steps always, and N is the sum of weight x
    samples, each rounded down.
    Raises ValueError for a batch that does not fit the samples or the streams.
    """

    samples_per_shard: np.ndarray
    global_batch_size: int
    streams: int
    seed: int
    shuffle_window: int
    weights: tuple[tuple[int, Fraction], ...] | None = None
    # Caches of pure functions, for a reader that is ahead and a training loop behind it: the rows of two epochs,
    # and two shuffled windows of each stream.
    _rows: dict[int, _Row] = field(default_factory=dict, init=False, repr=False)
    _windows: dict[tuple[int, int], tuple[tuple, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.streams < 1 or self.shuffle_window < 1:
            raise ValueError(
                f"got {self.streams} streams and a shuffle window of {self.shuffle_window}, wanted at least "
                "1: change data.streams or data.shuffle_window"
            )
        if self.global_batch_size < 1 or self.global_batch_size % self.streams:
            raise ValueError(
                f"got a global batch of {self.global_batch_size} samples and {self.streams} streams, wanted "
                "a positive multiple of the streams: change data.global_batch_size or data.streams"
            )
        if self.global_batch_size > self.num_samples:
            raise ValueError(
                f"got a global batch of {self.global_batch_size} samples, wanted at most {self.num_samples}, "
                "all there are: lower data.global_batch_size or use more data"
            )

    @property
    def num_samples(self) -> int:
        """Of an epoch, before it is cut to whole batches."""
        if self.weights is None:
            return int(np.sum(self.samples_per_shard))
        return sum(int(weight * int(counts.sum())) for counts, weight in self._sets())

    def _sets(self) -> list[tuple[np.ndarray, Fraction]]:
        """Samples of each shard, and the weight, of every set."""
        bounds = np.cumsum([0, *(shards for shards, _ in self.weights or ())])
        counts = np.asarray(self.samples_per_shard, dtype=np.int64)
        return [
            (counts[first:stop], weight)
            for first, stop, (_, weight) in zip(bounds[:-1], bounds[1:], self.weights or (), strict=True)
        ]

    def weight_of_sets(self) -> list[tuple[int, Fraction]]:
        """Number of samples, and how often an epoch holds each, of every set; without weights all are of one."""
        if self.weights is None:
            return [(self.num_samples, Fraction(1))]
        return [(int(counts.sum()), weight) for counts, weight in self._sets()]

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    def batch(self, step: int) -> np.ndarray:
        """(B,) int64: the sample numbers of the global batch of `step`; steps count on across epochs."""
        if step < 0:
            raise ValueError(f"got step {step}, wanted 0 or more")
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        per_stream = self.global_batch_size // self.streams
        start = step_of_epoch * per_stream
        places = [self._places(epoch, stream, start, start + per_stream) for stream in range(self.streams)]
        return self._samples(epoch, np.concatenate(places))

    def _places(self, epoch: int, stream: int, start: int, stop: int) -> np.ndarray:
        """Where in the epoch's row the samples [start, stop) of the shuffled stream are."""
        length = self.steps_per_epoch * (self.global_batch_size // self.streams)
        pieces = []
        while start < stop:
            window = start // self.shuffle_window
            first = window * self.shuffle_window
            end = min(first + self.shuffle_window, length)
            shuffled = self._shuffled(epoch, stream, window, end - first)
            pieces.append(stream * length + first + shuffled[start - first : min(stop, end) - first])
            start = end
        return np.concatenate(pieces)

    def _shuffled(self, epoch: int, stream: int, window: int, size: int) -> np.ndarray:
        """(size,): the permutation inside a window."""
        place = stream, window % 2
        key, shuffled = self._windows.get(place, (None, None))
        if shuffled is None or key != (epoch, window):
            shuffled = _random("order window", self.seed, epoch, stream, window).permutation(size)
            self._windows[place] = ((epoch, window), shuffled)
        return shuffled

    def _samples(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The sample numbers at `places` of the epoch's row."""
        if epoch not in self._rows:
            while len(self._rows) > 1:
                del self._rows[min(self._rows)]
            self._rows[epoch] = self._row(epoch)
        row = self._rows[epoch]
        places = (places + row.rotation) % row.length
        shards = np.searchsorted(row.ends, places, side="right")
        samples = places + row.shift[shards]
        if row.shares is None:
            return samples
        p, q, first = (of_shard[shards] for of_shard in row.shares)
        part = p > 0
        samples[part] = first[part] + -(-samples[part] * q[part] // p[part]) - 1 - row.epoch
        return samples

    def _row(self, epoch: int) -> _Row:
        random = _random("order", self.seed, epoch)
        if self.weights is None:
            counts = np.asarray(self.samples_per_shard, dtype=np.int64)
            starts, shares = np.cumsum(counts) - counts, None
        else:
            counts, starts, shares = self._weighted(epoch)
        shards = random.permutation(len(counts))
        ends = np.cumsum(counts[shards])
        shift = starts[shards] + counts[shards] - ends
        # Without the rotation a single shard would leave out the same samples in every epoch.
        rotation = int(random.integers(ends[-1]))
        of_row = None if shares is None else tuple(values[shards] for values in shares)
        return _Row(ends, shift, rotation, int(ends[-1]), of_row, epoch)

    def _weighted(self, epoch: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
        """Samples, start and share of every shard that stands in the row, those of several copies several times.

        Of a set with the share f = p / q, sample u is in epoch e where floor((u + 1 + e) f) - floor((u + e) f) is 1:
        once in 1 / f epochs. So of the k-th of a shard whose first sample is a, (u + 1 + e) f is for the first time at
        least k + 1 + floor((a + e) f); a share's start is the right side at k = 0.
        """
        rows: list[tuple[np.ndarray, np.ndarray, int, int, int]] = []
        first = 0
        for counts, weight in self._sets():
            own = np.cumsum(counts) - counts
            whole, share = int(weight), weight - int(weight)
            rows += [(counts, first + own, 0, 1, first)] * whole
            if share:
                p, q = share.numerator, share.denominator
                before = (own + epoch) * p // q
                rows.append(((own + counts + epoch) * p // q - before, before + 1, p, q, first))
            first += int(counts.sum())
        counts, starts = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
        shares = tuple(np.repeat([row[i] for row in rows], [len(row[0]) for row in rows]) for i in (2, 3, 4))
        return counts, starts, shares


def _random(*parts: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed_for(*parts)))
