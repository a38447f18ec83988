"""The data set folder: tar shards of images in the WebDataset layout, and an index of where every image lies.

    shard-000000.tar …   members <key>.<extension> (the image) and <key>.cls (its label in ASCII); written
                         here, a key is the 9-digit sample number
    index.json           format version, sizes and checksums, how the data set was prepared
    index/shard.npy      (N,) int32   shard number of a sample
    index/offset.npy     (N,) int64   where its image starts in that shard, in bytes
    index/size.npy       (N,) int32   length of its image, in bytes
    index/label.npy      (N,) int64   its class
    index/<name>.npy     (N, …)       further arrays, one row a sample
    index/pairs.npy      (P, 3) int64 of a list of pairs for verification alone: two samples, and
                                       whether they are of one identity, 1 or 0. Its samples have a
                                       class each, since who is who is not known
    classes.txt          line i = name of class i, UTF-8

N is the number of samples; they are numbered in the order of (shard, offset). The arrays are memory-mapped:
however many ranks and workers a machine has, it holds one copy of them, in its page cache.
"""

import hashlib
import json
import shutil
import tarfile
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

FORMAT = "partial_fc-index"
VERSION = 2
WITHOUT_PAIRS = 1  # what data sets without pairs.npy have, which the version before reads
SHARD_BYTES = 256 * 2**20

_DTYPES = {"shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int64}
_BLOCK = tarfile.BLOCKSIZE  # 512: a header's length, and what a payload is padded to
_AGAIN = "copy the data set again, or prepare it again"
_CHECKED_AT_ONCE = 2**20  # samples: keeps the temporaries of load_index at a few MiB


@dataclass(frozen=True, eq=False)
class Index:
    """Where every sample of a data set lies. N samples, C classes; arrays are read-only memory maps."""

    path: Path
    num_samples: int
    num_classes: int
    shard_names: list[str]
    shard: np.ndarray  # (N,) int32
    offset: np.ndarray  # (N,) int64
    size: np.ndarray  # (N,) int32
    label: np.ndarray  # (N,) int64
    extra: dict[str, np.ndarray]  # further arrays, (N, …) each
    prepared: dict[str, Any]  # how the data set was made: kind, source, image_size, what was dropped and why
    fingerprint: str  # sha256 over the checksums of the arrays and shards: the identity of the data set
    pairs: np.ndarray | None = None  # (P, 3) int64 of a list of pairs

    @property
    def samples_per_shard(self) -> np.ndarray:
        """(number of shards,) int64."""
        return np.bincount(self.shard, minlength=len(self.shard_names))

    def shard_path(self, sample: int) -> Path:
        return self.path / self.shard_names[self.shard[sample]]

    def key(self, sample: int) -> str:
        """The sample's key, from the tar header before its image; `shard@offset` if that header is broken."""
        offset = int(self.offset[sample])
        try:
            with self.shard_path(sample).open("rb") as file:
                file.seek(offset - _BLOCK)
                name = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape").name
        except (OSError, tarfile.HeaderError):
            return f"{self.shard_path(sample).name}@{offset}"
        folder, _, base = name.rpartition("/")
        key = base.partition(".")[0]  # WebDataset: the key ends at the first dot of the base name
        return f"{folder}/{key}" if folder else key

    def classes(self) -> list[str]:
        """The names of the C classes. Raises ValueError if classes.txt has another number of lines."""
        names = (self.path / "classes.txt").read_bytes().decode("utf-8").split("\n")[:-1]
        if len(names) != self.num_classes:
            raise ValueError(
                f"{self.path / 'classes.txt'} names {len(names)} classes, index.json says {self.num_classes}: {_AGAIN}"
            )
        return names


def require_new(out: Path) -> None:
    """Raises FileExistsError if `out` exists. For the start of a long preparation; `write_shards` checks again."""
    if out.exists():
        raise FileExistsError(f"{out} exists: delete it, or choose another folder to write to")


def write_shards(
    out: Path,
    samples: Iterable[tuple[bytes, str, int]],
    classes: list[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    prepared: dict[str, Any],
    total: int | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    pairs: np.ndarray | None = None,
) -> Index:
    """Write `samples` (image bytes, extension without dot, label) to the new folder `out`, in this order.

    The reader shuffles within windows only: give the samples in a seeded random order. Equal input gives
    equal shards and arrays, byte for byte. The samples of a shard take at most `shard_bytes`, unless there is
    only one. `total`, the number of samples, is for the progress bar. `arrays` are further arrays of one row
    a sample; `pairs` (P, 3) makes it a list of pairs. `prepared` says what made the data set; the reader needs its
    `image_size: [H, W]`. The folder appears when it is complete; until then it is `out` + ".partial".

    Raises FileExistsError if `out` exists, ValueError on a bad label, class name, extension or array.
    """
    out = Path(out)
    require_new(out)
    _check_class_names(classes)
    for name in arrays or {}:
        if name in (*_DTYPES, "pairs") or not name.isidentifier():
            raise ValueError(f"got an extra array named {name!r}, wanted an identifier other than {', '.join(_DTYPES)}")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    (partial / "index").mkdir(parents=True)
    try:
        bar = tqdm(samples, desc=f"writing {out.name}", unit=" images", total=total, mininterval=1)
        shard_names, columns = _write_tars(partial, bar, len(classes), shard_bytes)
        num_samples = len(columns["label"])
        for name, values in (arrays or {}).items():
            if len(values) != num_samples:
                raise ValueError(f"got {len(values)} rows for array {name!r}, wanted one a sample: {num_samples}")
        columns.update(arrays or {})
        for name, values in columns.items():
            np.save(partial / "index" / f"{name}.npy", values, allow_pickle=False)
        if pairs is not None:
            np.save(partial / "index" / "pairs.npy", pairs.astype(np.int64), allow_pickle=False)

        (partial / "classes.txt").write_bytes("".join(name + "\n" for name in classes).encode("utf-8"))
        counts = np.bincount(columns["shard"], minlength=len(shard_names))
        description = {
            "format": FORMAT,
            "version": WITHOUT_PAIRS if pairs is None else VERSION,
            "num_samples": num_samples,
            "num_classes": len(classes),
            "shards": [
                {
                    "name": name,
                    "bytes": (partial / name).stat().st_size,
                    "sha256": _sha256(partial / name),
                    "samples": int(count),
                }
                for name, count in zip(shard_names, counts, strict=True)
            ],
            "classes_sha256": _sha256(partial / "classes.txt"),
            "arrays": {name: _sha256(partial / "index" / f"{name}.npy") for name in columns},
            **({} if pairs is None else {"pairs_sha256": _sha256(partial / "index" / "pairs.npy")}),
            "prepared": prepared,
        }
        (partial / "index.json").write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return load_index(out)


def load_index(path: Path | str) -> Index:
    """Open the data set in folder `path` and check it against itself, without reading any shard's bytes.

    Raises FileNotFoundError or ValueError naming the file, and for a label that is no class the sample's key.
    Damage inside a shard of the right length is found by `verify` only.
    """
    path = Path(path)
    description = _read_description(path)
    shards, num_samples, num_classes = (description[name] for name in ("shards", "num_samples", "num_classes"))
    for shard in shards:
        _check_shard_file(path / shard["name"], shard["bytes"])
    _check_checksum(path / "classes.txt", description["classes_sha256"])  # permuted names would be other people

    arrays = {name: _open_array(path / "index" / f"{name}.npy", num_samples) for name in description["arrays"]}
    for name, dtype in _DTYPES.items():
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].ndim != 1:
            got = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "none"
            raise ValueError(f"{path}: got {got} for the array {name!r}, wanted {np.dtype(dtype)} (N,): {_AGAIN}")
    pairs = None
    if "pairs_sha256" in description:
        _check_checksum(path / "index" / "pairs.npy", description["pairs_sha256"])
        pairs = _open_pairs(path / "index" / "pairs.npy", num_samples)
    checksums = [
        *([] if pairs is None else [("pairs", description["pairs_sha256"])]),
        ("classes.txt", description["classes_sha256"]),
        *sorted(description["arrays"].items()),
        *((shard["name"], shard["sha256"]) for shard in shards),
    ]
    index = Index(
        path=path,
        num_samples=num_samples,
        num_classes=num_classes,
        shard_names=[shard["name"] for shard in shards],
        **{name: arrays.pop(name) for name in _DTYPES},
        extra=arrays,
        pairs=pairs,
        prepared=description["prepared"],
        fingerprint=hashlib.sha256(json.dumps(checksums).encode()).hexdigest(),
    )
    _check_samples(index, np.array([shard["bytes"] for shard in shards], dtype=np.int64))
    got, wanted = index.samples_per_shard.tolist(), [shard["samples"] for shard in shards]
    if got != wanted:
        name = next(name for name, a, b in zip(index.shard_names, got, wanted, strict=True) if a != b)
        raise ValueError(f"{path}: index/shard.npy and index.json disagree on the number of samples in {name}")
    return index


def verify(index: Index) -> None:
    """Read every byte of the data set. Raises ValueError naming the first file whose checksum is wrong."""
    description = _read_description(index.path)
    files = [(index.path / "index" / f"{name}.npy", sha256) for name, sha256 in description["arrays"].items()]
    files += [(index.path / shard["name"], shard["sha256"]) for shard in description["shards"]]
    files.append((index.path / "classes.txt", description["classes_sha256"]))
    if index.pairs is not None:
        files.append((index.path / "index" / "pairs.npy", description["pairs_sha256"]))
    for file, wanted in tqdm(files, desc=f"verifying {index.path.name}", unit=" files", mininterval=1):
        _check_checksum(file, wanted)


def _write_tars(
    folder: Path, samples: Iterable[tuple[bytes, str, int]], num_classes: int, shard_bytes: int
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Write the shards; return their names and the index's columns."""
    columns = {"shard": array("i"), "offset": array("q"), "size": array("i"), "label": array("q")}
    names: list[str] = []
    writer: TarWriter | None = None
    with ExitStack() as shard:
        for number, (image, extension, label) in enumerate(samples):
            key = f"{number:09d}"
            if not 0 <= label < num_classes:
                raise ValueError(_bad_label(key, label, num_classes))
            if not extension.isalnum() or extension == "cls":
                raise ValueError(f"sample {key} has the extension {extension!r}, wanted one like 'jpg'")
            cls = str(int(label)).encode("ascii")
            needed = sum(_BLOCK + -(-len(payload) // _BLOCK) * _BLOCK for payload in (image, cls))
            if writer is None or writer.tarstream.offset + needed > shard_bytes:
                shard.close()
                names.append(f"shard-{len(names):06d}.tar")
                stream = shard.enter_context((folder / names[-1]).open("wb"))
                # An integer mtime keeps every header at one block; all fixed, shards depend on samples alone.
                fixed = {"user": "", "group": "", "mode": 0o444, "mtime": 0}
                writer = shard.enter_context(TarWriter(stream, encoder=False, compress=False, **fixed))
            columns["shard"].append(len(names) - 1)
            columns["offset"].append(writer.tarstream.offset + _BLOCK)
            columns["size"].append(len(image))
            columns["label"].append(label)
            # Two calls, or the members would be in the order of their extensions.
            writer.write({"__key__": key, extension: image})
            writer.write({"__key__": key, "cls": cls})
    if not names:
        raise ValueError("got no samples to write, wanted at least one")
    return names, {name: np.frombuffer(values, dtype=_DTYPES[name]) for name, values in columns.items()}


_KEYS = ("version", "num_samples", "num_classes", "shards", "classes_sha256", "arrays", "prepared")


def _read_description(path: Path) -> dict[str, Any]:
    file = path / "index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no data set: it has no index.json (`partial-fc prepare` makes one)")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}: {_AGAIN}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        description = description if isinstance(description, dict) else {}
        raise ValueError(f"{file} has the format {description.get('format')!r}, wanted {FORMAT!r}")
    if description.get("version", 0) > VERSION:
        raise ValueError(
            f"{file} has the format version {description['version']}, this partial_fc reads up to {VERSION}: "
            "update partial_fc, or prepare the data set again with this one"
        )
    missing = [name for name in _KEYS if name not in description]
    if missing:
        raise ValueError(f"{file} is damaged or of an old format: it has no {', '.join(missing)}: {_AGAIN}")
    names = [*(shard["name"] for shard in description["shards"]), *description["arrays"]]
    outside = [name for name in names if Path(name).name != name]
    if outside:  # the index may be somebody else's
        raise ValueError(f"{file} names {outside[0]!r}, which is outside its folder: {_AGAIN}")
    return description


def _check_checksum(file: Path, wanted: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {_AGAIN}")
    got = _sha256(file)
    if got != wanted:
        raise ValueError(f"{file} is damaged: its sha256 is {got}, the index says {wanted}: {_AGAIN}")


def _check_shard_file(file: Path, wanted: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {_AGAIN}")
    got = file.stat().st_size
    if got != wanted:
        raise ValueError(f"{file} has {got} bytes, the index says {wanted}: {_AGAIN}")


def _open_array(file: Path, num_samples: int) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {_AGAIN}")
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged: {error}: {_AGAIN}") from error
    if len(values) != num_samples:
        raise ValueError(f"{file} has {len(values)} rows, index.json says {num_samples} samples: {_AGAIN}")
    return values


def _open_pairs(file: Path, num_samples: int) -> np.ndarray:
    pairs = np.load(file, mmap_mode="r", allow_pickle=False)
    good = pairs.ndim == 2 and pairs.shape[1] == 3 and pairs.dtype == np.int64
    if not good:
        raise ValueError(f"{file} has {pairs.dtype} {pairs.shape}, wanted int64 (P, 3): {_AGAIN}")
    bad = ((pairs < 0) | (pairs >= (num_samples, num_samples, 2))).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{file} has {pairs[row].tolist()} at row {row}, wanted two of {num_samples} samples, and 1 or 0: {_AGAIN}"
        )
    return pairs


def _check_samples(index: Index, shard_bytes: np.ndarray) -> None:
    """Every label is a class, every image lies inside its shard, and the samples are in order."""

    def first(start: int, wrong: np.ndarray) -> int | None:
        return start + int(np.argmax(wrong)) if wrong.any() else None

    last_shard, last_end = 0, 0
    for start in range(0, index.num_samples, _CHECKED_AT_ONCE):
        rows = slice(start, start + _CHECKED_AT_ONCE)
        shard, offset, label = index.shard[rows], index.offset[rows], index.label[rows]
        end = offset + index.size[rows]
        sample = first(start, (shard < 0) | (shard >= len(shard_bytes)))
        if sample is not None:
            raise ValueError(
                f"{index.path}: sample {sample} is in shard number {index.shard[sample]}, "
                f"there are {len(shard_bytes)} shards: {_AGAIN}"
            )
        before_shard = np.concatenate(([last_shard], shard[:-1]))
        before_end = np.concatenate(([last_end], end[:-1]))
        unordered = (shard < before_shard) | ((shard == before_shard) & (offset < before_end))
        sample = first(start, unordered | (end < offset) | (offset < _BLOCK) | (end > shard_bytes[shard]))
        if sample is not None:
            raise ValueError(
                f"{index.path}: got {index.size[sample]} bytes at {index.offset[sample]} of "
                f"{index.shard_path(sample).name} for sample {sample}, which is outside that file or before "
                f"the end of sample {sample - 1}: {_AGAIN}"
            )
        sample = first(start, (label < 0) | (label >= index.num_classes))
        if sample is not None:
            message = _bad_label(index.key(sample), int(index.label[sample]), index.num_classes)
            raise ValueError(f"{index.path}: {message}")
        last_shard, last_end = int(shard[-1]), int(end[-1])


def _check_class_names(classes: list[str]) -> None:
    for name in classes:
        if "\n" in name:
            raise ValueError(f"the class name {name!r} contains a line break, wanted one line a name: rename the class")


def _bad_label(key: str, label: int, num_classes: int) -> str:
    return (
        f"sample {key} has the label {label}, wanted 0 <= label < {num_classes} (the number of classes): "
        "correct the label or the list of classes"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
