"""Where the time of a step goes: torch's profiler over a few steps of one variant."""

import torch

from partial_fc.benchmark.head_steps import Cell, build, data
from partial_fc.benchmark.measure import WARM_UP, place_of

STEPS = 3
SHOWN = 12  # operations; the rest is summed up


def profile_step(cell: Cell, variant: str, threads: int, device: str) -> list[dict]:
    """This rank's operations, the longest first: `operation`, `ms` a step without what it calls, `calls` a step.

    CPU time, on CUDA the device's. The profiler itself adds to operations that are short and many.
    """
    torch.set_num_threads(threads)
    place = place_of(device)
    head = build(variant, cell, place)
    batches = [data(variant, cell, step, place) for step in range(WARM_UP + STEPS)]
    for batch in batches[:WARM_UP]:
        head.step(*batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for batch in batches[WARM_UP:]:
            head.step(*batch)
        if place.type == "cuda":
            torch.cuda.synchronize()
    clock = "self_device_time_total" if place.type == "cuda" else "self_cpu_time_total"
    found = [
        {"operation": event.key, "ms": getattr(event, clock) / 1e3 / STEPS, "calls": round(event.count / STEPS)}
        for event in profile.key_averages()
    ]
    found.sort(key=lambda one: -one["ms"])
    rest = found[SHOWN:]
    others = {"operation": f"{len(rest)} others", "calls": sum(one["calls"] for one in rest)}
    return [*found[:SHOWN], others | {"ms": sum(one["ms"] for one in rest)}]
