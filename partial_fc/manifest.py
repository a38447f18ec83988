"""manifest.json of a checkpoint: what it must say, read by a small parser, since it may be damaged or a stranger's.

    format, version     "partial_fc-checkpoint", 1
    run                 id of the run that wrote it, 16 hexadecimal digits; early checkpoints have none
    adopted             step folders without an id that this run went on from, and may delete like its own
    step                updates that the run had made
    num_classes, embedding_dim, sub_centers, dtype, center_state      of the head; without sub_centers it has one
    settings            what the run must not change on resume, and whatever its own loop keeps there
    files               name, bytes and sha256 of each; of a part of the class centers also its classes, half open

Sizes are bounded here: what they ask memory for cannot be more than the files themselves have.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partial_fc.documents import parse_json
from partial_fc.files import plain_name, shortened

NAME = "manifest.json"
FORMAT, VERSION = "partial_fc-checkpoint", 1
MOST_BYTES = 1 << 26  # of manifest.json; 250 a file, and there is one for each GiB of class centers
MOST_CLASSES = 2**31 - 1  # tables of class ids have 32 bits
ITEM_BYTES = {"float32": 4, "float64": 8}


class Damaged(ValueError):
    """A file of a checkpoint is missing, or is not what its checksum or its schema says.

    what: the damage without advice. folder: the checkpoint, where it is known.
    """

    def __init__(self, what: str, folder: Path | str | None = None, advice: str = ""):
        super().__init__(f"{what}; {advice}" if advice else what)
        self.what, self.folder = what, folder


class Missing(ValueError):
    """There is no manifest.json, so there is no complete checkpoint."""


class Foreign(ValueError):
    """A manifest.json of something else."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder by its name, step_00001200; None for other names."""
    digits = name.removeprefix("step_")
    step = int(digits) if re.fullmatch("[0-9]{8,18}", digits, re.ASCII) else 0
    return step if name == step_name(step) else None


def parse(data: bytes, file: object) -> dict[str, Any]:
    """The manifest that `data` holds, every field checked; `file` is named in errors.

    Raises Damaged with file, field, what was got and what was wanted; Foreign for another format; ValueError for a
    newer version.
    """
    if len(data) > MOST_BYTES:
        raise Damaged(f"{file}: got more than {MOST_BYTES:,} bytes, which no manifest needs")
    try:
        values = parse_json(data, file)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if not isinstance(values, dict):
        raise Damaged(f"{file}: got {shortened(values)}, wanted an object with format, version, step, files")
    if values.get("format") != FORMAT:
        raise Foreign(f"{file} has format {shortened(values.get('format'))}; wanted {FORMAT!r}")
    version = _whole(values, "version", file, 1, 2**31)
    if version > VERSION:
        raise ValueError(f"{file} has checkpoint version {version}; this partial_fc reads up to {VERSION}: upgrade it")
    try:
        _check(values, file)
    except Damaged:
        raise
    except ValueError as error:  # of a name
        raise Damaged(str(error)) from None
    return values


def _check(values: dict, file: object) -> None:
    _whole(values, "step", file, 0, 10**15)
    num_classes = _whole(values, "num_classes", file, 1, MOST_CLASSES)
    dim = _whole(values, "embedding_dim", file, 1, 2**24)
    k = _whole(values, "sub_centers", file, 1, 2**16) if "sub_centers" in values else 1
    dtype = _field(values, "dtype", file, lambda v: isinstance(v, str) and v in ITEM_BYTES, " or ".join(ITEM_BYTES))
    words = re.compile("[a-z_]{1,64}")
    _list(values, "center_state", file, lambda v: isinstance(v, str) and bool(words.fullmatch(v)), "names of tensors")
    if "run" in values:
        _field(values, "run", file, is_run_id, "16 hexadecimal digits")
    if "adopted" in values:
        _list(
            values, "adopted", file, lambda v: isinstance(v, str) and step_of(v) is not None, "names as step_00001200"
        )
    _field(values, "settings", file, lambda v: isinstance(v, dict), "an object")
    names = set()
    for number, entry in enumerate(_list(values, "files", file, lambda v: isinstance(v, dict), "objects")):
        prefix = f"files[{number}]."
        names.add(plain_name(entry.get("name"), file, f"{prefix}name"))
        if len(names) <= number or entry["name"] == NAME:
            raise Damaged(f"{file}: {prefix}name: got {shortened(entry['name'])} again, wanted other names")
        size = _whole(entry, "bytes", file, 0, 2**62, prefix)
        _field(entry, "sha256", file, _is_sha256, "64 hexadecimal digits", prefix)
        if "classes" in entry:
            wanted = f"[first, last) within the {num_classes} classes"
            first, last = _field(entry, "classes", file, lambda v: _is_range(v, num_classes), wanted, prefix)
            least = (last - first) * k * dim * ITEM_BYTES[dtype]
            if size < least:
                raise Damaged(
                    f"{file}: {prefix}bytes: got {size}, wanted {least} or more for {last - first} classes of {k} x "
                    f"{dim} {dtype}"
                )


def is_run_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_range(value: object, stop: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(end) is int for end in value)
        and 0 <= value[0] < value[1] <= stop
    )


def _whole(values: dict, name: str, file: object, least: int, most: int, prefix: str = "") -> int:
    wanted = f"a whole number from {least} to {most}"
    return _field(values, name, file, lambda value: type(value) is int and least <= value <= most, wanted, prefix)


def _list(values: dict, name: str, file: object, good: Callable[[Any], bool], wanted: str) -> list:
    _field(values, name, file, lambda value: isinstance(value, list), f"a list of {wanted}")
    for number, value in enumerate(values[name]):
        if not good(value):
            raise Damaged(f"{file}: {name}[{number}]: got {shortened(value)}, wanted {wanted}")
    return values[name]


def _field(values: dict, name: str, file: object, good: Callable[[Any], bool], wanted: str, prefix: str = "") -> Any:
    if name not in values:
        raise Damaged(f"{file}: {prefix}{name}: got nothing, wanted {wanted}")
    if not good(values[name]):
        raise Damaged(f"{file}: {prefix}{name}: got {shortened(values[name])}, wanted {wanted}")
    return values[name]
