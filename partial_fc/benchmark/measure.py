"""What one rank measures: steps of several heads in turn, the memory of one, what it sends.

Shapes: b this rank's batch, B global batch, D embedding size, C_r classes of this rank, U rows in use.
"""

import ctypes
import gc
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from partial_fc.benchmark.peers import Dense, Limit, Published, head_matmul, torch_matmul
from partial_fc.head.elementwise import compiler_works
from partial_fc.head.margins import CosFace
from partial_fc.head.partial_fc import PartialFC
from partial_fc.head.softmax import default_chunk
from partial_fc.parallel import distributed

MARGIN = CosFace(scale=64.0, margin=0.35)
SGD = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
WARM_UP = 2  # steps: buffers grow, parts are compiled

# what --variants takes and what the table prints
LABELS = {
    "dense": "dense",
    "published": "published",
    "recompute": "ours recompute",
    "recompute-compiled": "ours recompute, compiled",
    "cache-fp32": "ours cache fp32",
    "cache-fp32-compiled": "ours cache fp32, compiled",
    "cache-bf16": "ours cache bf16",
    "cache-bf16-compiled": "ours cache bf16, compiled",
    "limit": "limit",
    "limit-ours": "limit (our matmul)",
}
LIMITS = {"limit": torch_matmul, "limit-ours": head_matmul}
CACHES = {"recompute": None, "cache-fp32": torch.float32, "cache-bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cell:
    """One size of the problem. batch is global; ranks share classes and batch."""

    classes: int
    dim: int
    batch: int
    rate: float
    ranks: int = 1

    @property
    def classes_of_rank(self) -> int:
        return -(-self.classes // self.ranks)

    @property
    def rows(self) -> int:
        """U of a rank as published: the positives are among them. PartialFC's positives come on top."""
        return int(self.rate * self.classes_of_rank)


class Ours:
    """PartialFC with a step like the peers'."""

    def __init__(self, variant: str, cell: Cell, device: torch.device):
        cache = CACHES[variant.removesuffix("-compiled")]
        # room for every row in use: drawn negatives, up to one more a block of 2^16 classes, and positives
        most = min(cell.classes_of_rank, cell.rows + cell.classes_of_rank // 2**16 + 2 + cell.batch)
        self.head = PartialFC(
            cell.classes,
            cell.dim,
            MARGIN,
            cell.rate,
            momentum=SGD["momentum"],
            weight_decay=SGD["weight_decay"],
            cache_bytes=0 if cache is None else cell.batch * most * cache.itemsize,
            cache_dtype=cache or torch.float32,
            compile=variant.endswith("-compiled"),
            device=device,
        )

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = self.head(embeddings, labels, padded_size=len(labels))
        loss.backward()
        self.head.step(SGD["lr"])
        _ = self.head.centers  # on CUDA the update has a stream of its own: this one waits for it, and is timed
        return loss.detach()

    def state(self) -> list[Tensor]:
        return list(self.head.centers.state().values())


def build(variant: str, cell: Cell, device: torch.device) -> Dense | Published | Limit | Ours:
    sizes = (cell.classes, cell.dim, MARGIN, cell.rate)
    if variant == "dense":
        return Dense(*sizes, **SGD, device=device)
    if variant == "published":
        return Published(*sizes, **SGD, device=device)
    if variant in LIMITS:
        chunk = default_chunk(cell.dim, device)
        return Limit(cell.rows, cell.dim, cell.batch, LIMITS[variant], chunk=chunk, device=device)
    return Ours(variant, cell, device)


def data(variant: str, cell: Cell, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Step number `step`'s embeddings (b, D), which require a gradient, and labels (b,): the same for all variants.

    A limit has no collectives: it gets the whole batch of B, which a rank has after the gather.
    """
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(cell.batch, cell.dim, generator=generator)
    labels = torch.randint(cell.classes, (cell.batch,), generator=generator)
    part = range(cell.batch)
    if variant not in LIMITS:
        part = distributed.part(cell.batch, distributed.rank(), distributed.world_size())
    mine = slice(part.start, part.stop)
    return embeddings[mine].to(device).requires_grad_(), labels[mine].to(device)


# ---- time


def timed_step(head, embeddings: Tensor, labels: Tensor) -> tuple[dict[str, float], Tensor | None]:
    """Milliseconds by three clocks: CPU time of this process, wall time, and on CUDA the device's; and the loss."""
    on_device = embeddings.device.type == "cuda"
    if on_device:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = head.step(embeddings, labels)
    if on_device:
        end.record()
        torch.cuda.synchronize()
    clocks = {"cpu": (time.process_time() - cpu) * 1e3, "wall": (time.perf_counter() - wall) * 1e3}
    if on_device:
        clocks["device"] = start.elapsed_time(end)
    return clocks, loss


def time_in_turn(contestants: list[tuple[Cell, str]], rounds: int, threads: int, device: str) -> list[dict]:
    """This rank's times: every (cell, variant) makes one step a round, in an order that rotates from round to round.

    A dict a contestant: `clocks` (a list over rounds for each clock), `loss` of the last round, `collectives` and
    `bytes` of a step. All contestants live at once.
    """
    torch.set_num_threads(threads)
    place = place_of(device)
    quiet = distributed.rank() > 0
    heads = [build(variant, cell, place) for cell, variant in tqdm(contestants, "building", leave=False, disable=quiet)]
    for head in heads:
        touch(head)
    out = [{"clocks": {}, "loss": None, "collectives": {}, "bytes": 0} for _ in contestants]
    for step in tqdm(range(WARM_UP + rounds), "rounds", leave=False, disable=quiet):
        for turn in range(len(heads)):
            which = (turn + step) % len(heads)
            cell, variant = contestants[which]
            embeddings, labels = data(variant, cell, step, place)
            distributed.barrier()
            if step < WARM_UP:
                with counted() as counts:
                    heads[which].step(embeddings, labels)
                out[which] |= counts
                continue
            clocks, loss = timed_step(heads[which], embeddings, labels)
            for clock, milliseconds in clocks.items():
                out[which]["clocks"].setdefault(clock, []).append(milliseconds)
            out[which]["loss"] = None if loss is None else loss.item()
    return out


@contextmanager
def counted() -> Iterator[dict]:
    """Counts the collectives of its body: how often each was called, and the bytes of what was gathered or reduced.

    Bytes are those of the whole: all ranks' parts of a gather, the tensor that is reduced. With one rank nothing is
    sent and nothing counted.
    """
    calls, counts = Counter(), {"collectives": {}, "bytes": 0}
    names = ("all_gather", "all_reduce_sum", "all_reduce_max", "reduce_scatter_sum")
    plain = {name: getattr(distributed, name) for name in names}

    def counting(name: str):
        def collective(tensor: Tensor) -> Tensor:
            if distributed.world_size() > 1:
                calls[name] += 1
                counts["bytes"] += tensor.nbytes * (distributed.world_size() if name == "all_gather" else 1)
            return plain[name](tensor)

        return collective

    for name in names:
        setattr(distributed, name, counting(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(distributed, name, plain[name])
        counts["collectives"] = dict(calls)


# ---- memory


def touch(head) -> None:
    """Writes to all of a head's state: zeros that were never written take no memory, a trained momentum does."""
    with torch.no_grad():
        for tensor in head.state():
            tensor.add_(0)


def measure_memory(cell: Cell, variant: str, threads: int, device: str) -> int | None:
    """Peak bytes of a step beyond what this process held before the head was built; None where nobody tells.

    Weight, momentum and whatever a step needs. Before, a head of a few chunks runs in the same process, so that
    libraries, threads and compiled parts are not counted.
    """
    torch.set_num_threads(threads)
    place = place_of(device)
    if place.type == "cpu" and not Path("/proc/self/status").exists():
        return None
    small = replace(cell, classes=min(cell.classes, int(cell.ranks * 5000 / cell.rate)))
    _steps(small, variant, place, WARM_UP)
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _steps(cell, variant, place, WARM_UP + 1)
        return torch.cuda.max_memory_allocated() - before
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    _steps(cell, variant, place, WARM_UP + 1)
    return _status("VmHWM") - before


def _steps(cell: Cell, variant: str, device: torch.device, count: int) -> None:
    head = build(variant, cell, device)
    touch(head)
    for step in range(count):
        head.step(*data(variant, cell, step, device))


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, what is resident; VmHWM, the most that ever was."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def _return_free_memory() -> None:
    # freed small blocks that the allocator keeps would be reused by the head and not be seen
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library than glibc
        return


# ---- where


def describe(threads: int, device: str) -> dict:
    """What a reader needs to know about the numbers."""
    torch.set_num_threads(threads)
    place = place_of(device)
    if place.type == "cuda":
        hardware, library = torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}"
    else:
        blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
        library = f"{blas.group(1) if blas else 'no BLAS'}, oneDNN {torch.backends.mkldnn.is_available()}"
        hardware = f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    clock = "device" if place.type == "cuda" else "cpu" if threads == 1 else "wall"
    return {
        "hardware": hardware,
        "torch": torch.__version__,
        "libraries": library,
        "threads": threads,
        "dtype": "float32",
        "device": place.type,
        "compiler": compiler_works(place.type),
        "clock": clock,
    }


def _cpu_model() -> str:
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1).strip()
    except (OSError, AttributeError):  # not Linux, or a processor that has no such line
        return platform.processor() or platform.machine()


def place_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here; give --device cpu")
    return torch.device("cpu") if name == "cpu" else torch.device("cuda", torch.cuda.current_device())
