"""partial-fc benchmark index: what an index of millions costs to open, to draw from, and in a reader's memory."""

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np

from partial_fc.data.order import Order
from partial_fc.data.shards import Index, load_index, write_index
from partial_fc.files import sha256_of

BATCHES = 200
T = TypeVar("T")
_BLOCK, _SLOT = 512, 10_240  # bytes of a tar's header, and of a sample with its label
_NAME = 20  # bytes of a sample's source name


def benchmark_index(
    *, samples: int = 42_500_000, classes: int = 2_000_000, shards: int = 4000, batch: int = 4096
) -> dict[str, float]:
    """Writes an index of shards that are nowhere, as of WebFace42M, and opens it. No shard is read.

    Prints and returns `open` (seconds, beyond the checksum of label.npy), `checksum` (seconds of that), `batch` (ms
    that the global batch of a step takes to draw, on average) and `worker` (MB that no file backs, of a process that
    draws batches and looks up where their samples lie, beyond what it was forked with).
    """
    folder = Path(tempfile.mkdtemp(prefix="partial_fc_index_"))
    try:
        _write(folder, samples, classes, shards)
        load_index(folder, check_labels=False)  # what comes after finds the files in the page cache
        index, opened = _timed(lambda: load_index(folder, check_labels=False))
        _, checksum = _timed(lambda: sha256_of(folder / "index" / "label.npy"))
        order = Order(index.samples_per_shard, batch, 8, 0, 8192)
        order.batch(0)
        _, drawn = _timed(lambda: [order.batch(step) for step in range(1, BATCHES + 1)])
        worker = _memory_of_a_worker(index, batch)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {"open": opened, "checksum": checksum, "batch": 1000 * drawn / BATCHES, "worker": worker}
    print(
        f"{samples:,} samples of {classes:,} identities in {shards:,} shards: opened in {opened:.2f} s, and in "
        f"{checksum:.2f} s the checksum of the labels; a batch of {batch:,} drawn in {found['batch']:.2f} ms; "
        f"{worker:.1f} MB of a reader's own"
    )
    return found


def _write(folder: Path, samples: int, classes: int, shards: int) -> None:
    shard = (np.arange(samples, dtype=np.int64) * shards // samples).astype(np.int32)
    counts = np.bincount(shard, minlength=shards)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    offset = _BLOCK + (np.arange(samples, dtype=np.int64) - first[shard]) * _SLOT
    random = np.random.default_rng(0)
    zeros = "0" * 64
    write_index(
        folder,
        [
            {
                "name": f"shard-{i:06d}.tar",
                "bytes": int(count) * _SLOT,
                "sha256": zeros,
                "url": f"https://nowhere.invalid/shard-{i:06d}.tar",
            }
            for i, count in enumerate(counts)
        ],
        {
            "shard": shard,
            "offset": offset,
            "size": np.full(samples, 8000, np.int32),
            "label": random.integers(0, classes, samples),
        },
        {
            "crc32": np.zeros(samples, np.uint32),
            "name": np.full(samples * _NAME, ord("a"), np.uint8),
            "name_offset": np.arange(samples + 1, dtype=np.int64) * _NAME,
        },
        [f"{i:07d}" for i in range(classes)],
        {"kind": "benchmark", "image_size": [112, 112]},
        [],
    )


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return action(), time.perf_counter() - began


def _memory_of_a_worker(index: Index, batch: int) -> float:
    """MB that a forked process has of its own after some batches, beyond what it had."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(index, batch, theirs))
    process.start()
    grown = ours.recv()
    process.join()
    return grown / 1000


def _worker(index: Index, batch: int, connection: Connection) -> None:
    before = _own_kb()
    order = Order(index.samples_per_shard, batch, 8, 0, 8192)
    for step in range(BATCHES):
        samples = order.batch(step)
        for array in (index.shard, index.offset, index.size, index.label, index.crc32):
            array[samples].sum()
    connection.send(_own_kb() - before)


def _own_kb() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
