"""partial-fc benchmark backbone: what engine options do to a training step's time and memory, beside plain fp32."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from partial_fc import backbone
from partial_fc.benchmark.backbones import OPTIONS, PLAIN, Cell, build, data, measure_memory, settings_of
from partial_fc.benchmark.compare import paired, times_in_turn
from partial_fc.benchmark.measure import describe
from partial_fc.benchmark.ranks import on_ranks
from partial_fc.benchmark.table import print_backbone, print_header
from partial_fc.parallel import distributed

FOR_CUDA = ("tf32", "fp16")  # a CPU has no tf32, and takes 11 times as long with fp16 as with fp32 (torch 2.14)
TOGETHER = ("bf16+channels_last", "bf16+channels_last+compile")
NOTES = (
    "the backbone's forward, backward and SGD update on random images, without head and reader; /fp32: over fp32's",
    "MiB: kept between steps + peak of a step, the largest rank's. loss: of the last round, it tells variants apart "
    "that compute something else",
)


def benchmark_backbone(
    cell: Cell,
    variants: list[str] | None,
    *,
    rounds: int,
    threads: int,
    device: str,
    json_file: Path | None = None,
    markdown: bool = False,
) -> dict:
    """Measures a backbone's training step under each variant, prints a table, and returns (and writes) it as a dict.

    Time: all variants live in one process (one group of processes), and every round each makes a step, in an order
    that rotates; a ratio is the median of the rounds' ratios. Memory: a process (group) of its own for each variant.
    variants: engine options joined by +; None: all that can run. fp32 is always among them.

    Raises ValueError for unknown variants, backbones and sizes, RunError for a rank that failed.
    """
    if rounds < 1 or threads < 1:
        raise ValueError(f"--rounds and --threads are {rounds} and {threads}; both must be positive")
    _check(cell)
    speaks = distributed.rank() == 0
    if json_file is not None:
        with distributed.together("--json"):  # now, not after everything was measured
            json_file.touch()
    header = on_ranks(describe, cell.ranks, device, threads, device)[0] | {"rounds": rounds}
    variants = _runnable(variants, device, compiler=header.pop("compiler"))
    header["compiled"] = any(settings_of(variant).compile for variant in variants)
    if speaks:
        print_header(header, NOTES, markdown)
    group = [(cell, variant) for variant in variants]
    measured = times_in_turn(build, data, group, header["clock"], rounds, threads, device)
    plain = measured[0]
    for variant, result in zip(tqdm(variants, "memory", leave=False, disable=not speaks), measured, strict=True):
        result["time_ratio"] = paired(result, plain)
        held = on_ranks(measure_memory, cell.ranks, device, cell, variant, threads, device)
        result["kept"] = max(kept for kept, _ in held)
        result["peak"] = None if None in held[0] else max(peak for _, peak in held)
        result["memory"] = None if result["peak"] is None else max(map(sum, held))
        result["memory_ratio"] = None if result["memory"] is None else result["memory"] / plain["memory"]
    report = {"header": header, **asdict(cell), "variants": dict(zip(variants, measured, strict=True))}
    if speaks:
        print_backbone(cell, report["variants"], markdown)
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _check(cell: Cell) -> None:
    if min(cell.size, cell.batch, cell.ranks) < 1 or cell.batch % cell.ranks or cell.batch // cell.ranks < 2:
        raise ValueError(f"--batch {cell.batch} on {cell.ranks} ranks; wanted equal batches of 2 images or more")
    if distributed.world_size() not in (1, cell.ranks):
        raise ValueError(
            f"got {cell.ranks} ranks in a job of {distributed.world_size()}; under torchrun leave out --ranks, or run "
            "without torchrun: the command starts its ranks itself"
        )
    with torch.device("meta"):  # names and sizes that there are not, before anything is measured
        backbone.build(cell.name, cell.dim, (cell.size, cell.size))


def _runnable(variants: list[str] | None, device: str, compiler: bool) -> list[str]:
    """The variants to measure, plain fp32 first: those that were asked for, or all that can run here."""
    if variants is None:
        variants = [variant for variant in (*OPTIONS, *TOGETHER) if compiler or not settings_of(variant).compile]
        if device == "cpu":
            variants = [variant for variant in variants if variant not in FOR_CUDA]
    for variant in variants:
        settings = settings_of(variant)
        if settings.compile and not compiler:
            raise ValueError(f"--variants: torch.compile finds no compiler here; leave out {variant}")
        if settings.precision == "tf32" and device == "cpu":
            raise ValueError("--variants: tf32 is something that CUDA devices do; leave it out")
    return list(dict.fromkeys([PLAIN, *variants]))
