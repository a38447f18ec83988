"""Pairwise cases of a test: `make test` runs every pair of values once, `make soak` the rest of the full product."""

from collections.abc import Callable, Sequence
from itertools import combinations, product

import pytest

Row = tuple[int, ...]  # of each parameter the position of its value


def pairs(row: Row) -> set[tuple]:
    """The pairs of values in a row; of a single parameter its value."""
    cells = list(enumerate(row))
    return set(combinations(cells, min(2, len(cells))))


def covering(rows: Sequence[Row]) -> list[Row]:
    """Of `rows` a few that hold every pair of values that any row holds: the one with most new pairs, again and again.

    The first of equals is taken, so the choice is the same everywhere.
    """
    left = set().union(*map(pairs, rows))
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(left & pairs(row)))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def pairwise(part: str, **parameters: Sequence) -> Callable:
    """As pytest.mark.parametrize of all `parameters` at once; what no pair needs is marked soak(part).

    A dictionary is named by its items. The test keeps {id: row} of the whole product in `pairwise`, for the test of the
    coverage.
    """
    values = [list(some) for some in parameters.values()]
    rows = list(product(*(range(len(some)) for some in values)))
    chosen = set(covering(rows))

    def name_of(row: Row) -> str:
        cells = [some[position] for some, position in zip(values, row, strict=True)]
        return "-".join(
            ",".join(f"{k}={v}" for k, v in cell.items()) if isinstance(cell, dict) else str(cell) for cell in cells
        )

    cases = [
        pytest.param(
            *(some[position] for some, position in zip(values, row, strict=True)),
            id=name_of(row),
            marks=() if row in chosen else pytest.mark.soak(part),
        )
        for row in rows
    ]

    def decorate(test: Callable) -> Callable:
        test.pairwise = {name_of(row): row for row in rows}
        return pytest.mark.parametrize(",".join(parameters), cases)(test)

    return decorate
