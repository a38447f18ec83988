"""What a run was made with: git commit, versions. And how to install what is missing."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from partial_fc import strict_yaml
from partial_fc.files import shortened


def environment() -> dict[str, str]:
    """git commit and versions; what cannot be told is said to be unknown."""
    packages = ("partial_fc", "torch", "numpy", "opencv-python-headless", "webdataset", "safetensors", "timm")
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):  # timm is optional
            found[name] = version(name)
    return {"git_commit": _git_commit(), "python": platform.python_version(), **found}


def pip_install(*packages: str) -> str:
    """The command that installs optional packages in the versions that pyproject.toml wants, with a checkout or not."""
    wanted = {name: name for name in packages}
    with suppress(PackageNotFoundError):  # imported from a folder on PYTHONPATH
        for requirement in map(Requirement, requires("partial_fc") or []):
            if requirement.name in wanted and requirement.specifier:
                wanted[requirement.name] = f"'{requirement.name}{requirement.specifier}'"
    return f"pip install {' '.join(wanted.values())}"


def _git_commit() -> str:
    commit = _git("rev-parse", "HEAD")
    # a study appends to its ledger while it runs
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)configs/study/*.jsonl")
    return commit + "-dirty" * bool(changed) if commit else "unknown"


def _git(*arguments: str) -> str:
    """What git says in this folder; nothing where it fails or is not there."""
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def read_environment(text: str, name: object) -> dict[str, str]:
    """What `config_file.save_config` noted beside the settings, of the text of its file; empty without it.

    Raises ValueError, which names the file `name`, for what is no YAML of sections.
    """
    values = strict_yaml.parse(text, name) or {}
    found = values.get("environment") or {} if isinstance(values, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: environment: got {shortened(found)}, wanted names and values")
    return {str(key): str(value) for key, value in found.items()}
