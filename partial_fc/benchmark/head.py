"""partial-fc benchmark head: PartialFC beside plain PyTorch, the published PartialFC v2 and the least that any head
computes, in time, memory and traffic, over sizes, sample rates and ranks."""

from dataclasses import asdict, dataclass
from itertools import product

import torch
from tqdm import tqdm

from partial_fc.benchmark.compare import Measuring, begin, finish, paired, times_in_turn
from partial_fc.benchmark.head_steps import LABELS, LIMITS, Cell, build, data, measure_memory
from partial_fc.benchmark.profile import profile_step
from partial_fc.benchmark.ranks import on_ranks
from partial_fc.benchmark.table import HEAD_NOTES, print_cell, print_growth, print_header, print_profile, print_targets
from partial_fc.head.matmul import Precision, check_precision
from partial_fc.parallel import distributed

# ours are compared with these
BASELINES = ("dense", "published", "limit", "limit-ours")
ON_CUDA = ("dense", "published", "recompute-compiled", "cache-fp32-compiled", "cache-bf16-compiled", "limit")
OURS = tuple(variant for variant in LABELS if variant not in BASELINES)


@dataclass(frozen=True)
class Target:
    """An upper bound on a ratio of ours to a baseline, in time or memory; `cached`: of a head with an exp cache."""

    cell: Cell
    measure: str  # time | memory
    against: str
    cached: bool
    at_most: float


README = (
    Cell(100_000, 512, 256, 1.0),
    Cell(100_000, 128, 256, 1.0),
    Cell(200_000, 512, 256, 0.1),
    Cell(100_000, 512, 256, 1.0, ranks=2),
    Cell(50_000, 512, 256, 1.0),
    Cell(200_000, 256, 256, 0.1),
)
# what the project set out to reach: recomputed, cached; None where nothing was set
WANTED = {
    README[0]: {"time/published": (0.30, 0.22), "time/limit": (1.5, 1.15), "memory/published": (0.30, 0.36)},
    README[1]: {
        "time/published": (0.22, 0.20),
        "time/limit": (1.4, 1.25),
        "memory/published": (0.20, 0.30),
        "time/dense": (0.40, None),
    },
    README[2]: {"time/published": (0.33, 0.25), "time/limit": (1.7, 1.4), "memory/published": (0.62, None)},
    README[3]: {"time/published": (0.38, 0.30), "time/limit": (1.35, 1.1), "memory/published": (0.28, None)},
    README[4]: {"time/dense": (0.50, None)},
    README[5]: {"time/dense": (0.38, None)},
}
TARGETS = tuple(
    Target(cell, *ratio.split("/"), cached, at_most)
    for cell, of_cell in WANTED.items()
    for ratio, pair in of_cell.items()
    for cached, at_most in zip((False, True), pair, strict=True)
    if at_most is not None
)

# sizes for a GPU; the README has those of rate 1
GPU = (
    *(Cell(1_000_000, 512, 1024, 1.0, precision=precision) for precision in ("bfloat16", "tf32", "float32")),
    *(Cell(1_000_000, 512, 1024, 0.1, precision=precision) for precision in ("bfloat16", "tf32")),
    *(Cell(100_000, 512, batch, 1.0, precision="bfloat16") for batch in (1024, 256)),
)

# 10^5 rows in use of more and more classes: a step should cost what its rows cost
ROWS = (Cell(1_000_000, 128, 256, 0.1), Cell(10_000_000, 128, 256, 0.01))
ROWS_AT_MOST = 1.2


def benchmark_head(
    cells: list[Cell],
    variants: list[str] | None,
    measuring: Measuring,
    *,
    targets: tuple[Target, ...] = (),
    growth: bool = False,
    profile: bool = False,
) -> dict:
    """Measures every variant in every cell, prints a table a cell, and returns (and writes) everything as one dict.

    Time: the variants of a cell live in one process (one group of processes), and every round each makes a step, in an
    order that rotates; a ratio is the median of the rounds' ratios. With several ranks a round's time is the median
    over ranks. Memory: a process (group) of its own for each variant, on CUDA one for all; the largest rank's.
    variants: None: all that can run. growth: the cells are one problem that grows; they are timed in turn with each
    other. profile: also where a step's time goes, of our variants on the first rank.

    Raises ValueError for unknown variants and sizes that cannot run, RunError for a rank that failed.
    """
    for cell in cells:
        _check(cell)
        check_precision(cell.precision, torch.float32, torch.device(measuring.device))
    unknown = [variant for variant in variants or () if variant not in LABELS]
    if unknown:
        raise ValueError(f"--variants: got {unknown[0]!r}; wanted some of {', '.join(LABELS)}")
    speaks, markdown = distributed.rank() == 0, measuring.markdown
    compiles = variants is None or any(variant.endswith("-compiled") for variant in variants)
    header, compiler = begin(measuring, compiles=compiles)
    variants = _runnable(variants, growth, compiler, measuring.device)
    report = {"header": header, "cells": []}
    if speaks:
        print_header(header, HEAD_NOTES, markdown)
    groups = [[(cell, variant) for cell in cells] for variant in variants] if growth else []
    for cell in [] if growth else cells:
        # plain PyTorch knows one process, and its products on a CPU no bfloat16 with a float32 result
        left_out = {"dense"} if cell.ranks > 1 else set()
        if cell.precision == "bfloat16" and measuring.device == "cpu":
            left_out |= set(LIMITS)
        groups.append([(cell, variant) for variant in variants if variant not in left_out])
    if not all(groups) or not groups:
        raise ValueError(
            "--variants: a cell has none left to run; dense is for one rank alone, a limit in bfloat16 for CUDA"
        )
    for group in groups:
        measured = _measure(group, header["clock"], measuring)
        results = {}
        for (cell, variant), result in zip(group, measured, strict=True):
            results.setdefault(cell, {})[variant] = result
        for cell, of_cell in results.items():
            _compare(cell, of_cell)
            report["cells"].append(asdict(cell) | {"rows": cell.rows, "variants": of_cell})
            if speaks:
                print_cell(cell, of_cell, markdown)
            for variant in of_cell if profile else ():
                if variant in OURS:
                    of_cell[variant]["profile"] = on_ranks(
                        profile_step, cell.ranks, measuring.device, cell, variant, measuring.threads, measuring.device
                    )[0]
                    if speaks:
                        print_profile(variant, of_cell[variant]["profile"], markdown)
        if growth:
            grown = _growth(group, measured)
            report.setdefault("growth", []).append(grown)
            if speaks:
                print_growth(grown)
    report["targets"] = [_reached(target, report["cells"]) for target in targets]
    if speaks:
        print_targets(report["targets"], markdown)
    finish(report, measuring)
    return report


def sweep(
    classes: list[int],
    dims: list[int],
    batches: list[int],
    rates: list[float],
    ranks: list[int],
    precisions: list[Precision],
) -> list[Cell]:
    return [Cell(*sizes) for sizes in product(classes, dims, batches, rates, ranks, precisions)]


def _check(cell: Cell) -> None:
    if min(cell.classes, cell.dim, cell.batch, cell.ranks) < 1 or not 0 < cell.rate <= 1:
        raise ValueError(f"got {cell}; wanted positive sizes and a rate in (0, 1]")
    if cell.batch % cell.ranks:
        raise ValueError(
            f"--batch {cell.batch} on {cell.ranks} ranks; the published head takes equal batches: give a multiple"
        )
    if cell.classes <= (cell.ranks - 1) * cell.classes_of_rank or cell.rows < 1:
        raise ValueError(f"got {cell}; wanted classes for every rank and at least one row in use: raise --classes")
    if distributed.world_size() > 1 and cell.ranks != distributed.world_size():
        raise ValueError(
            f"got {cell.ranks} ranks in a job of {distributed.world_size()}; under torchrun give --ranks "
            f"{distributed.world_size()}, or run without torchrun: the command starts its ranks itself"
        )


def _runnable(variants: list[str] | None, growth: bool, compiler: bool, device: str) -> list[str]:
    """The variants to measure: those that were asked for, or all that can run here; of a growing problem ours alone.

    On CUDA those that are of use there: its memory has to hold all of them at once, and the two limits are one.
    """
    if variants is None and device == "cuda" and compiler and not growth:
        return list(ON_CUDA)
    if variants is None:
        wanted = ["recompute", "recompute-compiled"] if growth else list(LABELS)
        return [variant for variant in wanted if compiler or not variant.endswith("-compiled")]
    if not compiler and any(variant.endswith("-compiled") for variant in variants):
        raise ValueError("--variants: torch.compile finds no compiler here; leave out those that end in -compiled")
    return variants


# ---- from clocks to figures


def _measure(group: list[tuple[Cell, str]], clock: str, measuring: Measuring) -> list[dict]:
    """Figures of contestants that are timed in turn, before they are compared."""
    results = times_in_turn(build, data, group, clock, measuring)
    # a limit holds the rows in use alone, that is no head's memory, and has no collectives
    heads = [contestant for contestant in group if contestant[1] not in LIMITS]
    # a process for each; on CUDA torch's allocator counts, to the byte, and one process does
    together = [heads] if measuring.device == "cuda" else [[head] for head in heads]
    measured = {}
    for part in tqdm(together, "memory", leave=False, disable=distributed.rank() > 0):
        device = measuring.device
        by_rank = on_ranks(measure_memory, part[0][0].ranks, device, part, measuring.threads, device) if part else []
        for head, *alone in zip(part, *by_rank, strict=True):
            measured[head] = alone
    for (cell, variant), result in zip(group, results, strict=True):
        alone = measured.get((cell, variant), [{"memory": None, "collectives": {}, "bytes": 0}])
        result |= alone[0]
        if result["memory"] is not None:
            result["memory"] = max(rank["memory"] for rank in alone)
        result["bytes_per_class"] = None if result["memory"] is None else result["memory"] / cell.classes_of_rank
    return results


def _compare(cell: Cell, results: dict[str, dict]) -> None:
    """Adds each variant's ratios to the baselines. `state`: to weight and momentum in float32, which any SGD keeps."""
    state = 2 * 4 * cell.dim * cell.classes_of_rank
    for result in results.values():
        result["time_ratio"], result["memory_ratio"] = {}, {}
        for name in BASELINES:
            if name not in results:
                continue
            result["time_ratio"][name] = paired(result, results[name])
            if result["memory"] and results[name]["memory"]:
                result["memory_ratio"][name] = result["memory"] / results[name]["memory"]
        if result["memory"]:
            result["memory_ratio"]["state"] = result["memory"] / state


def _growth(group: list[tuple[Cell, str]], measured: list[dict]) -> dict:
    """A variant's time in each cell over its time in the first."""
    return {
        "variant": group[0][1],
        "classes": [cell.classes for cell, _ in group],
        "time_ratio": [paired(result, measured[0]) for result in measured],
        "at_most": ROWS_AT_MOST,
    }


def _reached(target: Target, cells: list[dict]) -> dict:
    """A target and the ratios of the variants that it is about, in its cell."""
    wanted = asdict(target.cell)
    measured = {}
    for cell in cells:
        if all(cell[name] == value for name, value in wanted.items()):
            for variant in OURS:
                if variant.startswith("cache") != target.cached:
                    continue
                ratio = cell["variants"].get(variant, {}).get(f"{target.measure}_ratio", {}).get(target.against)
                if ratio is not None:
                    measured[variant] = ratio
    return asdict(target) | {"measured": measured}
