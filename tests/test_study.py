"""A study: its plan, its ledger, what is chosen, the table's arithmetic, and a real one that is killed and goes on."""

import fcntl
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from partial_fc.build import with_label_noise
from partial_fc.config_file import load_config
from partial_fc.data.shards import load_index
from partial_fc.study import ledger
from partial_fc.study.choice import choose, judge, to_do, untunable
from partial_fc.study.picture import draw_study, group_lines
from partial_fc.study.plan import digest, load_plan
from partial_fc.study.run import asked_to_stop, run_study
from partial_fc.study.table import Line, cell, load_lines, study_table
from partial_fc.study.trial import device_of
from partial_fc.train import train
from tests.conftest import REPOSITORY
from tests.processes import Program

BASE = {
    "run": {"epochs": 0.25},  # 44 steps
    "data": {"global_batch_size": 48, "streams": 4, "workers": 0, "flip": False},
    "backbone": {"name": "smallnet", "embedding_dim": 32},
    "head": {"margin": {"name": "softmax"}},
    "optim": {"lr": 0.05, "warmup_steps": 5},
    "checkpoint": {"every": 10, "keep": 1},
    "track": {"log_every": 1, "wandb": "disabled"},
}
ROWS = {
    "softmax": {"head.margin.name": "softmax", "grid": "plain"},
    "am": {"head.margin.name": "cosface", "head.margin.margin": 0.2},
}
GRIDS = {
    "scaled": {"optim.lr": [0.05], "head.margin.scale": [16, 24]},
    "plain": {"optim.lr": [0.05, 0.1]},
}


@pytest.fixture
def write(glyphs_ci, tmp_path):
    """Writes a plan with its base config; what is given replaces what stands above."""

    def write(base: dict | None = None, **given) -> Path:
        values = BASE | (base or {})
        values["data"] = values["data"] | {"train": str(glyphs_ci / "train")}
        values["evaluate"] = {"sets": {"seen": {"data": str(glyphs_ci / "test_seen")}}}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        tuning = {"seed": 0, "shorter": 2.5, "sets": {"seen": str(glyphs_ci / "test_unseen")}, "grids": GRIDS}
        plan = {"base": "base.yaml", "reference": "softmax", "seeds": [1, 2], "tuning": tuning, "rows": ROWS} | given
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
        return tmp_path / "plan.yaml"

    return write


def entry(trial, value: float | None, **more) -> dict:
    """A ledger line of a trial; value None: it failed."""
    result = {"tar_at_far": {"0.0001": value}, "dir_at_far": {"0.01": value}, "rank1": value}
    outcome = {"status": "failed", "error": "error: it diverged"} if value is None else {"status": "done"}
    common = dict(
        digest=trial.digest, data=trial.data, row=trial.row, stage=trial.stage, tuned=trial.tuned, seed=trial.seed
    )
    return common | outcome | {"result": {"seen": result}, "seconds": 36.0, "commit": "0123456789abcdef"} | more


def tuned_entries(plan, values: dict[str, list]) -> dict[str, dict]:
    entries = {}
    for row in plan.rows:
        for trial, value in zip(plan.tuning_trials(row), values[row.name], strict=True):
            entries[trial.digest] = entry(trial, value)
    return entries


# ---- the plan


def test_a_trial_has_the_rows_settings_its_point_and_its_length(write):
    plan = load_plan(write())
    softmax, am = plan.rows
    assert [trial.tuned for trial in plan.tuning_trials(softmax)] == [{"optim.lr": 0.05}, {"optim.lr": 0.1}]
    first, second = plan.tuning_trials(am)
    assert second.tuned == {"optim.lr": 0.05, "head.margin.scale": 24}
    assert second.values["head"]["margin"] == {"name": "cosface", "margin": 0.2, "scale": 24}
    assert second.values["run"] == {"epochs": 0.1, "seed": 0} and second.epochs == 0.1
    assert second.samples == pytest.approx(0.1 * 8535, rel=0.02)
    finals = plan.final_trials(am, second.tuned)
    assert [trial.values["run"] for trial in finals] == [{"epochs": 0.25, "seed": seed} for seed in (1, 2)]
    assert len({trial.digest for trial in [first, second, *finals]}) == 4


def test_the_digest_is_of_what_a_result_depends_on(write):
    def digests(**given) -> list[str]:
        return [
            trial.digest
            for row in load_plan(write(**given)).rows
            for trial in plan_trials(load_plan(write(**given)), row)
        ]

    def plan_trials(plan, row):
        return [*plan.tuning_trials(row), *plan.final_trials(row, {"optim.lr": 0.3})]

    before = digests()
    assert digests() == before
    assert digests(base={"checkpoint": {"every": 3}, "track": {"log_every": 7, "wandb": "disabled"}}) == before
    assert digests(rows={"other name": ROWS["softmax"], "am": ROWS["am"]}, reference=None) == before
    for changed in (
        digests(rows=ROWS | {"am": ROWS["am"] | {"head.margin.margin": 0.25}}),
        digests(rows=ROWS | {"am": ROWS["am"] | {"head.chunk": 100}}),
    ):
        assert changed[:4] == before[:4] and not set(changed[4:]) & set(before)
    for base in ({"run": {"epochs": 0.3}}, {"backbone": {"name": "smallnet", "embedding_dim": 16}}):
        assert not set(digests(base=base)) & set(before)


def test_the_digest_knows_data_by_its_fingerprint():
    values = {"data": {"train": "a"}, "evaluate": {"sets": {"x": {"data": "b", "distractors": "c"}}}}
    fingerprints = {"a": "1", "b": "2", "c": "3", "moved": "1"}
    before = digest(values, fingerprints.get)
    assert digest(values | {"data": {"train": "moved", "workers": 3}}, fingerprints.get) == before
    for name in "abc":
        assert digest(values, (fingerprints | {name: "other"}).get) != before
    flipped = values | {"evaluate": values["evaluate"] | {"flip": True}}
    assert digest(flipped, fingerprints.get) != before
    lr, same, other = ({**values, "optim": {"lr": rate}} for rate in (1, 1.0, 2))
    assert digest(lr, fingerprints.get) == digest(same, fingerprints.get) != digest(other, fingerprints.get)


def test_the_digest_knows_a_margin_of_a_module_by_its_file(tmp_path, monkeypatch):
    """An edited loss is another one: its runs are not taken from the ledger."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "digested_losses.py").write_text("margin = 0.2\n")
    values = {"data": {"train": "a"}, "head": {"margin": {"name": "digested_losses.Mine"}}}
    before = digest(values, {"a": "1"}.get)
    assert digest(values, {"a": "1"}.get) == before
    (tmp_path / "digested_losses.py").write_text("margin = 0.3\n")
    assert digest(values, {"a": "1"}.get) != before


def test_a_row_that_is_no_config_is_an_error(write):
    with pytest.raises(ValueError, match="row new: head.embedding_losses.centre: .* did you mean center"):
        load_plan(write(rows=ROWS | {"new": {"head.embedding_losses.centre.weight": 0.1, "grid": "plain"}}))
    waiting = {"head.margin.name": "nosuchface"}
    with pytest.raises(ValueError, match="row new: head.margin.name: no margin is called 'nosuchface'"):
        load_plan(write(rows=ROWS | {"new": waiting}))
    with pytest.raises(ValueError, match="row new: checkpoint.dir is set: .* go on from each other's checkpoints"):
        load_plan(write(rows=ROWS | {"new": {"checkpoint.dir": "s3://bucket/all", "grid": "plain"}}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": ROWS | {"a": {"optim.lrr": 1}}}, "row a: its config is no valid config:\n.*did you mean optim.lr"),
        ({"rows": ROWS | {"a": {"grid": "nope"}}}, "row a: there is no grid 'nope'; there are scaled, plain"),
        ({"first": ["nope"]}, "first names nope, which is no row"),
        ({"seed": [1]}, "plan.yaml is no plan: seed: Extra inputs"),
        ({"reference": "nope"}, "row softmax: 'nope', which its differences are taken from, is no row"),
    ],
)
def test_a_wrong_plan_is_a_clear_error(write, given, message):
    with pytest.raises((ValueError, OSError), match=message):
        load_plan(write(**given))


def test_a_base_without_length_or_test_sets_is_an_error(write):
    for base, message in (({"run": {"steps": 5}}, "wanted run.epochs"), ({"run": {}}, "wanted run.epochs")):
        with pytest.raises(ValueError, match=message):
            load_plan(write(base=base))
    path = write()
    (path.parent / "base.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(ValueError, match="wanted evaluate.sets"):
        load_plan(path)
    (path.parent / "base.yaml").unlink()
    with pytest.raises(OSError, match="base.yaml"):
        load_plan(path)


def test_every_row_has_the_same_budget(write, glyphs_ci):
    tuning = {"seed": 0, "shorter": 3, "sets": {"seen": str(glyphs_ci / "test_seen")}}
    with pytest.raises(ValueError, match="the grids have {'scaled': 3, 'plain': 2} points; wanted one number for all"):
        load_plan(write(tuning=tuning | {"grids": GRIDS | {"scaled": {"optim.lr": [1, 2, 3]}}}))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_of_the_repository_are_sound(path, monkeypatch):
    """Without their data sets, which are not there in a fresh checkout."""
    monkeypatch.setattr("partial_fc.study.plan._index_facts", lambda folder: [folder, 1000])
    if "base" not in yaml.safe_load(path.read_text()):
        load_config(path)
        return
    plan = load_plan(path)
    trials = []
    for row in plan.rows:
        first = {name: values[0] for name, values in row.grid.items()}
        trials += [*plan.tuning_trials(row), *plan.final_trials(row, first)]
    assert len({trial.digest for trial in trials}) == len(trials), "two rows are the same run"


def test_tuning_sees_no_test_set_and_has_a_seed_of_its_own(write, glyphs_ci):
    tuning = {"seed": 0, "shorter": 3, "sets": {"seen": str(glyphs_ci / "test_seen")}, "grids": GRIDS}
    with pytest.raises(ValueError, match="tuning sees .*test_seen, which is a test set: take validation sets"):
        load_plan(write(tuning=tuning))
    with pytest.raises(ValueError, match="seed 0 is of tuning and of the final runs: take another one"):
        load_plan(write(seeds=[0, 1]))


def test_a_tuned_value_at_the_edge_of_its_grid_is_said(write, tmp_path):
    """Of two values both are at the edge: they are not said."""
    grids = {"scaled": {"optim.lr": [0.1, 0.2, 0.4], "head.margin.scale": [16, 32]}}
    tuning = {"seed": 0, "shorter": 3, "sets": {"seen": "data/validation"}, "grids": grids}
    rows = {name: {"head.margin.name": "cosface", "head.margin.margin": m} for name, m in (("a", 0.2), ("b", 0.3))}
    path = write(tuning=tuning, rows=rows, reference="a")
    facts = {"data/validation": ["v", 10]}
    plan = load_plan(path, facts)
    entries = tuned_entries(plan, {"a": [1, 0, 0, 0, 0, 0], "b": [0, 0, 0, 1, 0, 0]})
    file = tmp_path / "ledger.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    table = study_table(path, file)
    assert "a: lr 0.1 is at the edge of its grid" in table and table.count("edge") == 1


def test_a_tuned_value_that_the_row_gives_itself_is_not_shown(write, tmp_path):
    write()
    own = {"other": ROWS["am"] | {"head.margin.scale": 8, "tuned_as": "am"}}
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", "seeds": [1], "tuned_in": "plan.yaml", "rows": own})
    )
    entries = tuned_entries(load_plan(tmp_path / "plan.yaml"), {"softmax": [0.3, 0.4], "am": [0.2, 0.1]})
    file = tmp_path / "ledger.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    table = study_table(tmp_path / "own.yaml", file)
    assert "lr 0.05" in table and "scale" not in table


@pytest.mark.slow
def test_the_committed_ledger_belongs_to_the_plans():
    """A change of the digest would lose every run of it."""
    folder = REPOSITORY / "configs" / "study"
    entries = ledger.read(folder / "ledger.jsonl")
    recorded = ledger.recorded_data(entries)
    plans = [load_plan(path, recorded) for path in sorted(folder.glob("*.yaml")) if path.name != "base.yaml"]
    finals = []  # each once: 9 times fewer trials to make
    for one in entries.values():
        if one["stage"] == "final" and one["tuned"] not in finals:
            finals.append(one["tuned"])
    known = set()
    rows = [(plan, row) for plan in plans for row in plan.rows]
    for its_plan, row in rows:
        grid = row.grid
        if its_plan.tuned_in is not None:
            grid = next(other.grid for other in its_plan.tuned_in.rows if other.name == row.tuned_as)
        tuned = [one for one in finals if all(name in grid and value in grid[name] for name, value in one.items())]
        try:
            known |= {trial.digest for trial in its_plan.tuning_trials(row)}
            known |= {trial.digest for values in tuned for trial in its_plan.final_trials(row, values)}
        except FileNotFoundError:  # its data set is not here, and no run has recorded it
            continue
    assert entries
    for found, one in entries.items():
        assert found in known, (one["row"], one["stage"], one["tuned"])


# ---- the ledger


def failed(digest: str, error: str = "it diverged") -> dict:
    return {"digest": digest, "status": "failed", "error": error, "data": {}, "seconds": 1.0, "commit": "0123"}


def test_the_ledger_keeps_entries_and_drops_a_torn_last_line(tmp_path, capsys):
    path = tmp_path / "new" / "ledger.jsonl"
    with ledger.opened(path) as book:
        book.append(failed("a", "once"))
        book.append(failed("b"))
        book.append(failed("a", "twice"))
        with pytest.raises(ValueError, match="another study writes to"), ledger.opened(path):
            pass
    with open(path, "a") as file:
        file.write('{"digest": "c", "sta')
    wanted = {"a": failed("a", "twice"), "b": failed("b")}
    assert ledger.read(path) == wanted
    assert "its last line is torn and left out" in capsys.readouterr().out
    with ledger.opened(path) as book:
        assert book.entries == wanted
        book.append(failed("d"))
    assert ledger.read(path) == wanted | {"d": failed("d")}
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "[]", "{}", '"digest"', ""])
def test_a_line_that_is_no_entry_is_named(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    path.write_text("\n".join([json.dumps(failed("a")), line, json.dumps(failed("b")), ""]))
    with pytest.raises(ValueError, match="ledger.jsonl, line 2.*: no entry of a ledger, mend or delete that line"):
        ledger.read(path)


def replace_by_a_copy(path: Path) -> None:
    """As git does with a file that it checks out."""
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("lose", [replace_by_a_copy, Path.unlink])
def test_a_ledger_that_was_replaced_gets_no_lines_that_nobody_sees(tmp_path, lose):
    path = tmp_path / "ledger.jsonl"
    with ledger.opened(path) as book:
        book.append(failed("a"))
        lose(path)
        with pytest.raises(OSError, match="was replaced or deleted while the study ran"):
            book.append(failed("b"))
        assert list(book.entries) == ["a"]


def test_a_full_disk_leaves_no_torn_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ledger.opened(path) as book:
        book.append(failed("a"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))  # the write is cut short there
        try:
            with pytest.raises(OSError, match="the disk is full"):
                book.append(failed("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == json.dumps(failed("a")) + "\n"
        book.append(failed("c"))
    assert list(ledger.read(path)) == ["a", "c"]


# ---- what comes next, and what is chosen


def test_the_best_point_is_chosen_and_of_equal_ones_the_first(write):
    plan = load_plan(write())
    softmax, am = plan.rows
    entries = tuned_entries(plan, {"softmax": [0.3, 0.3], "am": [0.2, 0.4]})
    assert choose(plan.tuning_trials(softmax), entries) == {"optim.lr": 0.05}
    assert choose(plan.tuning_trials(am), entries) == {"optim.lr": 0.05, "head.margin.scale": 24}
    del entries[plan.tuning_trials(am)[0].digest]
    assert choose(plan.tuning_trials(am), entries) is None  # not before all have ended


def test_a_failed_trial_is_never_chosen(write):
    plan = load_plan(write())
    entries = tuned_entries(plan, {"softmax": [None, 0.0], "am": [None, None]})
    softmax, am = plan.rows
    assert choose(plan.tuning_trials(softmax), entries) == {"optim.lr": 0.1} and not untunable(plan, softmax, entries)
    assert choose(plan.tuning_trials(am), entries) is None and untunable(plan, am, entries)
    trials, _ = to_do(plan, entries)
    assert {trial.row for trial in trials} == {"softmax"}


def test_the_judge_is_the_mean_over_the_sets_and_wants_large_enough_ones(write):
    trial = load_plan(write()).tuning_trials(load_plan(write()).rows[0])[0]
    one, two = (entry(trial, value)["result"]["seen"] for value in (0.2, 0.6))
    assert judge({"result": {"a": one, "b": two}}) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="the tuning set seen has too few impostor pairs for FAR 1e-4"):
        judge(entry(trial, None))


def test_only_what_is_missing_is_run_and_row_by_row(write):
    plan = load_plan(write())
    final = plan.final_samples(plan.rows[0])
    trials, samples = to_do(plan, {})
    assert [trial.row for trial in trials] == ["softmax", "softmax", "am", "am"]
    assert samples == pytest.approx(sum(trial.samples for trial in trials) + 4 * final)
    entries = tuned_entries(plan, {"softmax": [0.3, 0.4], "am": [0.2, 0.4]})
    trials, samples = to_do(plan, entries)
    assert [(trial.row, trial.seed) for trial in trials] == [("softmax", 1), ("softmax", 2), ("am", 1), ("am", 2)]
    assert samples == pytest.approx(4 * final)
    entries[trials[0].digest] = entry(trials[0], 0.5)
    assert [trial.digest for trial in to_do(plan, entries)[0]] == [trial.digest for trial in trials[1:]]
    missing = plan.tuning_trials(plan.rows[1])[0]
    del entries[missing.digest]
    assert [trial.digest for trial in to_do(plan, entries)[0]] == [trials[1].digest, missing.digest]
    assert to_do(plan, entries)[1] == pytest.approx(missing.samples + 3 * final)
    assert [trial.row for trial in to_do(load_plan(write(first=["am"])), {})[0]] == ["am", "am", "softmax", "softmax"]


def test_without_tuning_it_goes_seed_by_seed(write):
    rows = {name: {key: value for key, value in row.items() if key != "grid"} for name, row in ROWS.items()}
    trials, _ = to_do(load_plan(write(tuning=None, rows=rows)), {})
    assert [(trial.row, trial.seed) for trial in trials] == [("softmax", 1), ("am", 1), ("softmax", 2), ("am", 2)]


def test_a_plan_may_take_tuned_values_from_another(write, tmp_path):
    table = load_plan(write())
    rows = {
        "0.1": {"head.margin.name": "cosface", "head.margin.margin": 0.1, "tuned_as": "am"},
        "0.2": {"head.margin.name": "cosface", "head.margin.margin": 0.2, "tuned_as": "am"},
        "scale 8": {"head.margin.name": "cosface", "head.margin.scale": 8, "tuned_as": "am"},
    }
    values = {"base": "base.yaml", "seeds": [1], "tuned_in": "plan.yaml", "rows": rows}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    sweep = load_plan(path)
    entries = tuned_entries(table, {"softmax": [0.3, 0.4], "am": [0.2, None]})
    del entries[table.tuning_trials(table.rows[1])[1].digest]
    assert to_do(sweep, entries)[0] == []
    entries |= tuned_entries(table, {"softmax": [0.3, 0.4], "am": [0.2, 0.3]})
    trials, _ = to_do(sweep, entries)
    assert [trial.tuned for trial in trials] == [{"optim.lr": 0.05, "head.margin.scale": 24}] * 2 + [{"optim.lr": 0.05}]
    assert trials[2].values["head"]["margin"]["scale"] == 8
    same = table.final_trials(table.rows[1], {"optim.lr": 0.05, "head.margin.scale": 24})
    assert trials[1].digest == same[0].digest, "the same run in both plans is run once"
    path.write_text(yaml.safe_dump(values | {"rows": {"a": {"tuned_as": "nope"}}}))
    with pytest.raises(ValueError, match="tuned_as 'nope' is no row of tuned_in; there are softmax, am"):
        load_plan(path)


# ---- the table


def test_the_tables_arithmetic(write, tmp_path):
    path = write(seeds=[1, 2, 3])
    plan = load_plan(path)
    entries = tuned_entries(plan, {"softmax": [0.3, 0.4], "am": [0.2, None]})
    for row, values in zip(plan.rows, ([0.10, 0.20, 0.30], [0.15, 0.21, None]), strict=True):
        for trial, value in zip(plan.final_trials(row, choose(plan.tuning_trials(row), entries)), values, strict=True):
            entries[trial.digest] = entry(trial, value)
    file = tmp_path / "ledger.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    text = study_table(path, file)
    assert "seen TAR@1e-4" in text and "seen DIR@1%" in text and "seen rank-1" in text
    assert "0.200 (0.100–0.300)" in text and "0.180 (0.150–0.210)" in text
    assert "+0.030 (+0.010–+0.050)" in text  # of the two seeds that both have
    assert "am: 2 of 3 seeds, seed 3 failed" in text
    assert "failed: am, tuning lr=0.05 scale=24 seed 0: error: it diverged" in text
    assert "lr 0.1 " in text and "lr 0.05, scale 16" in text and "0123456789ab" in text
    assert "| softmax | lr 0.1 | 0.200 (0.100–0.300) |" in study_table(path, file, markdown=True)


def test_a_row_may_be_compared_with_another_than_the_reference(write, tmp_path):
    third = {"head.margin.name": "arcface", "grid": "scaled", "against": "am"}
    path = write(rows=ROWS | {"third": third}, seeds=[1])
    plan = load_plan(path)
    entries = tuned_entries(plan, {"softmax": [0.3, 0.4], "am": [0.2, 0.1], "third": [0.2, 0.1]})
    for row, value in zip(plan.rows, (0.5, 0.7, 0.71), strict=True):
        (trial,) = plan.final_trials(row, choose(plan.tuning_trials(row), entries))
        entries[trial.digest] = entry(trial, value)
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    rows = [line.split() for line in study_table(path, tmp_path / "ledger.jsonl").splitlines()]
    assert ["am", "softmax", "+0.200", "+0.200", "+0.200"] in rows
    assert ["third", "am", "+0.010", "+0.010", "+0.010"] in rows
    assert not any(row[:2] == ["softmax", "softmax"] for row in rows)
    rows = [line.split() for line in study_table(path, tmp_path / "ledger.jsonl", against="third").splitlines()]
    assert ["am", "third", "-0.010", "-0.010", "-0.010"] in rows
    assert ["softmax", "third", "-0.210", "-0.210", "-0.210"] in rows
    assert not any(row[:2] == ["third", "third"] for row in rows)
    with pytest.raises(ValueError, match="has no row 'fourth'; there are softmax, am, third"):
        study_table(path, tmp_path / "ledger.jsonl", against="fourth")


def test_the_picture_has_the_rows_that_have_results(write, tmp_path):
    path = write(seeds=[1, 2])
    plan = load_plan(path)
    entries = tuned_entries(plan, {"softmax": [0.3, 0.4], "am": [0.2, 0.1]})
    ledger_file = tmp_path / "ledger.jsonl"
    ledger_file.write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    with pytest.raises(ValueError, match="nothing to draw yet"):
        draw_study(load_lines(path, ledger_file), tmp_path / "study.svg")
    for trial, value in zip(plan.final_trials(plan.rows[0], {"optim.lr": 0.1}), (0.25, 0.35), strict=True):
        entries[trial.digest] = entry(trial, value)
    ledger_file.write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    lines = load_lines(path, ledger_file)
    draw_study(lines, tmp_path / "study.svg")
    text = (tmp_path / "study.svg").read_text()
    assert ">softmax</text>" in text and ">am</text>" not in text and ">seen DIR@1%</text>" in text
    draw_study(lines, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"study\.pdf: wanted a name that ends in \.png or \.svg"):
        draw_study(lines, tmp_path / "study.pdf")


def test_rows_of_a_picture_are_grouped_by_what_they_are_compared_with():
    names = {"a": None, "x": None, "b": "a", "c": "b", "y": "x", "own": "own", "turn": "back", "back": "turn"}
    lines = [Line(name, None, {}, "", against) for name, against in names.items()]
    groups = [[line.name for line in group] for group in group_lines(lines)]
    assert groups == [["a", "b", "c"], ["x", "y"], ["own"], ["turn"], ["back"]]


def test_the_table_needs_no_data_where_the_ledger_has_its_fingerprints(write, tmp_path, monkeypatch):
    path = write(seeds=[1])
    plan = load_plan(path)
    entries = tuned_entries(plan, {"softmax": [0.3, 0.4], "am": [0.2, 0.1]})
    final = plan.final_trials(plan.rows[0], {"optim.lr": 0.1})[0]
    entries[final.digest] = entry(final, 0.5, commit="0123456789abcdef-dirty", device="NVIDIA H200")
    file = tmp_path / "ledger.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    wanted = study_table(path, file)
    assert "lr 0.05, scale 16" in wanted and "commits (trials): 0123456789ab (4), 0123456789ab-dirty (1)" in wanted
    assert "of one process each, on cpu (4), NVIDIA H200 (1); commits" in wanted

    def gone(folder):
        raise FileNotFoundError(f"{folder} is no data set")

    monkeypatch.setattr("partial_fc.study.plan._index_facts", gone)
    assert study_table(path, file) == wanted
    with pytest.raises(FileNotFoundError, match="is no data set"):
        study_table(path, tmp_path / "nothing.jsonl")


def test_an_empty_ledger_is_an_empty_table(write, tmp_path):
    text = study_table(write(), tmp_path / "nothing.jsonl")
    assert "softmax: not tuned yet" in text and "am: not tuned yet" in text


def test_cells():
    assert cell([]) == "–" and cell([0.5]) == "0.500" and cell([0.25, 0.75]) == "0.500 (0.250–0.750)"
    assert cell([-0.1, 0.3], signed=True) == "+0.100 (-0.100–+0.300)"


# ---- label noise


def test_label_noise_replaces_a_share_of_the_labels_by_other_classes(glyphs_ci):
    index = load_index(glyphs_ci / "train")
    assert with_label_noise(index, 0.0, 1) is index
    noisy = with_label_noise(index, 0.3, 1)
    changed = noisy.label != index.label
    assert changed.mean() == pytest.approx(0.3, abs=0.02)
    assert noisy.label.min() >= 0 and noisy.label.max() < index.num_classes and noisy.label.dtype == np.int64
    shift = (noisy.label - index.label)[changed] % index.num_classes
    assert shift.mean() == pytest.approx(index.num_classes / 2, rel=0.05)  # any other class
    assert (with_label_noise(index, 0.3, 1).label == noisy.label).all()
    assert (with_label_noise(index, 0.3, 2).label != noisy.label).any()
    assert (with_label_noise(index, 1.0, 1).label != index.label).all()


def test_a_run_does_not_go_on_with_other_label_noise(write, tmp_path):
    write()
    options = [f"run.dir={tmp_path}/run", "run.epochs=null", "evaluate.sets={}"]
    train(load_config(tmp_path / "base.yaml", [*options, "run.steps=2"]), torch.device("cpu"))
    noisy = load_config(tmp_path / "base.yaml", [*options, "run.steps=3", "data.label_noise=0.1"])
    with pytest.raises(RuntimeError, match="data.label_noise was None, now 0.1"):
        train(noisy, torch.device("cpu"))


# ---- a real one


def start(plan: Path, runs: Path, *options: str) -> Program:
    return Program("partial-fc", "study", "run", plan, "--runs", runs, *options)


def wait_for(happened, study: Program) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        if study.returncode is not None or time.monotonic() > deadline:
            study.process.kill()
            raise AssertionError(f"it did not happen: {study.stdout}{study.stderr}")
        time.sleep(0.01)


def send(study: Program, number: int) -> str:
    """What it has said when the signal has ended it."""
    os.kill(study.pid, number)
    study.wait(120)
    return study.stdout + study.stderr


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.soak("study")
def test_a_study_that_is_stopped_and_killed_goes_on_and_runs_nothing_twice(write, tmp_path):
    """Stopped by SIGTERM as soon as a trial has started; killed while it trains, after 3 of 17 steps; finished."""
    rows = {"softmax": {"head.margin.name": "softmax"}}
    path = write(base={"run": {"epochs": 0.1}}, rows=rows, seeds=[1], tuning=None)
    book, runs = tmp_path / "ledger.jsonl", tmp_path / "runs"
    plan = load_plan(path)
    (trial,) = plan.final_trials(plan.rows[0], {})
    run = runs / f"softmax_final_seed1_{trial.digest}"

    study = start(path, runs)
    wait_for((run / "log.txt").exists, study)
    said = send(study, signal.SIGTERM)
    assert study.returncode == 2 and "SIGTERM: 1 trials could start next; the same command goes on" in said
    assert not processes_of(run) and ledger.read(book) == {}

    study = start(path, runs)
    wait_for(lambda: steps(run) >= 3, study)
    send(study, signal.SIGKILL)
    wait_for_end(run)
    assert (run / "preempted").exists(), "the trial of a killed study saves"
    assert ledger.read(book) == {}

    assert run_study(path, ledger_file=book, runs=runs)
    assert "from " + str(run) in (run / "log.txt").read_text(), "it went on from what the killed study left"
    assert_is_the_final_run(json.loads(book.read_text()), tmp_path)
    before = book.read_text(), contents(run)
    assert run_study(path, ledger_file=book, runs=runs) and (book.read_text(), contents(run)) == before


def assert_is_the_final_run(entry: dict, tmp_path: Path) -> None:
    assert (entry["row"], entry["stage"], entry["status"]) == ("softmax", "final", "done")
    assert 0 <= entry["result"]["seen"]["rank1"] <= 1 and entry["seconds"] > 0
    assert entry["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert str(tmp_path) not in json.dumps(entry)


def contents(run: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.soak("study")
def test_a_study_that_is_killed_and_stopped_goes_on_to_the_same_table(write, tmp_path):
    """Tuning and two jobs: killed while a trial trains, stopped by SIGTERM in a later one, finished."""
    diverging = {"head.margin.name": "softmax", "optim.lr": 1e30, "optim.warmup_steps": 0}
    grids = {"one": {"head.init_std": [0.1]}}
    tuning = {"seed": 0, "shorter": 1, "grids": grids, "sets": load_tuning_sets(write)}
    path = write(rows={"softmax": ROWS["softmax"] | {"grid": "one"}, "bad": diverging}, seeds=[1], tuning=tuning)
    book, runs = tmp_path / "ledger.jsonl", tmp_path / "runs"
    first = next(iter(load_plan(path).tuning_trials(load_plan(path).rows[0])))
    run = runs / f"softmax_tuning_seed0_{first.digest}"

    study = start(path, runs)
    wait_for(lambda: steps(run) >= 3, study)
    send(study, signal.SIGKILL)
    wait_for_end(run)
    assert (run / "preempted").exists(), "the trial of a killed study saves"
    assert ledger.read(book) == {}

    study = start(path, runs, "--jobs", "2")  # the tuning of both rows, then the final run
    wait_for(lambda: book.exists() and len(book.read_text().splitlines()) == 2, study)
    assert "from " + str(run) in (run / "log.txt").read_text(), "it went on from what the killed study left"
    wait_for(lambda: not (run / "checkpoints").exists(), study)  # they go once the entry is written
    wait_for(lambda: any(steps(one) >= 3 for one in runs.glob("softmax_final_*")), study)
    said = send(study, signal.SIGTERM)
    assert study.returncode == 2 and "SIGTERM: 1 trials could start next; the same command goes on" in said

    study = start(path, runs).wait(120)
    assert study.returncode == 0, study.stdout + study.stderr
    assert "bad: every tuning trial failed, so it has no final runs" in study.stdout
    assert "the loss was not finite in 10 successive steps" in study.stdout
    entries = [json.loads(line) for line in book.read_text().splitlines()]
    assert sorted((one["row"], one["stage"], one["status"]) for one in entries) == [
        ("bad", "tuning", "failed"),
        ("softmax", "final", "done"),
        ("softmax", "tuning", "done"),
    ]
    assert_is_the_final_run(entries[-1], tmp_path)
    assert str(tmp_path) not in book.read_text()
    before = book.read_text()
    assert run_study(path, ledger_file=book, runs=runs) and book.read_text() == before  # nothing to do


def test_a_study_stops_when_its_time_is_up_or_it_is_told_to(write, tmp_path, capsys):
    assert not run_study(write(), ledger_file=tmp_path / "l.jsonl", runs=tmp_path / "runs", hours=0)
    assert "The 0 hours are up: 4 trials could start next; the same command goes on" in capsys.readouterr().out
    assert [one.name for one in (tmp_path / "runs").iterdir()] == ["lock"] and ledger.read(tmp_path / "l.jsonl") == {}
    before = signal.getsignal(signal.SIGINT)
    with asked_to_stop(None) as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="got 0 jobs"):
        run_study(write(), jobs=0)


@pytest.mark.slow
def test_an_error_that_is_no_divergence_is_not_entered_and_ends_the_study(write, tmp_path, capsys):
    """Another process trains in the run folder, whose checkpoints stay; an earlier piece of the run diverged."""
    path, runs = write(), tmp_path / "runs"
    plan = load_plan(path)
    trial = plan.tuning_trials(plan.rows[0])[0]
    run = runs / f"softmax_tuning_seed0_{trial.digest}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "log.txt").write_text("error: training has diverged: earlier\n")
    with open(run / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        why = "error: .*another process trains in this folder.*, see .*log.txt. Mend its cause"
        with pytest.raises(ValueError, match=f"softmax, tuning lr=0.05 seed 0 ended with an error.*: {why}"):
            run_study(path, ledger_file=tmp_path / "l.jsonl", runs=runs)
    assert ledger.read(tmp_path / "l.jsonl") == {}
    assert {one.name for one in runs.iterdir()} == {"lock", run.name}, "no other trial was started"
    assert (run / "checkpoints").exists()
    assert "not entered: softmax, tuning lr=0.05 seed 0: error: " in capsys.readouterr().out


def test_two_studies_do_not_share_a_folder_of_runs(write, tmp_path):
    def held(file, how):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    wanted = "another study trains in .*runs: wait for it, or give another --runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partial_fc.folder_lock.fcntl.lockf", held)  # of another process, which a quick test has not
        with pytest.raises(ValueError, match=wanted):
            run_study(write(), ledger_file=tmp_path / "l.jsonl", runs=tmp_path / "runs", hours=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, wanted a folder: give another --runs"):
        run_study(write(), ledger_file=tmp_path / "l.jsonl", runs=tmp_path / "file", hours=0)
    with pytest.raises(ValueError, match="file is a file, wanted a folder: give another --ledger"):
        run_study(write(), ledger_file=tmp_path / "file" / "l.jsonl", runs=tmp_path / "runs", hours=0)
    assert not run_study(write(), ledger_file=tmp_path / "l.jsonl", runs=tmp_path / "runs", hours=0)


@pytest.mark.soak("study")
def test_a_trial_that_diverges_at_its_end_has_failed(write, tmp_path, capsys):
    """Too late for ten steps without a finite loss: the evaluation sees it. Its checkpoints go, as of all tuning."""
    diverging = {"head.margin.name": "softmax", "optim.lr": 1e30, "optim.warmup_steps": 0}
    tuning = {"seed": 0, "shorter": 1, "grids": {"one": {"head.init_std": [0.1]}}, "sets": load_tuning_sets(write)}
    base = {"run": {"epochs": 0.02}, "checkpoint": {"every": 1}}
    path = write(base=base, rows={"bad": diverging}, reference=None, tuning=tuning)
    (trial,) = load_plan(path).tuning_trials(load_plan(path).rows[0])
    assert run_study(path, ledger_file=tmp_path / "ledger.jsonl", runs=tmp_path / "runs")
    ((found, entry),) = ledger.read(tmp_path / "ledger.jsonl").items()
    assert found == trial.digest and entry["status"] == ledger.FAILED
    assert "is not finite: training has diverged" in entry["error"]
    assert "bad: every tuning trial failed, so it has no final runs" in capsys.readouterr().out
    run = tmp_path / "runs" / f"bad_tuning_seed0_{trial.digest}"
    assert 0 < steps(run) < 10 and not (run / "checkpoints").exists()


@pytest.mark.soak("study")
def test_a_trial_that_finished_without_an_entry_is_entered_and_not_trained_again(write, tmp_path):
    grids = {"one": {"head.init_std": [0.1]}}
    tuning = {"seed": 0, "shorter": 1, "grids": grids, "sets": load_tuning_sets(write)}
    path = write(rows={"softmax": ROWS["softmax"] | {"grid": "one"}}, seeds=[1], tuning=tuning)
    book, runs = tmp_path / "ledger.jsonl", tmp_path / "runs"
    (trial,) = load_plan(path).tuning_trials(load_plan(path).rows[0])
    run = runs / f"softmax_tuning_seed0_{trial.digest}"

    study = start(path, runs)
    wait_for(lambda: steps(run) >= 3, study)
    replace_by_a_copy(book)
    study.wait(120)
    assert study.returncode == 1 and "was replaced or deleted while the study ran" in study.stderr
    assert ledger.read(book) == {} and (run / "evaluation.json").exists()

    trained = (run / "metrics.jsonl").read_text()
    assert (log := (run / "log.txt").read_text()).count("step 44/44") == 1
    study = start(path, runs)
    wait_for(lambda: book.read_text().endswith("\n"), study)
    send(study, signal.SIGTERM)
    assert ledger.read(book)[trial.digest]["status"] == ledger.DONE
    assert (run / "metrics.jsonl").read_text() == trained
    assert (run / "log.txt").read_text().count("step 44/44") == 1 and len((run / "log.txt").read_text()) > len(log)
    assert not (run / "checkpoints").exists()


def test_a_run_folder_of_an_earlier_version_does_not_say_its_device(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {seed: 1}\nenvironment: {git_commit: '0123456', torch: 2.11.0}\n")
    assert device_of(tmp_path) == "unknown"


@pytest.mark.parametrize("values", [None, [None, None]])
def test_rows_that_wait_for_tuning_are_missing(write, tmp_path, capsys, values):
    """Those whose tuning failed altogether are not."""
    table = load_plan(write())
    rows = {"0.1": {"head.margin.name": "cosface", "head.margin.margin": 0.1, "tuned_as": "am"}}
    plan = {"base": "base.yaml", "seeds": [1], "tuned_in": "plan.yaml", "rows": rows}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    entries = {} if values is None else tuned_entries(table, {"softmax": [0.3, 0.4], "am": values})
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries.values()))
    done = run_study(tmp_path / "sweep.yaml", ledger_file=tmp_path / "l.jsonl", runs=tmp_path / "runs")
    said = capsys.readouterr().out
    if values is None:
        assert not done and "0.1 waits for the tuning of am: run" in said
    else:
        assert done and "0.1: every tuning trial of am failed, so it has no final runs" in said


@pytest.mark.parametrize("commit", ["0123abc", "0123abc-dirty", "unknown"])
def test_a_commit_that_pins_no_code_is_warned_of(write, tmp_path, capsys, monkeypatch, commit):
    monkeypatch.setattr("partial_fc.study.run.environment", lambda: {"git_commit": commit})
    run_study(write(), ledger_file=tmp_path / "l.jsonl", runs=tmp_path / "runs", hours=0)
    warning = f"warning: git says {commit}: the commit in the ledger will not pin the code"
    assert (warning in capsys.readouterr().out) == (commit != "0123abc")


def load_tuning_sets(write) -> dict[str, str]:
    return yaml.safe_load(write().read_text())["tuning"]["sets"]


def wait_for_end(run: Path) -> None:
    """Until no process trains in `run`: the one whose study was killed has saved."""
    deadline = time.monotonic() + 60
    while processes_of(run):
        assert time.monotonic() < deadline, "an orphan trains on"
        time.sleep(0.1)


def processes_of(run: Path) -> list[str]:
    return [process.name for process in Path("/proc").glob("[0-9]*") if str(run) in command(process)]


def command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""
