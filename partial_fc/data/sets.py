"""The data set to train on: one, or several as one, less what is dropped; classes of one person as one.

Several sets become an index in the cache, with links to the shards that are files and the URLs of others; no shard is
rewritten. Their classes stay apart, as SET/NAME, unless data.merge says which are one.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partial_fc import storage
from partial_fc.config import Data, TrainingSet
from partial_fc.data.reader import image_size
from partial_fc.data.remote import PARTIAL, cache_of, locked, sizes
from partial_fc.data.shards import Index, load_index, write_index
from partial_fc.documents import read_text
from partial_fc.files import one_line, plain_name, shortened

BY_NAME = "by_name"
_MOST_BYTES = 1 << 30  # of a list of what to drop or to merge


def open_training_set(settings: Data, *, check_labels: bool = True) -> Index:
    """What data.train, data.drop and data.merge name. check_labels: see `load_index`.

    Raises what `load_index` does, and ValueError for sets of different images, for lists of pairs, and for lines of
    data.drop and data.merge that name nothing.
    """
    cache = cache_of(settings)
    chosen = settings.train if isinstance(settings.train, list) else [TrainingSet(data=settings.train)]
    indexes = [load_index(one.data, check_labels=check_labels, cache=cache) for one in chosen]
    if len(indexes) == 1 and settings.drop is None and settings.merge is None:
        return indexes[0]
    names = _names(chosen) if isinstance(settings.train, list) else [""]
    _check(indexes)
    drop = [] if settings.drop is None else _lines(Path(settings.drop))
    merge = settings.merge
    pairs = [] if merge in (None, BY_NAME) else _pairs(Path(str(merge)))
    # the folders too: a set that has moved needs other links
    sets = [[index.fingerprint, str(index.path.resolve())] for index in indexes]
    recipe = [sets, names, sorted(drop), merge == BY_NAME, sorted(pairs)]
    folder = cache.folder / "indexes" / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    partial = folder.with_suffix(PARTIAL)
    with locked(folder.with_suffix(".lock"), lambda: sizes(partial, "**/*")):  # one rank of a machine makes it
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
            partial.mkdir(parents=True)
            _write(partial, indexes, names, drop, merge == BY_NAME, dict(pairs))
            partial.rename(folder)
    return load_index(folder, check_labels=check_labels, cache=cache)


def _names(chosen: Sequence[TrainingSet]) -> list[str]:
    names = [one.name or storage.last_name(storage.place(one.data)) for one in chosen]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"data.train: two sets are called {twice!r}: give one of them another `name`")
    return [plain_name(name, "data.train", "name") for name in names]


def _check(indexes: list[Index]) -> None:
    first = indexes[0]
    for index in indexes:
        if index.pairs is not None:
            raise ValueError(f"data.train: {index.path} is a list of pairs, which does not say who is who")
        if index.crc32 is None or index.names is None:
            raise ValueError(
                f"data.train: {index.path} has index version {index.version}, which has no source names: prepare it "
                "again"
            )
        if image_size(index) != image_size(first):
            raise ValueError(
                f"data.train: {index.path} has images of {image_size(index)} pixels, {first.path} of "
                f"{image_size(first)}: wanted one size (height, width)"
            )


def _lines(file: Path) -> list[str]:
    return [line for line in read_text(file, _MOST_BYTES).splitlines() if line.strip()]


def _pairs(file: Path) -> list[tuple[str, str]]:
    """Class and the name that it gets, of each line of a merge file."""
    rows = [tuple(line.split("\t")) for line in _lines(file)]
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not all(row):
            raise ValueError(
                f"{file}, line {number}: got {shortened(row)}, wanted a class as classes.txt names it, a tab, and the "
                "name that it gets; classes of one name are one"
            )
    renamed: dict[str, str] = {}
    for number, (one, name) in enumerate(rows, 1):
        if renamed.setdefault(one, name) != name:
            raise ValueError(f"{file}, line {number}: got {one!r} as {name!r}, before as {renamed[one]!r}: wanted one")
    return [(row[0], row[1]) for row in rows]


def _write(
    folder: Path, indexes: list[Index], names: list[str], drop: list[str], by_name: bool, renamed: dict[str, str]
) -> None:
    called: list[str] = []  # every class of every set, as SET/NAME, and what it is called in the end
    final: list[str] = []
    for index, name in zip(indexes, names, strict=True):
        for one in index.classes():
            full = f"{name}/{one}" if name else one
            called.append(full)
            final.append(renamed.pop(full, one if by_name else full))
    if renamed:
        raise ValueError(f"data.merge: {shortened(next(iter(renamed)))} is no class of data.train; they are SET/NAME")
    counts = np.array([index.num_classes for index in indexes])
    label = np.concatenate(
        [index.label + start for index, start in zip(indexes, np.cumsum(counts) - counts, strict=True)]
    )
    keep = _kept(indexes, names, label, called, drop)
    had = np.bincount(label, minlength=len(called)) > 0
    has = np.bincount(label[keep], minlength=len(called)) > 0
    number: dict[str, int] = {}
    of_class = np.full(len(called), -1, np.int64)
    for i in np.flatnonzero(has | ~had).tolist():  # a class stays that had no sample before
        of_class[i] = number.setdefault(final[i], len(number))
    if not keep.any():
        raise ValueError("data.drop leaves no sample of data.train")

    shards: list[dict[str, Any]] = []
    shard, first = [], 0
    for place, index in enumerate(indexes):
        width = f"{place}-" if len(indexes) > 1 else ""
        for one in index.shards:
            described = one.model_dump(exclude_none=True, exclude={"samples"}) | {"name": f"{width}{one.name}"}
            if one.url is None:
                (folder / described["name"]).symlink_to((index.path / one.name).resolve())
            shards.append(described)
        shard.append(index.shard.astype(np.int32) + np.int32(first))
        first += len(index.shards)
    lengths = np.concatenate([np.diff(index.names[1]) for index in indexes if index.names])[keep]
    write_index(
        folder,
        shards,
        {
            "shard": np.concatenate(shard)[keep],
            "offset": np.concatenate([index.offset for index in indexes])[keep],
            "size": np.concatenate([index.size for index in indexes])[keep],
            "label": of_class[label[keep]],
        },
        {
            "crc32": np.concatenate([index.crc32 for index in indexes if index.crc32 is not None])[keep],
            "name": _source_names(indexes, keep),
            "name_offset": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        },
        list(number),
        {
            "kind": "sets",
            "source": one_line(", ".join(str(index.path) for index in indexes)),
            "image_size": indexes[0].prepared["image_size"],
            "sets": [{"name": name, "shards": len(index.shards)} for name, index in zip(names, indexes, strict=True)],
            "dropped": int(len(keep) - keep.sum()),
        },
        [],
    )


def _source_names(indexes: list[Index], keep: np.ndarray) -> np.ndarray:
    lengths = np.concatenate([np.diff(index.names[1]) for index in indexes if index.names])
    everything = np.concatenate([index.names[0] for index in indexes if index.names])
    return everything if keep.all() else everything[np.repeat(keep, lengths)]


def _kept(indexes: list[Index], names: list[str], label: np.ndarray, called: list[str], drop: list[str]) -> np.ndarray:
    """(N,) of which samples stay. Raises ValueError for a line of data.drop that is neither a class nor a sample."""
    keep = np.ones(len(label), bool)
    wanted = set(drop)
    classes = {name: i for i, name in enumerate(called)}
    of_class = np.zeros(len(called), bool)
    of_class[[classes[name] for name in wanted if name in classes]] = True
    keep &= ~of_class[label]
    samples = wanted - classes.keys()
    if samples:
        first, found = 0, set()
        for index, name in zip(indexes, names, strict=True):
            for i in range(index.num_samples):  # 1 us a sample
                own = f"{name}/{index.name(i)}" if name else index.name(i)
                if own in samples:
                    keep[first + i] = False
                    found.add(own)
            first += index.num_samples
        if samples - found:
            raise ValueError(
                f"data.drop: {shortened(min(samples - found))} is neither a class nor the source name of a sample of "
                f"data.train{'; of several sets they are SET/NAME' if names != [''] else ''}"
            )
    return keep
