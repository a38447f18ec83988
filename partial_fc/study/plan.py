"""What a study runs: a plan in YAML, and the trials it comes to.

    base: base.yaml                  a config beside the plan; its evaluate.sets are the test sets
    reference: softmax               the row that differences are taken from
    first: [softmax]                 rows that are run before the others
    seeds: [1, 2, 3]                 of the final runs
    tuned_in: other.yaml             instead of tuning: a plan whose tuned values rows take over, see tuned_as
    tuning:                          unset: every row is run as it stands
      seed: 0
      shorter: 3                     run.epochs is divided by it
      sets: {name: data set folder}  what the tuning runs are evaluated on
      grids:                         all of one size: every row has the same budget
        scaled: {optim.lr: [0.1, 0.2], head.margin.scale: [16, 32]}
    rows:
      softmax: {head.margin.name: softmax, grid: plain}

A row is config overrides, besides `grid` (unset: the first one), `against`, a row to take differences from instead of
the reference, and `tuned_as`, the row of the plan `tuned_in` whose tuned values this one has where it gives none. A
trial is one training run; its digest is that of everything given that its result may depend on, with data sets by their
fingerprints. Equal trials of two plans are one.
"""

import copy
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from partial_fc import strict_yaml
from partial_fc.build import build_losses, own_code
from partial_fc.config import Config, EvaluationSet, Section, check_config
from partial_fc.data.shards import load_index
from partial_fc.documents import read_text
from partial_fc.files import shortened
from partial_fc.head.named import source_of

TUNING, FINAL = "tuning", "final"
MOST_POINTS = 1000  # of a grid


class Tuning(Section):
    seed: int
    shorter: float = Field(ge=1)
    sets: dict[str, str] = Field(min_length=1)
    grids: dict[str, dict[str, list]] = Field(min_length=1)


class PlanFile(Section):
    base: str
    rows: dict[str, dict[str, Any]] = Field(min_length=1, max_length=1000)
    seeds: list[int] = Field(min_length=1, max_length=1000)
    reference: str | None = None
    first: list[str] = []
    tuned_in: str | None = None
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Row:
    name: str
    overrides: dict[str, Any]  # dotted names
    grid: dict[str, list]  # {} without tuning
    against: str | None  # the row that its differences are taken from
    tuned_as: str | None  # the row of Plan.tuned_in whose tuned values it has


@dataclass(frozen=True)
class Trial:
    row: str
    stage: str  # TUNING or FINAL
    overrides: dict[str, Any]  # the row's
    tuned: dict[str, Any]  # this trial's point of the grid
    seed: int
    epochs: float
    samples: float  # that it trains on, repetitions counted: what it costs
    values: dict  # of its config, nested, without run.dir
    data: dict[str, list]  # every data set folder: its fingerprint and number of samples
    digest: str

    def __str__(self) -> str:
        tuned = "".join(f" {name.rpartition('.')[2]}={value}" for name, value in self.tuned.items())
        return f"{self.row}, {self.stage}{tuned} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    path: Path
    base: dict
    rows: list[Row]
    seeds: list[int]
    first: list[str]  # rows that are run before the others
    tuning: Tuning | None
    tuned_in: "Plan | None"
    recorded: dict[str, list]  # as in Trial.data, for data sets that are not here

    def tuning_trials(self, row: Row) -> list[Trial]:
        """One a point of the row's grid, in the grid's order; none without tuning."""
        if self.tuning is None:
            return []
        sets = {name: {"data": data} for name, data in self.tuning.sets.items()}
        points = [dict(zip(row.grid, point, strict=True)) for point in itertools.product(*row.grid.values())]
        return [self._trial(row, TUNING, point, self.tuning.seed, self.tuning.shorter, sets) for point in points]

    def final_trials(self, row: Row, tuned: dict[str, Any]) -> list[Trial]:
        """One a seed, with the tuned values that the row does not give itself."""
        tuned = {name: value for name, value in tuned.items() if name not in row.overrides}
        return [self._trial(row, FINAL, tuned, seed, 1, None) for seed in self.seeds]

    def final_samples(self, row: Row) -> float:
        """What one final run costs; tuning does not change it."""
        return self._trial(row, FINAL, {}, self.seeds[0], 1, None).samples

    def _trial(self, row: Row, stage: str, tuned: dict, seed: int, shorter: float, sets: dict | None) -> Trial:
        values = copy.deepcopy(self.base)
        for name, value in (row.overrides | tuned | {"run.seed": seed}).items():
            put(values, name, value)
        epochs = values["run"]["epochs"] / shorter
        put(values, "run.epochs", epochs)
        if sets is not None:
            put(values, "evaluate.sets", sets)
        data: dict[str, list] = {}

        def fingerprint(folder: str) -> str:
            data[folder] = self._facts(folder)
            return data[folder][0]

        found = digest(values, fingerprint)
        samples = epochs * data[values["data"]["train"]][1]
        return Trial(row.name, stage, row.overrides, tuned, seed, epochs, samples, values, data, found)

    def _facts(self, folder: str) -> list:
        try:
            return _index_facts(folder)
        except FileNotFoundError as error:
            if folder not in self.recorded:
                raise FileNotFoundError(f"{self.path}: {error}") from None
            return self.recorded[folder]


def load_plan(
    path: Path, recorded: dict[str, list] | None = None, *, for_plan: Path | None = None, trust_code: bool = False
) -> Plan:
    """Reads and checks a plan, every config in it included.

    recorded: the data of earlier trials (see Trial), which stands for data sets that are not here. for_plan: the plan
    that takes its tuned values from this one. trust_code: whether losses that are given as module.Class are imported
    and checked, too, as training does.

    Raises ValueError or OSError that says what is wrong: an unknown key, a row whose config is not valid, grids
    of different sizes. A data set that is missing is said when trials are made.
    """
    path = Path(path)
    try:
        given = PlanFile.model_validate(_read_yaml(path))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise ValueError(f"{path} is no plan: {problems}") from None
    base = _read_base(path.parent / given.base)
    grids = {} if given.tuning is None else given.tuning.grids
    sizes = {name: math.prod(len(values) for values in grid.values()) for name, grid in grids.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values() or max(sizes.values(), default=1) > MOST_POINTS:
        raise ValueError(
            f"{path}: the grids have {sizes} points; wanted one number for all, the same budget for all, and at most "
            f"{MOST_POINTS}"
        )
    if for_plan is not None and given.tuned_in is not None:
        raise ValueError(f"{path} has tuned_in, and {for_plan} names it there: wanted a plan with tuning of its own")
    tuned_in = None
    if given.tuned_in is not None:
        tuned_in = load_plan(path.parent / given.tuned_in, recorded, for_plan=path, trust_code=trust_code)
    if tuned_in is not None and given.tuning is not None:
        raise ValueError(f"{path} has both tuning and tuned_in: take one of them away")
    if given.tuning is not None:
        test = {one["data"] for one in base["evaluate"]["sets"].values()}
        if both := sorted(test & set(given.tuning.sets.values())):
            raise ValueError(f"{path}: tuning sees {', '.join(both)}, which is a test set: take validation sets")
        if given.tuning.seed in given.seeds:
            raise ValueError(f"{path}: seed {given.tuning.seed} is of tuning and of the final runs: take another one")
    if unknown := [name for name in given.first if name not in given.rows]:
        raise ValueError(f"{path}: first names {', '.join(unknown)}, which is no row")
    rows = []
    for name, overrides in given.rows.items():
        overrides = {"against": given.reference} | overrides
        grid, against, tuned_as = (overrides.pop(key, None) for key in ("grid", "against", "tuned_as"))
        for key, value in (("grid", grid), ("against", against), ("tuned_as", tuned_as)):
            if not isinstance(value, str | None):
                raise ValueError(f"{path}: row {name}: {key}: got {shortened(value)}, wanted a name")
        known = [] if tuned_in is None else [other.name for other in tuned_in.rows]
        if tuned_as is not None and tuned_as not in known:
            raise ValueError(
                f"{path}: row {name}: tuned_as {tuned_as!r} is no row of tuned_in; "
                f"there are {', '.join(known) or 'none'}"
            )
        if against is not None and against not in given.rows:
            raise ValueError(f"{path}: row {name}: {against!r}, which its differences are taken from, is no row")
        if grid is not None and grid not in grids:
            raise ValueError(f"{path}: row {name}: there is no grid {grid!r}; there are {', '.join(grids) or 'none'}")
        row = Row(name, overrides, grids[grid or next(iter(grids))] if grids else {}, against, tuned_as)
        try:
            _check_row(base, row, trust_code)
        except ValueError as error:
            raise ValueError(f"{path}: row {name}: {error}") from None
        rows.append(row)
    return Plan(path, base, rows, given.seeds, given.first, given.tuning, tuned_in, recorded or {})


def put(values: dict, name: str, value: Any) -> None:
    """Sets a.b.c in nested `values`."""
    *sections, last = name.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ValueError(f"{name}: {section} is no section")
    values[last] = value


def config_of(trial: Trial, run: Path) -> Config:
    """The trial's config, in the run folder `run`."""
    values = copy.deepcopy(trial.values)
    put(values, "run.dir", str(run))
    return check_config(values, str(trial))


def digest(values: dict, fingerprint) -> str:
    """16 hexadecimal digits: equal for equal given settings, whatever does not touch the result left out.

    `fingerprint(folder)` stands for a data set, their files for losses given as module.Class. Defaults are not in it: a
    setting that a later version adds, and that nobody gives, changes no digest.
    """
    kept = copy.deepcopy(values)
    for section in ("checkpoint", "track"):
        kept.pop(section, None)
    kept.get("run", {}).pop("dir", None)
    for name in ("workers", "prefetch"):
        kept["data"].pop(name, None)
    kept["data"]["train"] = fingerprint(kept["data"]["train"])
    head = kept.get("head", {})
    losses = {f"{name}_source": name for name in head.get("embedding_losses") or {}}
    for key, name in {"margin_source": head.get("margin", {}).get("name", ""), **losses}.items():
        if source := source_of(name):
            kept[key] = hashlib.sha256(source.read_bytes()).hexdigest()
    evaluate = kept.pop("evaluate", None) or {}
    sets = {name: EvaluationSet.model_validate(one) for name, one in evaluate.get("sets", {}).items()}
    kept["evaluate"] = {
        "sets": {
            name: [fingerprint(one.data), one.distractors and fingerprint(one.distractors)]
            for name, one in sets.items()
        },
        "flip": evaluate.get("flip", False),
    }
    return hashlib.sha256(json.dumps(_plain(kept), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """30 and 30.0 are one number."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_row(base: dict, row: Row, trust_code: bool) -> None:
    """Raises ValueError where one of the row's configs is not valid, at any point of its grid."""
    for point in itertools.product(*row.grid.values()):
        values = copy.deepcopy(base)
        for name, value in (row.overrides | dict(zip(row.grid, point, strict=True))).items():
            put(values, name, value)
        config = check_config(values, "its config")
        if not isinstance(values["run"].get("epochs"), int | float):
            raise ValueError(f"run.epochs: got {shortened(values['run'].get('epochs'))}, wanted a number")
        if config.checkpoint.dir:
            raise ValueError(
                "checkpoint.dir is set: a study's runs would go on from each other's checkpoints; unset it"
            )
        if trust_code or not own_code(config):
            build_losses(config)


@cache
def _index_facts(folder: str) -> list:
    index = load_index(folder)
    return [index.fingerprint, index.num_samples]


def _read_base(path: Path) -> dict:
    """The base config, of which the rows give the rest; what trials are made from is there."""
    base = _read_yaml(path)
    for section, value in base.items():
        if not isinstance(value, dict | None):
            raise ValueError(f"{path}: {section}: got {shortened(value)}, wanted a section")
    if not (base.get("run") or {}).get("epochs"):
        raise ValueError(f"{path}: wanted run.epochs, the length of a run")
    sets = (base.get("evaluate") or {}).get("sets")
    if not sets or not isinstance(sets, dict):
        raise ValueError(f"{path}: wanted evaluate.sets, the test sets of the study")
    for name, one in sets.items():
        if not isinstance(one, dict) or not isinstance(one.get("data"), str):
            raise ValueError(f"{path}: evaluate.sets.{name}: got {shortened(one)}, wanted data: and a folder")
    return base


def _read_yaml(path: Path) -> dict:
    values = strict_yaml.parse(read_text(path, strict_yaml.BYTES), path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted keys and values, got {type(values).__name__}")
    return values
