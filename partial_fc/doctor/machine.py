"""The machine of a rank: packages, devices, cores, shared memory."""

import os
import re
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from partial_fc.config import Config
from partial_fc.data.reader import MORE_SHARED_MEMORY, SHARED_MEMORY
from partial_fc.doctor.sheet import Found
from partial_fc.environment import environment
from partial_fc.memory import size_text

DEVICES = Path("/dev")
DOCKERS_DEFAULT = 64 * 2**20  # of /dev/shm in a container


def packages() -> Found:
    """Installed versions against those that the package's metadata, which is pyproject.toml's, wants."""
    try:
        wanted = [Requirement(line) for line in metadata.requires("partial_fc") or []]
    except metadata.PackageNotFoundError:
        return Found("partial_fc is not installed, so versions were not compared: pip install -e .", "warning")
    wrong = []
    for requirement in wanted:
        optional = requirement.marker is not None  # of an extra: wrong only if it is there in another version
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong += [] if optional else [f"{requirement.name} is missing, wanted {requirement.specifier}"]
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
    if wrong:
        return Found(f"{'; '.join(wrong)}: pip install -c constraints.txt -e . in the repository", "problem")
    versions = {name: version for name, version in environment().items() if name != "git_commit"}
    return Found(", ".join(f"{name} {version}" for name, version in versions.items()) + ": as pyproject.toml wants")


def device_of(device: torch.device) -> Found:
    """What this rank computes on."""
    if device.type != "cuda":
        present = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
        if present:
            built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            return Found(
                f"{', '.join(present)} in {DEVICES}, but torch, built {built}, reaches no CUDA device: see "
                "nvidia-smi, the driver's version, and CUDA_VISIBLE_DEVICES",
                "problem",
            )
        return Found("CPU; torch sees no CUDA device (in a container: was it started with --gpus all?)")
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    text = (
        f"{torch.cuda.device_count()} x {properties.name}, {size_text(total)}, compute capability "
        f"{properties.major}.{properties.minor}; driver {_driver()}, CUDA {torch.version.cuda}"
    )
    if free < 0.9 * total:
        return Found(f"{text}; only {size_text(free)} are free: another process holds memory", "warning")
    return Found(text)


def _driver() -> str:
    try:
        found = re.search(r"\d+\.\d[\d.]*", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found.group() if found else "unknown"


def cores() -> int:
    """CPU cores that this process may use, a container's limit included."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup of version 2
        return allowed


def cpu(ranks_here: int, config: Config | None) -> Found:
    """ranks_here: ranks on this machine."""
    threads, count = torch.get_num_threads(), cores()
    workers = "" if config is None else f", data.workers {config.data.workers} each"
    text = (
        f"{count} cores; ranks on this machine: {ranks_here}, torch's threads: {threads} each{workers}; "
        f"OMP_NUM_THREADS is {os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )
    if ranks_here * threads > count:
        fitting = max(1, count // ranks_here)
        return Found(
            f"{text}: more threads than cores slow all ranks down; export OMP_NUM_THREADS={fitting}", "warning"
        )
    return Found(text)


def shared_memory(ranks_here: int, config: Config | None, batch_bytes: int) -> Found:
    """Reader processes hand over their batches in /dev/shm. batch_bytes: of the images of a rank's batch, or 0."""
    if not SHARED_MEMORY.is_dir():
        return Found(f"there is no {SHARED_MEMORY}: give data.workers=0, or mount a tmpfs there", "warning")
    stat = os.statvfs(SHARED_MEMORY)
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    text = f"{size_text(free)} of {size_text(total)} are free in {SHARED_MEMORY}"
    if config is None or not batch_bytes:
        little = total <= DOCKERS_DEFAULT
        return Found(
            f"{text}: little for readers; {MORE_SHARED_MEMORY}" if little else text, "warning" if little else "ok"
        )
    batches = config.data.workers * (config.data.prefetch + 1)  # ahead, and one that is being written
    needed = ranks_here * batches * batch_bytes
    text += f", batches that are read ahead take up to {size_text(needed)}"
    if needed > free:
        return Found(f"{text}: {MORE_SHARED_MEMORY}, or lower data.workers or data.prefetch", "problem")
    return Found(text)
