"""Reads, decodes and augments the samples that the order asks for: index and order in, batches out.

A batch is a pure function of (seed, step, rank, world size), and nothing but open files is kept from one to
the next. So the number of workers changes nothing, and a run resumes at any step at no cost.

    b samples of this rank in a batch; H, W height and width of the images
"""

import atexit
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from partial_fc import storage
from partial_fc.config import Affine
from partial_fc.data.ahead import Fetcher, upcoming
from partial_fc.data.augment import augment
from partial_fc.data.groups import Groups
from partial_fc.data.order import Order
from partial_fc.data.pixels import decode, decode_by_opencv
from partial_fc.data.remote import Fetches, used
from partial_fc.data.shards import Index
from partial_fc.opencv import cv2
from partial_fc.parallel.distributed import local_world_size, part
from partial_fc.seeds import seed_for

RETRY_SECONDS = (0.1, 1.0, 5.0)  # pauses before another try to read: network file systems have short outages
FEW_STEPS = 200  # a run of so few reads samples alone where their shards have SPARSE times as many
SPARSE = 8
MAX_OPEN_SHARDS = 64  # a worker; common limits are 1,024 files a process
SHARED_MEMORY = Path("/dev/shm")  # where readers put their batches
MORE_SHARED_MEMORY = "docker run --shm-size, or an emptyDir of medium Memory in Kubernetes"


class ReadError(RuntimeError):
    """A batch cannot be read, or not be handed over by a reader process."""


class Batch(NamedTuple):
    images: Tensor
    """(b, 3, H, W) uint8, RGB; b is `planned` less the bad samples, and may be 0."""
    labels: Tensor
    """(b,) int64"""
    step: int
    planned: int
    """Samples of the global batch that are this rank's."""
    bad: list[str]
    """Of each sample that was left out the key, its source name, and what is wrong with it."""
    fetches: Fetches = Fetches()
    """What its reader has asked the cache for since its last batch."""


def loader(
    index: Index,
    order: Order | Groups,
    *,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    workers: int,
    prefetch: int,
    flip: bool,
    affine: Affine | None,
    pin_memory: bool = False,
) -> Iterable[Batch]:
    """This rank's part of the global batches of steps [start_step, stop_step), in turn.

    workers: processes that read ahead; 0 reads in this process. prefetch: batches that a worker has ready.
    Iterating raises ReadError naming shard and offset if a sample cannot be read; and if a worker dies or a batch
    does not fit into shared memory, saying what to change. Workers leave signals to this process and end with it.
    """
    positions = part(order.global_batch_size, rank, world_size)
    if order.global_batch_size < world_size:
        raise ValueError(
            f"got a global batch of {order.global_batch_size} samples on {world_size} ranks, wanted at least "
            "one a rank: raise data.global_batch_size or use fewer ranks"
        )
    steps = range(start_step, stop_step)
    ranges = _few_of(index, order, steps)
    requests = _Requests(order, positions, steps, None if ranges else index, max(workers, 1) * prefetch)
    return _loader(_Samples(index, seed, flip, affine, ranges), requests, workers, prefetch, pin_memory)


def images_in_order(index: Index, samples: np.ndarray, batch_size: int, workers: int) -> Iterator[Batch]:
    """The given samples as they are stored, `batch_size` at a time; a batch's step is its number.

    Iterating raises ValueError naming a sample that is no image of the data set's size, or has changed.
    """
    starts = range(0, len(samples), batch_size)
    requests = [_Request(i, 0, samples[start : start + batch_size]) for i, start in enumerate(starts)]
    dataset = _Samples(index, seed=0, flip=False, affine=None, ranges=_sparse(index, samples))
    for batch in _loader(dataset, requests, min(workers, len(requests)), 2, False):
        if batch.bad:
            raise ValueError(f"{index.path}: sample {batch.bad[0]}: leave it out and prepare the data set again")
        yield batch


def image_size(index: Index) -> tuple[int, int]:
    """(H, W) of the images of a data set. Raises ValueError if its index does not say."""
    size = index.prepared.get("image_size")
    if size is None:
        raise ValueError(
            f"{index.path}: index.json has no prepared.image_size, wanted [height, width]: prepare it again"
        )
    height, width = size
    return height, width


def normalize(images: Tensor, mean: float | Sequence[float], std: float | Sequence[float]) -> Tensor:
    """(b, 3, H, W) uint8 → float32 (images - mean) / std; mean and std of values 0 to 255, one number or three."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() - mean) / std


def _sparse(index: Index, samples: np.ndarray) -> bool:
    """Whether reading these samples alone saves most of the bytes of their shards, and can be done."""
    numbers = np.unique(index.shard[samples])
    if not all(index.shards[n].url and index.shards[n].compression is None for n in numbers.tolist()):
        return False
    missing = [n for n in numbers.tolist() if not index.cache.holds(index.shards[n])]
    return len(samples) * SPARSE < int(index.samples_per_shard[missing].sum())


def _few_of(index: Index, order: Order | Groups, steps: range) -> bool:
    """The same of the samples of these steps. Groups come from everywhere: alone where the cache does not hold all."""
    if not any(shard.url for shard in index.shards):
        return False
    if isinstance(order, Groups) and sum(shard.plain_bytes for shard in index.shards) > index.cache.limit():
        return all(shard.url and shard.compression is None for shard in index.shards)
    if len(steps) > FEW_STEPS:
        return False
    return _sparse(index, np.unique(np.concatenate([order.batch(step) for step in steps] or [np.empty(0, np.int64)])))


class _Request(NamedTuple):
    """What one item of the data set is asked for: a rank's part of a batch."""

    step: int
    first: int  # position of samples[0] in the global batch
    samples: np.ndarray  # (b,)
    ahead: Sequence[int] = ()  # shards that later batches need


@dataclass(frozen=True)
class _Requests:
    """The batch sampler: one request a step."""

    order: Order | Groups
    positions: range
    steps: range
    index: Index | None
    """Whose shards are fetched ahead; None: none are."""
    behind: int
    """Steps that readers may be behind the one that is asked for."""

    def __iter__(self) -> Iterator[_Request]:
        own = slice(self.positions.start, self.positions.stop)
        for step, ahead in zip(self.steps, self._ahead(), strict=False):
            yield _Request(step, own.start, self.order.batch(step)[own], ahead)

    def _ahead(self) -> Iterator[Sequence[int]]:
        """Shards to fetch with each request. Of groups that of the anchors; the others come from anywhere."""
        copied = [] if self.index is None else [shard.plain_bytes for shard in self.index.shards if shard.copied]
        if self.index is None or not copied:
            return repeat(())
        k = self.order.samples_per_identity if isinstance(self.order, Groups) else 1
        anchors = self.order.anchors if isinstance(self.order, Groups) else self.order
        own = slice(self.positions.start // k, -(-self.positions.stop // k))
        most = self.index.cache.limit() // (max(copied) * local_world_size())
        return upcoming(anchors, self.index.shard, own, self.steps, max(most, 1), self.behind)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class _Samples:
    """A map-style data set whose items are whole batches."""

    index: Index
    seed: int
    flip: bool
    affine: Affine | None
    ranges: bool = False  # read samples alone, not shards
    _open: OrderedDict[int, int] = field(default_factory=OrderedDict)  # shard → descriptor, latest use last
    _fetched_anew: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._fetcher = Fetcher(self.index)
        self.index.cache.asked()  # before: not by this reader, nor by each that is forked from here

    def __getitem__(self, request: _Request) -> Batch | ReadError:
        """The batch, or the error that ends the run: torch would put a raised one into a traceback's text."""
        try:
            batch = self._batch(request)
            return batch if get_worker_info() is None else _in_shared_memory(batch)
        except ReadError as error:
            return error

    def _batch(self, request: _Request) -> Batch:
        cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's own threads do not survive a fork
        height, width = image_size(self.index)
        planned = len(request.samples)
        self._fetcher.ask(request.ahead)
        images = np.empty((planned, 3, height, width), np.uint8)
        good: list[int] = []
        bad: list[str] = []
        # What a run on an older data set saw stays: until then transparency was dropped.
        pixels_of = decode if self.index.version >= 3 else decode_by_opencv
        of_batch = self._read_alone(request.samples) if self.ranges else repeat(None)
        for row, (sample, data) in enumerate(zip(request.samples.tolist(), of_batch, strict=False)):
            data = self._read(sample) if data is None else data
            image = pixels_of(data) if self.index.intact(sample, data) else None
            if image is None or image.shape != (height, width, 3):
                bad.append(self._fault(sample, data))
                continue
            if self.flip or self.affine:
                rng = np.random.Generator(
                    np.random.Philox(seed_for("augment", self.seed, request.step, request.first + row))
                )
                image = augment(image, rng, self.flip, self.affine)
            images[len(good)] = image.transpose(2, 0, 1)
            good.append(sample)
        self._note_use(set(self.index.shard[request.samples].tolist()))
        labels = torch.from_numpy(self.index.label[good])
        fetches = self.index.cache.asked()
        return Batch(torch.from_numpy(images[: len(good)]), labels, request.step, planned, bad, fetches)

    def _fault(self, sample: int, data: bytes) -> str:
        """Which sample it is, and why it cannot be used."""
        if self.index.intact(sample, data):
            return f"{self.index.described(sample)} is no image of (height, width) {image_size(self.index)}"
        shard = self.index.shard_of(sample)
        return f"{self.index.described(sample)} has changed in {shard} since it was prepared: its CRC32 is another"

    def _read_alone(self, samples: np.ndarray) -> list[bytes]:
        """The stored bytes of the images of a batch, no more; those that are not what they were are read once more."""
        found: dict[int, bytes] = {}
        try:
            self._fetch_alone(samples.tolist(), found)
            self._fetch_alone([one for one, data in found.items() if not self.index.intact(one, data)], found)
        except (OSError, ValueError) as error:
            raise ReadError(f"{error}. Once the file can be read the same command goes on") from error
        return [found[sample] for sample in samples.tolist()]

    def _fetch_alone(self, samples: list[int], found: dict[int, bytes]) -> None:
        """Adds the bytes of these samples, asked of each host side by side."""
        of_host: dict[str, list[int]] = {}
        for sample in samples:
            of_host.setdefault(storage.host(self.index.shard_of(sample)), []).append(sample)
        for some in of_host.values():
            urls = [self.index.shard_of(sample) for sample in some]
            starts, sizes = (array[some].tolist() for array in (self.index.offset, self.index.size))
            found |= dict(zip(some, storage.read_ranges(urls, starts, sizes), strict=True))
            self.index.cache.note(Fetches(bytes=sum(sizes)))

    def _read(self, sample: int) -> bytes:
        """The stored bytes of an image, read once more if they have changed. Raises ReadError if all tries failed."""
        shard, offset, size = (int(a[sample]) for a in (self.index.shard, self.index.offset, self.index.size))
        tries = 0
        for pause in (*RETRY_SECONDS, None):
            tries += 1
            try:
                data = os.pread(self._descriptor(shard), size, offset)
                if len(data) != size or not self.index.intact(sample, data):
                    self._anew(shard)  # a copy may have been cut short by a power loss
                    data = os.pread(self._descriptor(shard), size, offset)
                if len(data) == size:
                    return data
                error: Exception = OSError(f"got {len(data)} of {size} bytes")
            except (OSError, ValueError) as caught:
                error = caught
            self._close(shard)  # a new descriptor also helps where the file was replaced
            if pause is None or self.index.shards[shard].copied:  # the cache has tried for minutes
                break
            time.sleep(pause)
        raise ReadError(
            f"cannot read {size} bytes at offset {offset} of {self.index.shard_of(sample)} after {tries} "
            f"tr{'y' if tries == 1 else 'ies'}: {error}. Once the file can be read the same command goes on"
        ) from error

    def _anew(self, shard: int) -> None:
        """Has the shard opened again: the file may have been replaced, or the copy of it gone bad, once."""
        self._close(shard)
        if shard not in self._fetched_anew:
            self._fetched_anew.add(shard)
            self.index.forget(shard)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._close(next(iter(self._open)))
            self._open[shard] = self.index.open_shard(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _note_use(self, in_use: set[int]) -> None:
        """Tells the cache which copies this batch needed. Closes others that it has deleted: the disk keeps them."""
        for shard in [shard for shard in self._open if self.index.shards[shard].copied]:
            if shard in in_use:
                used(self._open[shard])
            elif os.fstat(self._open[shard]).st_nlink == 0:
                self._close(shard)

    def _close(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard))

    def __del__(self) -> None:
        self._fetcher.stop()
        for shard in list(self._open):
            self._close(shard)


@dataclass(frozen=True)
class _Batches:
    """The batches of torch's loader, with errors that say what happened."""

    loader: DataLoader

    def __iter__(self) -> Iterator[Batch]:
        for batch in _of_readers(self.loader) if self.loader.num_workers else self.loader:
            if isinstance(batch, ReadError):
                raise batch
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


def _loader(dataset: _Samples, requests: Iterable[_Request], workers: int, prefetch: int, pin_memory: bool) -> _Batches:
    image_size(dataset.index)  # the error here, not in a worker
    loader = DataLoader(
        dataset,
        batch_size=None,  # an item of the data set is a batch already
        sampler=requests,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        # Python 3.14 starts processes anew, each with a copy of the index: 24 bytes a sample
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the loader would draw from the run's own
    )
    return _Batches(loader)


# ---- the life of reader processes

# torchrun, Slurm and terminals send these to readers, too. A reader that died of one would take its rank along while
# that is about to save.
_FOR_THE_RANK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def _of_readers(loader: DataLoader) -> Iterator[Batch | ReadError]:
    """The batches of a loader with workers, which end with this process or with this iterator."""
    others = multiprocessing.active_children()
    readers: list = []
    theirs, ours = multiprocessing.Pipe(duplex=False)
    loader.worker_init_fn = partial(_end_with_the_rank, theirs, ours)
    try:
        with _signals_kept_from_readers():
            batches = iter(loader)
        readers = [process for process in multiprocessing.active_children() if process not in others]
        # At its end the interpreter waits for child processes. What was registered last is called first.
        atexit.register(ours.close)
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if text := _why(error, readers):
            raise ReadError(text) from error
        raise
    finally:
        # Now, not when the error's traceback is collected: in a reference cycle the queues go first, and
        # torch waits 5 s for workers that it cannot tell to stop any more.
        batches = None
        ours.close()
        atexit.unregister(ours.close)


@contextmanager
def _signals_kept_from_readers() -> Iterator[None]:
    """Has the processes that the body starts inherit blocked signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_RANK)
    at_death_of_a_child = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # torch's handler raises in the midst of whatever runs. Its loader looks for dead workers as well, every 5 s.
        if threading.current_thread() is threading.main_thread() and at_death_of_a_child is not None:
            signal.signal(signal.SIGCHLD, at_death_of_a_child)


def _end_with_the_rank(theirs: Connection, ours: Connection, worker: int) -> None:
    """Ends this reader as soon as the rank has closed its end of the pipe, or has ended itself, in whatever way."""
    ours.close()  # the copy that came with the fork

    def wait() -> None:
        with suppress(EOFError, OSError):
            theirs.recv_bytes()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _in_shared_memory(batch: Batch) -> Batch:
    """Put there now: later, in the queue's own thread, an error would drop the batch and leave the rank waiting."""
    try:
        return batch._replace(images=batch.images.share_memory_(), labels=batch.labels.share_memory_())
    except RuntimeError as error:
        size = f"{batch.images.nbytes / 2**20:.1f} MiB of images"
        raise ReadError(_little_shared_memory(f"a reader cannot hand over {size}: {error}")) from error


def _little_shared_memory(what: str) -> str:
    with suppress(OSError):
        stat = os.statvfs(SHARED_MEMORY)
        free, total = (blocks * stat.f_frsize / 2**20 for blocks in (stat.f_bavail, stat.f_blocks))
        what += f"; {free:.1f} of {total:.1f} MiB are free in {SHARED_MEMORY}"
    return f"{what}. Readers need more shared memory ({MORE_SHARED_MEMORY}), or lower data.workers or data.prefetch"


def _why(error: Exception, readers: list) -> str | None:
    """What to do about an error of torch's loader: None where no reader has died and there is no more to say."""
    if isinstance(error, ConnectionError | EOFError):  # a process that dies closes its sockets, and then it is dead
        ended = multiprocessing.connection.wait([reader.sentinel for reader in readers], timeout=5)
        for reader in readers:
            if reader.sentinel in ended:
                reader.join(5)
    if isinstance(error, OSError) and not readers:
        text = f"reader processes cannot be started: {error}"
        return _little_shared_memory(text) if error.errno == errno.ENOSPC else f"{text}: lower data.workers"
    codes = [reader.exitcode for reader in readers if reader.exitcode]
    if not codes:
        return None
    if -signal.SIGBUS in codes:
        return _little_shared_memory("a reader process was ended by SIGBUS")
    if -signal.SIGKILL in codes:
        return (
            "a reader process was killed (SIGKILL), as the kernel does where memory runs out: lower data.workers or "
            "data.prefetch, or give the machine or the container more memory"
        )
    how = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"
    return f"a reader process ended with {how}: {error}"


def _as_it_is(batch: Batch | ReadError) -> Batch | ReadError:
    return batch
