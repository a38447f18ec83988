"""What a run was made with: git commit, versions."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml


def environment() -> dict[str, str]:
    """git commit and versions; what cannot be told is said to be unknown."""
    packages = ("partial_fc", "torch", "numpy", "opencv-python-headless", "webdataset", "safetensors", "timm")
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):  # timm is optional
            found[name] = version(name)
    return {"git_commit": _git_commit(), "python": platform.python_version(), **found}


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


def read_environment(text: str) -> dict[str, str]:
    """What `config_file.save_config` noted beside the settings, of the text of its file; empty where it has none."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return {}
    notes = values.get("environment") if isinstance(values, dict) else None
    return notes if isinstance(notes, dict) else {}
