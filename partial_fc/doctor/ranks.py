"""The ranks together: do collectives give the right result, how fast, and do the clocks agree."""

import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from partial_fc.doctor.sheet import Found
from partial_fc.parallel import distributed

ROUNDS = 30
LARGE_BYTES = 16 * 2**20
LARGE_ROUNDS = 4
SKEW_SECONDS = 1.0  # from here on logs of several machines cannot be read side by side


def ranks_of_this_machine() -> int:
    """A collective."""
    return distributed.gather_objects(socket.gethostname()).count(socket.gethostname())


def collectives(device: torch.device) -> Found:
    """A collective. Raises RunError on this rank alone where the others cannot be reached."""
    rank, world_size = distributed.rank(), distributed.world_size()
    if world_size == 1:
        return Found(f"one process, {distributed.backend()}; start more with torchrun --nproc_per_node")
    try:
        wrong = _wrong_results(device)
        latency = statistics.median(_times(torch.ones(1, device=device), ROUNDS))
        seconds = min(_times(torch.ones(LARGE_BYTES // 4, device=device), LARGE_ROUNDS))
    except RuntimeError as error:
        raise distributed.RunError(distributed.unreachable(rank, error), on_all_ranks=False) from error
    wrong = [f"rank {r}: {names}" for r, names in enumerate(distributed.gather_objects(wrong)) if names]
    latency, seconds = distributed.all_reduce_max(torch.tensor([latency, seconds], device=device)).tolist()
    if wrong:
        return Found(f"wrong results of collectives: {'; '.join(wrong)}: try another network interface", "problem")
    moved = 2 * (world_size - 1) / world_size * LARGE_BYTES  # by each rank, in a ring
    interfaces = [
        f"{name}={os.environ[name]}" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ
    ]
    return Found(
        f"{world_size}, {distributed.backend()}, collectives give the right results; all-reduce of 4 bytes "
        f"{latency * 1e6:.0f} us, of {LARGE_BYTES >> 20} MiB {seconds * 1e3:.1f} ms, {moved / seconds / 1e9:.2f} GB/s "
        f"for each rank{''.join(', ' + name for name in interfaces)}"
    )


def _wrong_results(device: torch.device) -> str:
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = torch.full((3,), rank + 1.0, device=device)
    all_ranks = torch.arange(1.0, world_size + 1, device=device)
    right = {
        "all-reduce": distributed.all_reduce_sum(mine.clone()).eq(all_ranks.sum()).all(),
        "all-gather": distributed.all_gather(mine).eq(all_ranks.unsqueeze(1)).all(),
        "reduce-scatter": distributed.reduce_scatter_sum(all_ranks.clone()).eq(world_size * (rank + 1)).all(),
    }
    return ", ".join(name for name, ok in right.items() if not ok)


def _times(tensor: Tensor, rounds: int) -> list[float]:
    """Seconds of each all-reduce of `tensor` after a first one, which connects."""
    times = []
    for _ in range(rounds + 1):
        times.append(timed(lambda: distributed.all_reduce_max(tensor), tensor.device))
    return times[1:]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, on the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def clocks() -> Found:
    """A collective: what each rank's clock says right after a barrier."""
    return compare_clocks(_clock_readings())


def _clock_readings() -> list[float]:
    distributed.barrier()  # the first may still connect
    distributed.barrier()
    return distributed.gather_objects(time.time())


def compare_clocks(readings: list[float]) -> Found:
    """readings (W,): seconds, taken at about the same moment."""
    skew = max(readings) - min(readings)
    if skew > SKEW_SECONDS:
        behind, ahead = readings.index(min(readings)), readings.index(max(readings))
        return Found(
            f"rank {behind}'s clock is {skew:.1f} s behind rank {ahead}'s: logs of the machines cannot be compared, "
            "and signed requests to object storage may be refused; set them by NTP",
            "warning",
        )
    return Found(f"within {max(skew, 0.001):.3f} s of each other")
