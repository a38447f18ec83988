"""partial-fc benchmark stream: how long a reader of remote shards waits, and how much it fetches, at a given bandwidth.

A server of this machine answers late and sends slowly; a consumer takes batches at a share of what the bandwidth gives.
"""

import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from partial_fc.data.order import Order
from partial_fc.data.reader import Batch, loader
from partial_fc.data.remote import Cache
from partial_fc.data.shards import Index, Sample, load_index, write_shards
from partial_fc.opencv import cv2

MB = 10**6
SIDE, QUALITY = 112, 90  # pixels, of JPEG: an image of noise takes 9.6 kB
DIFFERENT = 64  # images; the others are copies
_PIECE = 1 << 16  # bytes sent at once


def benchmark_stream(
    *,
    samples: int = 60_000,
    shard_mb: float = 8,
    mb_per_second: float = 20,
    latency: float = 0.05,
    use: float = 0.8,
    cache_mb: float = 400,
    batch: int = 128,
    streams: int = 8,
    window: int = 512,
    workers: int = 2,
) -> dict[str, float]:
    """Reads one epoch of images of noise from a server that sends `mb_per_second` in all, each answer after `latency`.

    shard_mb: of each shard. use: the share of the bandwidth that the consumer wants, in bytes of tar a second; between
    batches it sleeps, as a training step would take its time. cache_mb: the copies' limit. Prints and returns
    `first_batch` (seconds), `waiting` (the share of the time, after the first shuffle window, in which no batch was
    ready) and `fetched` (bytes sent for each byte of tar of the samples that were read).
    """
    folder = Path(tempfile.mkdtemp(prefix="partial_fc_stream_"))
    try:
        index = _write(folder / "set", samples, int(shard_mb * MB))
        per_sample = sum(shard.bytes for shard in index.shards) / index.num_samples
        order = Order(index.samples_per_shard, batch, streams, 0, window)
        pause = batch * per_sample / (use * mb_per_second * MB)
        with _serving(folder, mb_per_second * MB, latency) as (url, sent):
            there = load_index(f"{url}/set", cache=Cache(folder / "cache", int(cache_mb * MB)))
            sent.value = 0  # the index is fetched once for all runs
            first_batch, waiting = _consume(
                loader(
                    there,
                    order,
                    rank=0,
                    world_size=1,
                    seed=0,
                    start_step=0,
                    stop_step=order.steps_per_epoch,
                    workers=workers,
                    prefetch=4,
                    flip=False,
                    affine=None,
                ),
                pause,
                settled=-(-window * streams // batch),
            )
            fetched = sent.value / (order.steps_per_epoch * batch * per_sample)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {"first_batch": first_batch, "waiting": waiting, "fetched": fetched}
    print(
        f"{len(index.shards)} shards of {shard_mb:g} MB at {mb_per_second:g} MB/s and {latency * 1000:g} ms, "
        f"{use:.0%} of it wanted, a cache of {cache_mb:g} MB: first batch after {first_batch:.1f} s, then waiting "
        f"{waiting:.1%} of the time; {fetched:.3f} bytes fetched for each byte used"
    )
    return found


def _write(out: Path, samples: int, shard_bytes: int) -> Index:
    random = np.random.default_rng(0)
    images = [
        cv2.imencode(".jpg", random.integers(0, 256, (SIDE, SIDE, 3), np.uint8), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
        for _ in range(DIFFERENT)
    ]
    rows = (Sample(images[i % DIFFERENT].tobytes(), "jpg", i % 1000) for i in range(samples))
    prepared = {"image_size": [SIDE, SIDE]}
    return write_shards(
        out, rows, [str(i) for i in range(1000)], prepared=prepared, shard_bytes=shard_bytes, total=samples
    )


def _consume(batches: Iterable[Batch], pause: float, settled: int) -> tuple[float, float]:
    """(seconds to the first batch, share of waiting after the first `settled` batches) of a loop of `pause` a step."""
    began = time.perf_counter()
    first_batch = waited = counted = 0.0
    iterator = iter(tqdm(batches, desc="reading", unit=" batches", mininterval=1))
    step = 0
    while True:
        asked = time.perf_counter()
        if next(iterator, None) is None:
            return first_batch, waited / max(counted, 1e-9)
        took = time.perf_counter() - asked
        if step == 0:
            first_batch = time.perf_counter() - began
        time.sleep(pause)
        if step >= settled:
            waited += took
            counted += time.perf_counter() - asked
        step += 1


@contextmanager
def _serving(folder: Path, rate: float, latency: float) -> Iterator[tuple[str, Any]]:
    """The server's URL, and how many bytes it has sent; a process of its own."""
    context = multiprocessing.get_context("fork")
    sent, (ours, theirs) = context.Value("q", 0), context.Pipe()
    process = context.Process(target=_serve, args=(folder, rate, latency, sent, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}", sent
    finally:
        process.kill()
        process.join()


def _serve(folder: Path, rate: float, latency: float, sent: Any, connection: Connection) -> None:
    lock, free = threading.Lock(), [time.monotonic()]  # when the line is free again

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments) -> None:
            pass

        def do_GET(self) -> None:
            time.sleep(latency)
            super().do_GET()

        def copyfile(self, source, outputfile) -> None:
            while data := source.read(_PIECE):
                with lock:
                    free[0] = max(free[0], time.monotonic()) + len(data) / rate
                    until = free[0]
                    sent.value += len(data)
                time.sleep(max(until - time.monotonic(), 0))
                outputfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    connection.send(server.server_address[1])
    server.serve_forever()
