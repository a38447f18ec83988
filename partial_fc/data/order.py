"""Which sample comes when: a pure function of (seed, step), the same for every number of ranks.

Per epoch, for N samples, batches of B and S streams:

    row           the shards permuted, their samples laid end to end, the row rotated by a random distance
    cut           to its first floor(N / B) B samples; what is left out differs each epoch
    streams       S runs of equal length; a shard may straddle two
    windows       each stream is shuffled inside disjoint windows
    batch t       the next B / S samples of every stream, in stream order

A rank takes a contiguous part of the batch: whole streams if S is a multiple of the number of ranks, so that
most shards are read by one rank only.
"""

from dataclasses import dataclass, field

import numpy as np

from partial_fc.seeds import seed_for


@dataclass(frozen=True, eq=False)
class Order:
    """The global batch of any step, in time that does not grow with the step.

    samples_per_shard: (number of shards,) integers, zeros included; samples are numbered shard by shard.
    shuffle_window: how many successive samples of a stream are shuffled among each other.
    Raises ValueError for a batch that does not fit the samples or the streams.
    """

    samples_per_shard: np.ndarray
    global_batch_size: int
    streams: int
    seed: int
    shuffle_window: int
    # Caches of pure functions, for a reader that is ahead and a training loop behind it: the rows of two epochs,
    # and two shuffled windows of each stream.
    _rows: dict[int, tuple[np.ndarray, np.ndarray, int]] = field(default_factory=dict, init=False, repr=False)
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
        return int(np.sum(self.samples_per_shard))

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
        ends, shift, rotation = self._rows[epoch]
        places = (places + rotation) % self.num_samples
        return places + shift[np.searchsorted(ends, places, side="right")]

    def _row(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Where each permuted shard ends in the row, what turns a place in it into a sample, the rotation."""
        random = _random("order", self.seed, epoch)
        counts = np.asarray(self.samples_per_shard, dtype=np.int64)
        shards = random.permutation(len(counts))
        ends = np.cumsum(counts[shards])
        shift = np.cumsum(counts)[shards] - ends
        # Without the rotation a single shard would leave out the same samples in every epoch.
        return ends, shift, int(random.integers(self.num_samples))


def _random(*parts: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed_for(*parts)))
