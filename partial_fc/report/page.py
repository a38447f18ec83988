"""The report: one HTML file without a single outside reference, about one run or several compared."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import count
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from partial_fc.evaluate.protocol import COLUMNS, FARS, measures, missing, of_a_list
from partial_fc.folders import make_folder
from partial_fc.phases import NAMES as PHASES
from partial_fc.report import plots
from partial_fc.report.examples import example_groups
from partial_fc.report.plots import Series
from partial_fc.report.runs import Run, dotted, load_run

FACTS = {  # dotted config name → how the page calls it
    "backbone.name": "backbone",
    "backbone.embedding_dim": "embedding dimension",
    "head.margin.name": "margin",
    "head.margin.scale": "scale s",
    "head.margin.margin": "margin m",
    "head.sample_rate": "sample rate",
    "data.global_batch_size": "global batch",
    "optim.lr": "learning rate",
    "run.seed": "seed",
}

GROUPS = {  # of the phases of a step
    "data": ("data",),
    "forward": ("forward",),
    "gather": ("gather",),
    "head": ("head", "update"),
    "backward": ("backward",),
    "the rest": ("wait", "optimizer", "log", "save"),
}


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the page about the run folders `runs` to `out`. What a run does not have yet is said in a sentence.

    Raises ValueError without runs, for a folder that holds nothing of one and where `out` is a folder;
    FileNotFoundError if a run's folder is missing.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder, wanted a file: give another --out, as {out / 'report.html'}")
    loaded = [load_run(path) for path in runs]
    if not loaded:
        raise ValueError("got no run, wanted one run folder or more")
    for run in loaded:
        if not (run.config_text or run.metrics or run.evaluation):
            raise ValueError(f"{run.path} has no config.yaml, metrics.jsonl or evaluation.json: give a run's folder")
    make_folder(out.parent, "--out")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _percent
    template = environment.from_string(files("partial_fc.report").joinpath("page.html.j2").read_text("utf-8"))
    names = (f"p{number}" for number in count())
    page = template.render(
        title=loaded[0].name if len(loaded) == 1 else f"{len(loaded)} runs compared",
        several=len(loaded) > 1,
        palette=plots.SERIES,
        runs=[_run(run, color) for color, run in enumerate(loaded)],
        columns=COLUMNS,
        tables=_tables(loaded),
        curves=_training_curves(loaded, names),
        rocs=_rocs(loaded, names),
        histograms=_histograms(loaded, names),
        examples=_examples(loaded),
        differences=_differences(loaded),
    )
    out.write_text(page, encoding="utf-8")


def renew_report(run: Path) -> str:
    """Writes a run folder's page again after an evaluation. Returns the line that says so; "" where there is no page.

    One that compares several runs stays as it is, and the line says that.
    """
    page = run / "report.html"
    if not page.exists():
        return ""
    if re.search(r"<title>\d+ runs compared ", page.read_text(encoding="utf-8")):
        return f"report: {page} compares several runs and shows the evaluation before: write it again"
    write_report([run], page)
    return f"report: {page}"


def _run(run: Run, color: int) -> dict:
    facts = [(name, run.config[key]) for key, name in FACTS.items() if run.config.get(key) is not None]
    if run.metrics:
        facts.append(("steps logged", f"{run.metrics[-1]['step']:,}"))
    if run.evaluation is not None:
        facts.append(("evaluated at step", f"{run.evaluation['step']:,}"))
    notes = []
    if not run.metrics:
        notes.append("has logged no step yet (no metrics.jsonl), so it has no training curves")
    if run.evaluation is None:
        notes.append("has not been evaluated yet (no evaluation.json)")
    if not run.config_text:
        notes.append("has no config.yaml")
    notes += _since_the_evaluation(run)
    return {"name": run.name, "color": color, "facts": facts, "notes": notes, "config": run.config_text}


def _since_the_evaluation(run: Run) -> list[str]:
    """A note where the settings above are not those of the evaluated checkpoint, or the run has gone on from there."""
    if run.evaluation is None:
        return []
    at, last = run.evaluation["step"], run.metrics[-1]["step"] if run.metrics else 0
    then = dotted(run.evaluation.get("config") or {})  # early evaluations have none
    changed = [
        f"{name} {then[key]} → {run.config[key]}"
        for key, name in FACTS.items()
        if then.get(key) is not None and run.config.get(key) is not None and then[key] != run.config[key]
    ]
    since = f". Settings changed since then: {', '.join(changed)}" if changed else ""
    if last > at:
        return [f"was trained on after its evaluation: the results are those of step {at:,}, it is at {last:,}{since}"]
    return [f"shows the results of step {at:,}{since}"] if since else []


def _evaluated(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """(color, run) of the runs that have an evaluation."""
    return [(color, run) for color, run in enumerate(runs) if run.evaluation is not None]


def _set_names(runs: Sequence[Run]) -> list[str]:
    named = (name for _, run in _evaluated(runs) for sets in run.evaluation["models"].values() for name in sets)
    return list(dict.fromkeys(named))


def _tables(runs: Sequence[Run]) -> list[dict]:
    """A table for each set: a row for each run and model, a column for each measure."""
    tables = []
    for name in _set_names(runs):
        rows, notes, about, data = [], [], [], set()
        for color, run in _evaluated(runs):
            for model, results in _models(run, ("untrained", "trained", "averaged")):
                if name not in results:
                    continue
                result = results[name]
                rows.append({"run": run.name, "color": color, "model": model, "values": measures(result)})
                notes += [note for note in missing(result) if note not in notes]
                about += [_about(result)] if _about(result) not in about else []
                data.add(result.get("fingerprint"))  # early evaluations have none
        comparable = len(about) == 1 and len(data - {None}) <= 1
        if not comparable:
            notes.insert(
                0, f"The runs were evaluated on different data, so compare none of these rows: {'; '.join(about)}."
            )
        columns = zip(*(row["values"] for row in rows), strict=True)
        best = [max((v for v in column if v is not None and comparable), default=None) for column in columns]
        tables.append({"name": name, "about": about[0], "rows": rows, "best": best, "notes": notes})
    return tables


def _about(result: dict) -> str:
    parts = [result["note"]] if result.get("note") else []
    pairs = f"{result['num_genuine']:,} genuine and {result['num_impostor']:,} impostor pairs"
    if of_a_list(result):
        parts.append(f"a list of {pairs}")
    else:
        parts += [
            f"{result['num_samples']:,} samples of {result['num_identities']:,} identities",
            pairs,
            f"{result['num_distractors']:,} distractors" if result["num_distractors"] else "no distractors",
        ]
    return " · ".join(parts)


def _training_curves(runs: Sequence[Run], names: Iterator[str]) -> list[dict]:
    figures = (
        ("Loss", lambda row: row["loss"], {}),
        ("Target cosine", lambda row: row["target_cosine"], {}),
        ("Learning rate", lambda row: row["lr"], {}),
        ("Samples per second", lambda row: row["samples_per_second"], {}),
        (
            "Share of the step spent waiting for data",
            lambda row: row["data_wait"] / row["step_time"],
            {"percent": True},
        ),
        ("Length of the embeddings", lambda row: row["embedding_norm"], {}),
        ("Length of the batch's class centers", lambda row: row["center_norm"], {}),
        ("Norm of the backbone's gradient", lambda row: row["engine.gradient_norm"], {}),
        ("Memory, GiB", lambda row: row["memory"] / 2**30, {}),
    )
    drawn = []
    for title, value, options in figures:
        series = []
        for color, run in enumerate(runs):
            points = [(row["step"], value(row)) for row in run.metrics if _has(row, value)]
            if points:
                x, y = np.array(points, dtype=float).T
                series.append(Series(run.name, x, y, color))
        if series:
            drawn.append({"title": title, "svg": Markup(plots.curves(next(names), series, **options))})
    several = len(runs) > 1
    for run in runs:
        # early runs did not measure them
        rows = [row for row in run.metrics if all(row.get(f"phase.{name}") is not None for name in PHASES)]
        seconds = np.array([[row[f"phase.{name}"] for name in PHASES] for row in rows], dtype=float)
        if rows and np.isfinite(seconds).all() and (seconds >= 0).all() and (seconds.sum(axis=1) > 0).all():
            svg = plots.shares(next(names), np.array([row["step"] for row in rows]), *_in_groups(seconds))
            title = f"Where a step's time goes{f', {run.name}' if several else ''}"
            drawn.append({"title": title, "svg": Markup(svg)})
    return drawn


def _in_groups(seconds: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(rows, phases) to (rows, groups), a color of the page each, and the groups' names."""
    columns = [[PHASES.index(name) for name in phases] for phases in GROUPS.values()]
    return np.stack([seconds[:, column].sum(axis=1) for column in columns], axis=1), [*GROUPS]


def _has(row: dict, value) -> bool:
    try:
        return value(row) is not None
    except (KeyError, TypeError, ZeroDivisionError):  # the field is absent or null in this row
        return False


def _distinct(results: Mapping[str, dict]) -> list[tuple[str, str]]:
    """(title, set): sets of the same data share their pairs, hence all that is drawn of verification."""
    shared: dict[str, list[str]] = {}
    for name, result in results.items():
        shared.setdefault(result["data"], []).append(name)
    return [(" and ".join(sets), sets[0]) for sets in shared.values()]


def _rocs(runs: Sequence[Run], names: Iterator[str]) -> list[dict]:
    """One run: trained and untrained. Several: the trained models."""
    curves: dict[str, list[Series]] = {}
    several = len(runs) > 1
    for color, run in _evaluated(runs):
        for model, results in _models(run, ("trained",) if several else ("untrained", "trained")):
            for title, name in _distinct(results):
                x, y = np.array(results[name]["roc"], dtype=float).reshape(-1, 2).T
                shade = None if model == "untrained" else color
                curves.setdefault(title, []).append(Series(run.name if several else model, x, y, shade))
    return [{"title": title, "svg": Markup(plots.roc(next(names), series))} for title, series in curves.items()]


def _histograms(runs: Sequence[Run], names: Iterator[str]) -> list[dict]:
    drawn = []
    several = len(runs) > 1
    for _, run in _evaluated(runs):
        for model, results in _models(run, ("trained",) if several else ("trained", "untrained")):
            for title, name in _distinct(results):
                histogram, at = results[name]["histogram"], results[name]["tar_at_far"][FARS[0]]
                arrays = [np.asarray(histogram[part], dtype=float) for part in ("edges", "genuine", "impostor")]
                thresholds = [(f"FAR {FARS[0]}", at["threshold"])] if at else []
                svg = plots.histogram(next(names), *arrays, thresholds)
                drawn.append({"title": f"{title}, {run.name if several else model}", "svg": Markup(svg)})
    return drawn


def _models(run: Run, wanted: Sequence[str]) -> list[tuple[str, dict]]:
    models = run.evaluation["models"]
    return [(model, models[model]) for model in wanted if model in models]


def _examples(runs: Sequence[Run]) -> list[dict]:
    shown = []
    for color, run in _evaluated(runs):
        for _, results in _models(run, ["trained"]):
            for title, name in _distinct(results):
                groups, note = example_groups(results[name])
                shown.append({"run": run.name, "color": color, "set": title, "groups": groups, "note": note})
    return shown


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) where the runs differ, apart from their folder."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in ("run.dir", "environment.run"))
    rows = [(key, [str(run.config.get(key, "–")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
