"""partial-fc study table: mean and range over the seeds, and paired differences from one row."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from partial_fc.study import ledger
from partial_fc.study.choice import JUDGED_BY, ended, tuned_values, untunable
from partial_fc.study.plan import Plan, Row, load_plan

MEASURES = {
    "TAR@1e-4": lambda result: result["tar_at_far"]["0.0001"],
    "DIR@1%": lambda result: result["dir_at_far"]["0.01"],
    "rank-1": lambda result: result["rank1"],
}


@dataclass(frozen=True)
class Line:
    """What is known of a row: the values of every column by seed, and how far it is."""

    name: str
    tuned: dict[str, Any] | None  # what it has from tuning
    values: dict[str, dict[int, float]]  # column: seed: value
    state: str  # "" for a complete row
    against: str | None


def study_table(path: Path, ledger_file: Path, markdown: bool = False, against: str | None = None) -> str:
    """The table of a plan as far as its ledger goes.

    Each cell: mean (lowest–highest) of the seeds, the value itself for one seed. Below, the same of the differences
    from the row that each is compared with, taken seed by seed. A range that holds 0 shows no difference; one that does
    not may still be chance (1 in 4, of three seeds without a difference). Data sets that are not here are taken to be
    those of the ledger. `against`: the row that all are compared with; None, each with its own.

    Raises ValueError where the plan has no such row, and what `load_plan` does.
    """
    plan, entries = _load(path, ledger_file)
    lines = _lines(plan, entries, against)
    columns = list(lines[0].values)
    seeds = len(plan.seeds)
    text = [f"mean (range) of {seeds} seed{'s' * (seeds > 1)}, or of those that are done", ""]
    rows = [[line.name, _tuned(line), *(cell(line.values[column].values()) for column in columns)] for line in lines]
    text += _format(["", "tuned", *columns], rows, markdown)
    by_name = {line.name: line for line in lines}
    pairs = [(line, by_name[line.against]) for line in lines if line.against not in (None, line.name)]
    if pairs:
        text += [
            "",
            "differences, seed by seed; a range that holds 0 shows none, by chance 1 in 4 without any does not",
            "",
        ]
        rows = [
            [line.name, other.name, *(cell(differences(line, other, column), signed=True) for column in columns)]
            for line, other in pairs
        ]
        text += _format(["", "from", *columns], rows, markdown)
    text += ["", *_notes(plan, lines, entries)]
    return "\n".join(text)


def load_lines(path: Path, ledger_file: Path, against: str | None = None) -> list[Line]:
    """The rows of a plan with what its ledger has of them; against and errors as of `study_table`."""
    plan, entries = _load(path, ledger_file)
    return _lines(plan, entries, against)


def _load(path: Path, ledger_file: Path) -> tuple[Plan, dict[str, dict]]:
    entries = ledger.read(ledger_file)
    return load_plan(path, ledger.recorded_data(entries)), entries


def _lines(plan: Plan, entries: dict[str, dict], against: str | None) -> list[Line]:
    names = [row.name for row in plan.rows]
    if against not in (None, *names):
        raise ValueError(f"{plan.path} has no row {against!r}; there are {', '.join(names)}")
    lines = [_line(plan, row, entries) for row in plan.rows]
    return lines if against is None else [replace(line, against=against) for line in lines]


def differences(line: Line, reference: Line, column: str) -> list[float]:
    """line - reference, of the seeds that both have."""
    ours, theirs = line.values[column], reference.values[column]
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def cell(values, signed: bool = False) -> str:
    """Mean (lowest–highest); the value alone where there is one, – where there is none."""
    values = list(values)
    if not values:
        return "–"
    sign = "+" if signed else ""
    mean = f"{sum(values) / len(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{sign}.3f}–{max(values):{sign}.3f})"


def _line(plan: Plan, row: Row, entries: dict[str, dict]) -> Line:
    tuned = tuned_values(plan, row, entries)
    values = {f"{name} {measure}": {} for name in plan.base["evaluate"]["sets"] for measure in MEASURES}
    seeds, failed = [], []
    for trial in [] if tuned is None else plan.final_trials(row, tuned):
        entry = entries.get(trial.digest)
        if entry is None:
            continue
        if entry["status"] == ledger.FAILED:
            failed.append(trial.seed)
            continue
        seeds.append(trial.seed)
        for name, result in entry["result"].items():
            if f"{name} {next(iter(MEASURES))}" not in values:
                raise ValueError(
                    f"the ledger's entry {trial.digest} is of the set {name!r}, which {plan.path} does not have: mend "
                    "or delete that line"
                )
            for measure, of in MEASURES.items():
                if of(result) is not None:
                    values[f"{name} {measure}"][trial.seed] = of(result)
    if untunable(plan, row, entries):
        state = "every tuning trial failed"
    elif tuned is None:
        state = "not tuned yet" if row.tuned_as is None else f"waits for the tuning of {row.tuned_as}"
    else:
        parts = [] if len(seeds) == len(plan.seeds) else [f"{len(seeds)} of {len(plan.seeds)} seeds"]
        parts += [f"seed {seed} failed" for seed in failed]
        state = ", ".join(parts)
    own = None if tuned is None else {name: value for name, value in tuned.items() if name not in row.overrides}
    return Line(row.name, own, values, state, row.against)


def _tuned(line: Line) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in (line.tuned or {}).items()) or "–"


def _notes(plan: Plan, lines: list[Line], entries: dict[str, dict]) -> list[str]:
    notes = [f"{line.name}: {line.state}" for line in lines if line.state]
    notes += [f"{line.name}: {name} {value} is at the edge of its grid" for line, name, value in _edges(plan, lines)]
    found = ended(plan, entries)
    notes += [f"failed: {trial}: {entry['error']}" for trial, entry in found if entry["status"] == ledger.FAILED]
    if plan.tuning is not None:
        points = len(plan.tuning_trials(plan.rows[0]))
        notes.append(
            f"tuned on seed {plan.tuning.seed}, {points} points a row at 1/{plan.tuning.shorter:g} of the schedule, by "
            f"{JUDGED_BY}"
        )
    if found:
        hours = sum(entry["seconds"] for _, entry in found) / 3600
        devices = _counted(entry.get("device", "cpu") for _, entry in found)  # early entries do not say it
        commits = _counted(_commit(entry["commit"]) for _, entry in found)
        notes.append(
            f"{len(found)} trials, {hours:.1f} hours of one process each, on {devices}; commits (trials): {commits}"
        )
    return notes


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in Counter(names).items())


def _edges(plan: Plan, lines: list[Line]) -> list[tuple[Line, str, Any]]:
    """Tuned values at the end of three or more numbers that were tried: a better one may lie beyond."""
    found = []
    for row, line in zip(plan.rows, lines, strict=True):
        for name, value in (line.tuned or {}).items():
            tried = row.grid.get(name, [])
            if not all(isinstance(one, int | float) for one in tried):
                continue
            if len(tried) > 2 and value in (min(tried), max(tried)):
                found.append((line, name.rpartition(".")[2], value))
    return found


def _commit(text: str) -> str:
    """Short, but it says where the code was not that of the commit."""
    commit, dirty, _ = text.partition("-dirty")
    return commit[:12] + dirty


def _format(head: list[str], rows: list[list[str]], markdown: bool) -> list[str]:
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        return ["| " + " | ".join(line) + " |" for line in lines]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *rows]
    ]
