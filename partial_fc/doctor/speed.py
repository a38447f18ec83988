"""The reader's speed beside the backbone's: which of them bounds a run."""

import sys
import time

import torch

from partial_fc import backbone, storage
from partial_fc.build import check_batch_norm, micro_batch_size
from partial_fc.config import Config
from partial_fc.data.ahead import FETCHERS
from partial_fc.data.groups import Groups
from partial_fc.data.order import Order
from partial_fc.data.reader import image_size, loader, normalize
from partial_fc.data.shards import Index
from partial_fc.doctor.machine import cores
from partial_fc.doctor.ranks import timed
from partial_fc.doctor.sheet import Found
from partial_fc.memory import size_text
from partial_fc.optim import build_optimizer
from partial_fc.parallel import distributed
from partial_fc.parallel.base_engine import BaseEngine

HOSTS = 3  # that are asked
REQUESTS = 5  # of a byte: the shortest is the latency
SAMPLE_BYTES = 8 << 20  # of each of as many shards as a reader fetches at once
PROBED = 2  # images of the first step, which sets things up
LONG = 7 * 86400  # seconds
STRAGGLER = 0.7  # of the ranks' median speed


def wait_for(what: str, seconds: float) -> None:
    """Says, on rank 0 and beside the results, what takes so long."""
    if distributed.rank() == 0:
        print(f"         ({what}, about {seconds:.0f} s)", file=sys.stderr, flush=True)


def engine_of(config: Config, index: Index, order: Order | Groups | None, device: torch.device) -> Found:
    """This rank's backbone with its optimizer after a first step, apart from the other ranks'. order: None, unknown."""
    size = image_size(index)
    net = backbone.build_seeded(config.backbone.name, config.backbone.embedding_dim, size, config.run.seed)
    if order is not None:
        check_batch_norm(config, net, order)
    net.to(device).train()
    # compiling takes longer than all the rest here
    settings = config.engine.model_copy(update={"compile": False, "sync_batchnorm": False})
    engine = BaseEngine(net, build_optimizer(net, config.optim), device, settings)
    engine.warm_up(torch.zeros(PROBED, 3, *size, device=device))  # it refuses what a run would
    step(engine, config, torch.zeros(PROBED, 3, *size, dtype=torch.uint8, device=device))
    count = sum(parameter.numel() for parameter in net.parameters())
    return Found(
        f"{config.backbone.name}, {count / 1e6:.1f} million parameters, {config.engine.precision}", value=engine
    )


def step(engine: BaseEngine, config: Config, images: torch.Tensor) -> None:
    """Forward, backward and an update of size 0."""
    engine.backward(engine(normalize(images, config.data.mean, config.data.std)).sum())
    engine.step(0.0)


def backbone_speed(config: Config, engine: BaseEngine, size: tuple[int, int], seconds: float) -> Found:
    """Samples/s of this rank, at the config's images a micro-batch, or as many as the time allows."""
    device = engine.device
    wanted = micro_batch_size(config)

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, device=device)

    probe = images(PROBED)
    of_an_image = min(timed(lambda: step(engine, config, probe), device) for _ in range(2)) / PROBED
    count = max(1, min(wanted, int(seconds / 4 / of_an_image)))
    batch = images(count)
    try:
        step(engine, config, batch)  # of a new size: kernels are chosen, memory is taken
        times = [timed(lambda: step(engine, config, batch), device)]
        while sum(times) < seconds and len(times) < 50:
            times.append(timed(lambda: step(engine, config, batch), device))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{count} images of {size[0]} x {size[1]} pixels do not fit the device's memory: raise data.accumulate, or "
            "lower data.global_batch_size, or give engine.checkpoint_activations=true"
        ) from error
    less = "" if count == wanted else f" instead of the {wanted} of a micro-batch, which would take too long"
    compiled = ", not compiled" if config.engine.compile else ""
    return Found(
        f"{len(times)} forwards, backwards and updates of {count} images{less}{compiled}, each rank by itself",
        value=len(times) * count / sum(times),
    )


def stores(index: Index) -> Found:
    """Latency and bandwidth of the hosts that shards lie behind, asked as a reader asks."""
    said, failed = [], False
    for host in index.hosts()[:HOSTS]:
        shards = [shard for shard in index.shards if (shard.url or "").startswith(f"{host}/")]
        urls = [str(shard.url) for shard in shards[:FETCHERS]]
        sizes = [min(shard.bytes, SAMPLE_BYTES) for shard in shards[:FETCHERS]]
        try:
            latency = min(_seconds(urls[:1], [1]) for _ in range(REQUESTS))
            rate = sum(sizes) / _seconds(urls, sizes)
        except (OSError, ValueError) as error:
            said.append(str(error))
            failed = True
            continue
        missing = sum(shard.bytes for shard in shards if not index.cache.holds(shard))
        text = f"{host}: {latency * 1000:.0f} ms a request, {rate / 1e6:,.1f} MB/s in {len(urls)} at once"
        wait = f"; the {size_text(missing)} that are not in the cache take {_long(missing / rate)}" if missing else ""
        said.append(text + wait)
    return Found("; ".join(said), "warning" if failed else "ok")


def _seconds(urls: list[str], sizes: list[int]) -> float:
    start = time.perf_counter()
    storage.read_ranges(urls, [0] * len(urls), sizes)
    return time.perf_counter() - start


def reader_speed(config: Config, index: Index, order: Order | Groups, seconds: float) -> Found:
    """Samples/s of this rank's reader, counted after the first batch of each of its processes."""
    settings = config.data
    batches = loader(
        index,
        order,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.run.seed,
        start_step=0,
        stop_step=10**6,
        workers=settings.workers,
        prefetch=settings.prefetch,
        flip=settings.flip,
        affine=settings.affine,
    )
    first, samples = max(settings.workers, 1), 0
    for number, batch in enumerate(batches):
        if number < first:
            start = time.perf_counter()
            continue
        samples += batch.planned
        if time.perf_counter() - start > seconds:
            break
    rate = samples / (time.perf_counter() - start)
    return Found(f"data.workers {settings.workers}, {seconds:.0f} s", value=rate)


def verdict(reader: list[float], of_backbone: list[float], config: Config, spare: int, on_cpu: bool) -> Found:
    """What bounds the run. reader, of_backbone (W,): samples/s of each rank, and all ranks wait for the slowest.

    spare: cores of a machine beyond those that ranks and reader processes take.
    """
    world_size = len(reader)
    reads, computes = world_size * min(reader), world_size * min(of_backbone)
    text = f"the reader gives {reads:,.0f} samples/s, the backbone alone takes {computes:,.0f}"
    if on_cpu:
        text += " (each measured by itself; on a CPU they share the cores)"
    name, speeds = ("backbone", of_backbone) if reads >= computes else ("reader", reader)
    slowest, median = speeds.index(min(speeds)), sorted(speeds)[world_size // 2]
    if speeds[slowest] < STRAGGLER * median:
        return Found(
            f"{text}: the {name} bounds the run, and rank {slowest}'s, which all wait for, has {speeds[slowest]:,.0f} "
            f"samples/s where the median is {median:,.0f}; look at that machine's load, disk and clock rate",
            "warning",
        )
    if reads >= computes:
        return Found(f"{text}: the backbone bounds the run, the readers keep up")
    if spare > 0:
        advice = f"raise data.workers, now {config.data.workers}: {spare} cores of this machine are free"
    else:
        advice = (
            "no core of this machine is free: store smaller images (partial-fc prepare --size), leave out data.affine"
        )
    return Found(f"{text}: the reader bounds the run; {advice}", "warning")


def duration(seconds: float, steps: int) -> Found:
    """How long the run takes at least: the head, evaluation and waiting are not in it."""
    text = f"{steps:,} steps take {_long(seconds)} at this speed, without the head"
    if seconds > LONG:
        return Found(f"{text}: more ranks, a smaller backbone.name or fewer run.epochs take less", "warning")
    return Found(text)


def _long(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def spare_cores(config: Config, ranks_here: int) -> int:
    return cores() - ranks_here * (1 + config.data.workers)
