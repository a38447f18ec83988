"""config.json of an exported folder: its format, read without pydantic."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partial_fc.documents import MIB, parse_json, read_bytes
from partial_fc.files import shortened

FORMAT, VERSION = "partial_fc-backbone", 1
BYTES = MIB  # of the file, which takes 1 kB
LARGEST = 1 << 16  # pixels of a side, numbers of an embedding


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says, checked. Raises ValueError: the file, the field, what was got and what wanted."""
    file = folder / "config.json"
    try:
        config = parse_json(read_bytes(file, BYTES), file)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json: give a folder that `partial-fc export` wrote") from None
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} has the format {shortened(found)}, wanted {FORMAT!r}: `partial-fc export` writes it")
    if not _whole(config.get("version"), 0):
        raise ValueError(f"{file}: version: got {shortened(config.get('version'))}, wanted a whole number")
    if config["version"] > VERSION:
        raise ValueError(
            f"{file} has the format version {config['version']}, this partial_fc reads up to {VERSION}: upgrade it"
        )
    missing = [name for name in _FIELDS if name not in config]
    if missing:
        raise ValueError(f"{file} is damaged: it has no {', '.join(missing)}; export the run again")
    for name, (good, wanted) in _FIELDS.items():
        if not good(config[name]):
            raise ValueError(f"{file}: {name}: got {shortened(config[name])}, wanted {wanted}; export the run again")
    return config


def _whole(value: Any, least: int, most: int = (1 << 63) - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _numbers(value: Any, least: float) -> bool:
    """Of the three channels."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
        and all(least <= one <= LARGEST for one in value)
    )


def _backbone(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"name", "embedding_dim"}
        and isinstance(value["name"], str)
        and _whole(value["embedding_dim"], 1, LARGEST)
    )


def _size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_whole(side, 1, LARGEST) for side in value)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "backbone": (_backbone, f"a name and an embedding_dim of 1 to {LARGEST}"),
    "image_size": (_size, f"height and width of 1 to {LARGEST}"),
    "mean": (lambda value: _numbers(value, -LARGEST), "three numbers"),
    "std": (lambda value: _numbers(value, 1e-6), "three numbers above 0"),
    "flip": (lambda value: isinstance(value, bool), "true or false"),
    "model_sha256": (
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
        "a SHA-256",
    ),
}
