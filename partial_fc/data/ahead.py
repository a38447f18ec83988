"""Shards that later batches need, in the cache before they are asked for."""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from partial_fc.data.order import Order
from partial_fc.data.shards import Index

FETCHERS = 4  # threads of a reader; a shard each


def upcoming(
    order: Order, shard: np.ndarray, own: slice, steps: range, most: int, behind: int = 0
) -> Iterator[list[int]]:
    """For each step the shards that come into view with it, in the order in which they are needed.

    In view is what the steps up to one shuffle window ahead need, since a stream opens the shards of its next window
    all at once; what the last `behind` steps needed, which may not be read yet; and at most `most` shards. shard: (N,)
    of each sample; own: this rank's part of a global batch.
    """
    later = replace(order)  # which keeps its own windows
    horizon = -(-order.shuffle_window * order.streams // order.global_batch_size)
    needed: dict[int, int] = {}  # shard → the last step seen to need it
    seen = steps.start
    for step in steps:
        new = []
        while seen < min(step + horizon + 1, steps.stop):
            needed = {one: last for one, last in needed.items() if last >= step - behind}
            found = dict.fromkeys(shard[later.batch(seen)[own]].tolist())
            if needed and len(needed.keys() | found.keys()) > most:
                break
            new += [one for one in found if one not in needed]
            needed |= dict.fromkeys(found, seen)
            seen += 1
        yield new


@dataclass
class Fetcher:
    """Brings shards into the cache, in the background. An error is left to whoever reads the shard."""

    index: Index
    _shards: queue.SimpleQueue | None = None  # made in the process that fetches

    def ask(self, shards: Sequence[int]) -> None:
        if not shards:
            return
        if self._shards is None:
            self._shards = queue.SimpleQueue()
            for _ in range(FETCHERS):
                # daemons: no process waits for them at its end
                threading.Thread(target=self._fetch, args=(self._shards,), daemon=True).start()
        for shard in shards:
            self._shards.put(shard)

    def stop(self) -> None:
        """Nothing more is begun."""
        if self._shards is not None:
            with suppress(queue.Empty):
                while True:
                    self._shards.get_nowait()
            for _ in range(FETCHERS):
                self._shards.put(None)

    def _fetch(self, shards: queue.SimpleQueue) -> None:
        while (shard := shards.get()) is not None:
            with suppress(OSError, ValueError):
                os.close(self.index.open_shard(shard))  # of one that is there: used, so that it stays
