"""From every rank's clocks to figures: a round's time over the ranks, ratios within rounds; a report's two ends."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from partial_fc.benchmark.measure import describe, time_in_turn
from partial_fc.benchmark.ranks import on_ranks
from partial_fc.parallel import distributed


@dataclass(frozen=True)
class Measuring:
    """How it is measured, and what becomes of it: rounds, threads a rank, cpu or cuda; a file, a table in Markdown."""

    rounds: int
    threads: int
    device: str
    json_file: Path | None = None
    markdown: bool = False


def begin(measuring: Measuring, *, compiles: bool) -> tuple[dict, bool]:
    """The report's header, and whether torch.compile works; compiles: look for that.

    Raises ValueError for numbers and files that will not do: now, not after everything was measured.
    """
    rounds, threads, device = measuring.rounds, measuring.threads, measuring.device
    if rounds < 1 or threads < 1:
        raise ValueError(f"--rounds and --threads are {rounds} and {threads}; both must be positive")
    if measuring.json_file is not None:
        with distributed.together("--json"):
            measuring.json_file.touch()
    header = on_ranks(describe, distributed.world_size(), device, threads, device, compiles)[0] | {"rounds": rounds}
    return header, header.pop("compiler")


def finish(report: dict, measuring: Measuring) -> None:
    if measuring.json_file is not None and distributed.rank() == 0:
        measuring.json_file.write_text(json.dumps(report, indent=1) + "\n")


def times_in_turn(build: Callable, data: Callable, group: list[tuple], clock: str, measuring: Measuring) -> list[dict]:
    """`measure.time_in_turn` on the ranks of the group's cells: a dict a contestant.

    `clocks`: a spread of the rounds' milliseconds for each clock, of a round the median over ranks; `time`: that of
    `clock`; `loss`: the mean over ranks, None where there is none.
    """
    ranks, device = group[0][0].ranks, measuring.device
    by_rank = on_ranks(time_in_turn, ranks, device, build, data, group, measuring.rounds, measuring.threads, device)
    out = []
    for ranked in zip(*by_rank, strict=True):
        clocks = {}
        for name in ranked[0]["clocks"]:
            rounds_of_ranks = zip(*(rank["clocks"][name] for rank in ranked), strict=True)
            clocks[name] = spread([median(of_round) for of_round in rounds_of_ranks])
        losses = [rank["loss"] for rank in ranked]
        out.append({"clocks": clocks, "time": clocks[clock], "loss": None if None in losses else fmean(losses)})
    return out


def spread(milliseconds: list[float]) -> dict:
    return {
        "median": median(milliseconds),
        "low": min(milliseconds),
        "high": max(milliseconds),
        "rounds": milliseconds,
    }


def paired(one: dict, other: dict) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(one["time"]["rounds"], other["time"]["rounds"], strict=True))
