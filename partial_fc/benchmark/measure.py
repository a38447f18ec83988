"""What one rank measures of things that make steps: time in turn with others, memory, what is sent."""

import ctypes
import gc
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from partial_fc.head.elementwise import compiler_works
from partial_fc.parallel import distributed

WARM_UP = 2  # steps: buffers grow, parts are compiled


# ---- time


def timed_step(contestant, batch: tuple[Tensor, ...]) -> tuple[dict[str, float], Tensor | None]:
    """Milliseconds by three clocks: CPU time of this process, wall time, and on CUDA the device's; and the loss."""
    on_device = batch[0].device.type == "cuda"
    if on_device:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = contestant.step(*batch)
    if on_device:
        end.record()
        torch.cuda.synchronize()
    clocks = {"cpu": (time.process_time() - cpu) * 1e3, "wall": (time.perf_counter() - wall) * 1e3}
    if on_device:
        clocks["device"] = start.elapsed_time(end)
    return clocks, loss


def time_in_turn(
    build: Callable, data: Callable, group: list[tuple], rounds: int, threads: int, device: str
) -> list[dict]:
    """This rank's times: every (cell, variant) makes one step a round, in an order that rotates from round to round.

    build(variant, cell, device) gives what makes steps, data(variant, cell, step, device) the tensors that its `step`
    takes. A dict a contestant: `clocks` (a list over rounds for each clock) and `loss` of the last round. All
    contestants live at once.
    """
    torch.set_num_threads(threads)
    place = place_of(device)
    quiet = distributed.rank() > 0
    contestants = [build(variant, cell, place) for cell, variant in tqdm(group, "building", leave=False, disable=quiet)]
    out = [{"clocks": {}, "loss": None} for _ in group]
    for step in tqdm(range(WARM_UP + rounds), "rounds", leave=False, disable=quiet):
        for turn in range(len(group)):
            which = (turn + step) % len(group)
            cell, variant = group[which]
            batch = data(variant, cell, step, place)
            distributed.barrier()
            if step < WARM_UP:
                contestants[which].step(*batch)
                continue
            clocks, loss = timed_step(contestants[which], batch)
            for clock, milliseconds in clocks.items():
                out[which]["clocks"].setdefault(clock, []).append(milliseconds)
            out[which]["loss"] = None if loss is None else loss.item()
    return out


@contextmanager
def counted() -> Iterator[dict]:
    """Counts the head's collectives in its body: how often each was called, bytes of what was gathered or reduced.

    Not what DistributedDataParallel sends by itself. Bytes are those of the whole: all ranks' parts of a gather, the
    tensor that is reduced. With one rank nothing is sent and nothing counted.
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


def peak_beyond(body: Callable[[], object], place: torch.device) -> int | None:
    """Bytes that this process, or torch's tensors on a CUDA device, hold at most while body() runs, beyond what is now.

    On CUDA that leaves out the context and what NCCL and other libraries take by themselves. None where nobody tells:
    of a CPU Linux alone does. `return_large_blocks` has to come before anything was allocated.
    """
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        body()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/status").exists():
        return None
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    body()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, what is resident; VmHWM, the most that ever was."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def return_large_blocks() -> None:
    """Has the allocator give every freed tensor back at once, at the price of time, so that peaks are those of tensors.

    Else glibc keeps blocks of up to 32 MiB for reuse, in pieces: a step of IResNet-18 that holds 401 MiB showed 591.
    """
    _glibc("mallopt", -3, 1 << 16)  # M_MMAP_THRESHOLD


def _return_free_memory() -> None:
    _glibc("malloc_trim", 0)  # freed small blocks that the allocator keeps would be reused and not be seen


def _glibc(function: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except AttributeError:  # another C library
        return


# ---- where


def describe(threads: int, device: str, compiles: bool) -> dict:
    """What a reader needs to know about the numbers; compiles: also whether torch.compile works, some seconds."""
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
        "device": place.type,
        "compiler": compiles and compiler_works(place.type),
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
