"""From every rank's clocks to figures: a round's time over the ranks, and ratios within rounds."""

from collections.abc import Callable
from statistics import median

from partial_fc.benchmark.measure import time_in_turn
from partial_fc.benchmark.ranks import on_ranks


def times_in_turn(
    build: Callable, data: Callable, group: list[tuple], clock: str, rounds: int, threads: int, device: str
) -> list[dict]:
    """`measure.time_in_turn` on the ranks of the group's cells: a dict a contestant.

    `clocks`: a spread of the rounds' milliseconds for each clock, of a round the median over ranks; `time`: that of
    `clock`; `loss`, `collectives` and `bytes` of the first rank.
    """
    by_rank = on_ranks(time_in_turn, group[0][0].ranks, device, build, data, group, rounds, threads, device)
    out = []
    for ranked in zip(*by_rank, strict=True):
        clocks = {}
        for name in ranked[0]["clocks"]:
            rounds_of_ranks = zip(*(rank["clocks"][name] for rank in ranked), strict=True)
            clocks[name] = spread([median(of_round) for of_round in rounds_of_ranks])
        first = {name: ranked[0][name] for name in ("loss", "collectives", "bytes")}
        out.append({"clocks": clocks, "time": clocks[clock], **first})
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
