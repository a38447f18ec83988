"""How much memory is there: of a CUDA device, or of this machine within the limits of this process's cgroups."""

import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Pool(NamedTuple):
    """Memory that processes share."""

    key: str  # equal in all processes that share it
    what: str
    free: int  # bytes that can still be taken


def pools(device: torch.device) -> list[Pool]:
    """Of the CUDA device; for a CPU the machine's memory and every limited cgroup above this process."""
    host = socket.gethostname()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        properties = torch.cuda.get_device_properties(device)
        return [Pool(f"{host} {properties.uuid}", f"{properties.name} {device.index} of {host}", free)]
    return [*_machine(host), *_cgroups(host)]


def shortage(wants: Sequence[Sequence[tuple[Pool, int]]]) -> str | None:
    """The first pool that does not hold what all ranks want of it, in words; None where all hold it.

    wants: for each rank its pools, and the bytes that it wants of each.
    """
    for key in dict.fromkeys(pool.key for of_rank in wants for pool, _ in of_rank):
        shared = [(rank, *want) for rank, of_rank in enumerate(wants) for want in of_rank if want[0].key == key]
        needed, free = sum(needed for _, _, needed in shared), min(pool.free for _, pool, _ in shared)
        if needed > free:
            ranks, what = {rank for rank, _, _ in shared}, shared[0][1].what
            who = "" if len(wants) == 1 else f" of rank {min(ranks)}" if len(ranks) == 1 else f" of {len(ranks)} ranks"
            return f"the class centers{who} need {size_text(needed)} of {what}, {size_text(free)} are available"
    return None


def size_text(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" or count >= 100 else f"{count:.1f} {units[0]}"


def _machine(host: str) -> Iterable[Pool]:
    free = _numbers(PROC / "meminfo").get("MemAvailable:")
    if free is not None:  # not Linux
        yield Pool(host, f"the memory of {host}", free * 1024)


def _cgroups(host: str) -> Iterable[Pool]:
    """Both versions. What they hold of files counts as free: the kernel drops it first."""
    for root, path, names in _hierarchies():
        limit_name, usage_name, of_files = names
        # in a container the mount may begin at its own cgroup, of which /proc gives the path on the host
        for folder in dict.fromkeys((root / path, *(root / path).parents)):
            if not folder.is_relative_to(root):
                break
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is None or usage is None or limit >= 1 << 60:  # "max", and what version 1 has for it
                continue
            stat = _numbers(folder / "memory.stat")
            free = limit - usage + sum(stat.get(name, 0) for name in of_files)
            where = folder.stat()
            what = f"the {size_text(limit)} that {folder / limit_name} on {host} allows"
            yield Pool(f"{host} cgroup {where.st_dev}:{where.st_ino}", what, max(free, 0))


def _hierarchies() -> Iterable[tuple[Path, str, tuple[str, str, tuple[str, str]]]]:
    """Where memory is limited: the root, this process's path below it, the names of limit, usage, file pages."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        path = path.lstrip("/")
        if controllers == "":
            yield CGROUPS, path, ("memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            files = ("total_inactive_file", "total_active_file")
            yield CGROUPS / "memory", path, ("memory.limit_in_bytes", "memory.usage_in_bytes", files)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name, a number and possibly a unit."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
