"""Configs as YAML: read with overrides, shown with their documentation, saved with what a run is made of."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from partial_fc.config import Config, check_config
from partial_fc.environment import environment
from partial_fc.storage import local_path


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The YAML at `path` over the defaults, then every `section.key=value`; a saved run's config.yaml works too.

    Raises ValueError with one message that lists everything wrong: unknown keys with the nearest known one, bad values
    with what was wanted.
    """
    path = local_path(path)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file") from None
    except (IsADirectoryError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted sections (run:, data:, ...), got {type(values).__name__}")
    values.pop("environment", None)  # what save_config noted beside the settings
    for override in overrides:
        _override(values, override)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = f"runs/{path.stem}"
    return check_config(values, f"{path} with its overrides")


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"override {override!r}: wanted section.key=value, for example optim.lr=0.05")
    for part in parts[:-1]:
        inner = values.get(part)
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {part} is no section, it is {inner!r}")
        values = inner
    try:
        values[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is no YAML: {error}") from None


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
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def save_config(config: Config, path: Path, device: str | None = None) -> None:
    """Writes the merged config with the git commit and the package versions it runs under, and the device's name."""
    values = config.model_dump(mode="json")
    values["environment"] = environment() | ({} if device is None else {"device": device})
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False))
    temporary.rename(path)


def saved_checkpoint_dir(run: Path) -> str | None:
    """The checkpoint.dir of a run folder's config.yaml; None where that is unset or not there."""
    try:
        values = yaml.safe_load((run / "config.yaml").read_text()) or {}
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (values.get("checkpoint") or {}).get("dir")
