"""What a run folder holds, as far as the report needs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partial_fc.config_file import read_config_yaml
from partial_fc.documents import MIB, parse_json, read_bytes
from partial_fc.evaluate.evaluation_file import read_evaluation
from partial_fc.files import shortened
from partial_fc.phases import NAMES as PHASES

METRICS_BYTES = 128 * MIB  # of metrics.jsonl: 180,000 rows
# Of a row: what is drawn, numbers or null. It may have more.
NUMBERS = (
    "loss",
    "target_cosine",
    "lr",
    "samples_per_second",
    "data_wait",
    "step_time",
    "embedding_norm",
    "center_norm",
    "engine.gradient_norm",
    "memory",
    *(f"phase.{name}" for name in PHASES),
)
LARGEST = 1e100  # beyond what float32 has, and a plot's arithmetic holds it


@dataclass(frozen=True)
class Run:
    name: str
    path: Path
    config_text: str  # "" if there is no config.yaml
    config: dict[str, Any]  # its values under dotted names
    metrics: list[dict[str, Any]]  # a row a logged step, steps ascending
    evaluation: dict[str, Any] | None


def load_run(path: Path) -> Run:
    """Read a run folder. Each of its files may be missing.

    Raises FileNotFoundError if the folder is missing, and ValueError, which names file and field, for a file that is
    damaged or of a newer format.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no run folder: give the folder that holds a run's config.yaml and metrics.jsonl"
        )
    config_text, config = read_config_yaml(path)
    evaluation = read_evaluation(path / "evaluation.json")
    return Run(
        name=path.resolve().name,
        path=path,
        config_text=config_text,
        config=dotted(config),
        metrics=_read_metrics(path / "metrics.jsonl"),
        evaluation=evaluation,
    )


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(file, METRICS_BYTES).splitlines()
    except FileNotFoundError:
        return []
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line, f"{file}, line {number}")
        except ValueError:
            if number == len(lines):  # the run is writing it, or was killed while it did
                break
            raise
        _check_row(row, f"{file}, line {number}")
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {shortened(row)}, wanted an object with a step")
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
        raise ValueError(f"{where}: step: got {shortened(step)}, wanted a number of steps")
    for name in NUMBERS:
        value = row.get(name)
        good = value is None or isinstance(value, int | float) and not isinstance(value, bool)
        if not good or isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{where}: {name}: got {shortened(value)}, wanted a number or null")


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(dotted(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
