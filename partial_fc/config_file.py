"""Configs as YAML: read with overrides, shown with their documentation, saved with what a run is made of."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from partial_fc import strict_yaml
from partial_fc.config import Config, check_config
from partial_fc.documents import read_text
from partial_fc.environment import environment
from partial_fc.files import shortened, write_atomically
from partial_fc.manifest import is_run_id
from partial_fc.storage import local_path


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The YAML at `path` over the defaults, then every `section.key=value`; a saved run's config.yaml works too.

    `--section.key=value` is the same.

    Raises ValueError with one message that lists everything wrong: unknown keys with the nearest known one, bad values
    with what was wanted; for YAML that `strict_yaml` does not read, its line.
    """
    path = local_path(path)
    try:
        text = read_text(path, strict_yaml.BYTES, pipes=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file") from None
    except OSError as error:  # a folder, no right to read it
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    values = _sections(text, path)
    values.pop("environment", None)  # what save_config noted beside the settings
    for override in without_dashes(overrides):
        _override(values, override, path)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = f"runs/{path.stem}"
    return check_config(values, f"{path} with its overrides")


def read_config_yaml(run: Path) -> tuple[str, dict]:
    """The text of a run folder's config.yaml, and its sections, which may be of another version; "" and {} without one.

    Raises ValueError for what is no YAML of sections.
    """
    file = run / "config.yaml"
    try:
        text = read_text(file, strict_yaml.BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return "", {}
    return text, _sections(text, file)


def _sections(text: str, path: Path) -> dict:
    values = strict_yaml.parse(text, path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted sections (run:, data:, ...), got {type(values).__name__}")
    return values


def without_dashes(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with each `--section.key=value` as `section.key=value`. Others stay as they are."""
    return [re.sub(r"^--(?=\w+(\.\w+)+=)", "", argument) for argument in arguments]


def _override(values: dict, override: str, path: Path) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"override {override!r}: wanted section.key=value, for example optim.lr=0.05")
    for part in parts[:-1]:
        inner = values.get(part)
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {part} is no section in {path}, it is {shortened(inner)}")
        values = inner
    values[parts[-1]] = strict_yaml.parse(text, f"override {override!r}: the value")


def describe(config: Config) -> str:
    """The merged config as YAML, each key with its documentation."""
    lines: list[str] = []

    def write(section: BaseModel, indent: str) -> None:
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                lines.append(f"{indent}{name}:")
                write(value, indent + "  ")
                continue
            plain = section.model_dump(mode="json", include={name})[name]
            line = f"{indent}{name}: {_plain(plain)}"
            lines.append(f"{line:<44} # {field.description}" if field.description else line)
        for name, value in (section.model_extra or {}).items():
            lines.append(f"{indent}{name}: {_plain(value)}")

    write(config, "")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """One line of YAML."""
    return strict_yaml.dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def save_config(config: Config, path: Path, device: str | None = None, run: str | None = None) -> None:
    """Writes the merged config with the git commit and the package versions it runs under.

    device: its name. run: the run's id, which its checkpoints have too.
    """
    values = config.model_dump(mode="json")
    notes = {"device": device, "run": run}
    values["environment"] = environment() | {name: note for name, note in notes.items() if note is not None}
    write_atomically(path, strict_yaml.dump(values, sort_keys=False))


def saved_checkpoint_dir(run: Path) -> str | None:
    """The checkpoint.dir of a run folder's config.yaml; None where that is unset or not there."""
    _, values = read_config_yaml(run)
    section = values.get("checkpoint") or {}
    found = section.get("dir") if isinstance(section, dict) else section
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{run / 'config.yaml'}: checkpoint.dir: got {shortened(found)}, wanted a folder or URL")
    return found or None


def saved_run_id(run: Path) -> str | None:
    """The run's id in its folder's config.yaml; None where that is not there, or of an early version."""
    notes = read_config_yaml(run)[1].get("environment")
    found = notes.get("run") if isinstance(notes, dict) else None
    return found if is_run_id(found) else None
