"""What a run folder holds, as far as the report needs it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

EVALUATION_VERSION = 2


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

    Raises FileNotFoundError if the folder is missing, ValueError on a broken metrics line or a newer evaluation format.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no run folder: give the folder that holds a run's config.yaml and metrics.jsonl"
        )
    config_file, evaluation_file = path / "config.yaml", path / "evaluation.json"
    config_text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    evaluation = json.loads(evaluation_file.read_text(encoding="utf-8")) if evaluation_file.exists() else None
    if evaluation is not None and evaluation["version"] > EVALUATION_VERSION:
        raise ValueError(
            f"{evaluation_file} has the format version {evaluation['version']}, this partial_fc reads up to "
            f"{EVALUATION_VERSION}: update partial_fc or evaluate again"
        )
    return Run(
        name=path.resolve().name,
        path=path,
        config_text=config_text,
        config=dotted(yaml.safe_load(config_text) or {}),
        metrics=_read_metrics(path / "metrics.jsonl"),
        evaluation=evaluation,
    )


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    rows = {}
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the run is writing it, or was killed while it did
                break
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(dotted(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
