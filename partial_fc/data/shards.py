"""The data set folder: tar shards of images in the WebDataset layout, and an index of where every image lies.

    shard-000000.tar …     members <key>.<extension> (the image) and <key>.cls (its label in ASCII); written
                           here, a key is the 9-digit sample number
    index.json             format version, sizes and checksums, how the data set was prepared (`description`)
    index/shard.npy        (N,) int32   shard number of a sample
    index/offset.npy       (N,) int64   where its image starts in that shard, in bytes
    index/size.npy         (N,) int32   length of its image, in bytes
    index/label.npy        (N,) int64   its class
    index/crc32.npy        (N,) uint32  CRC32 of its image
    index/name.npy         (bytes,) uint8   the source names of all samples, UTF-8, end to end
    index/name_offset.npy  (N + 1,) int64   where each name begins in it
    index/<name>.npy       (N, …)       further arrays, one row per sample
    index/pairs.npy        (P, 3) int64 of a list of pairs for verification alone: two samples, and
                                         whether they are of one identity, 1 or 0. Its samples have a
                                         class each, since who is who is not known
    classes.txt            line i = name of class i, UTF-8
    left_out.jsonl         what was not taken: one object per file, name and reason; only where there is one

N is the number of samples; they are numbered in the order of (shard, offset). The arrays are memory-mapped:
however many ranks and workers a machine has, it holds one copy of them, in its page cache.
"""

import hashlib
import json
import math
import os
import shutil
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from partial_fc import storage
from partial_fc.data.description import AGAIN, FORMAT, OF_SAMPLES, VERSION, Shard, read_description
from partial_fc.data.remote import Cache, default_folder, local_index
from partial_fc.files import sha256_of, shortened
from partial_fc.storage import Place

SHARD_BYTES = 256 * 2**20
LEFT_OUT = "left_out.jsonl"

_DTYPES = {"shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int64}
_RESERVED = (*_DTYPES, *OF_SAMPLES, "pairs")
_BLOCK = tarfile.BLOCKSIZE  # 512: a header's length, and what a payload is padded to
_HEADER_BYTES = 10_000  # numpy's own limit of an .npy file's header
_SHOWN = 5  # damaged samples of a shard that an error names
_CHECKED_AT_ONCE = 2**16  # samples: keeps the temporaries of load_index in a core's own cache


class Sample(NamedTuple):
    """What goes into a data set."""

    image: bytes
    extension: str  # without a dot
    label: int
    name: str = ""  # where it comes from: a path, a record, as its user would look for it


@dataclass(frozen=True, eq=False)
class Index:
    """Where every sample of a data set lies. N samples, C classes; arrays are read-only memory maps."""

    path: Path
    num_samples: int
    num_classes: int
    shards: list[Shard]
    shard: np.ndarray  # (N,) int32
    offset: np.ndarray  # (N,) int64
    size: np.ndarray  # (N,) int32
    label: np.ndarray  # (N,) int64
    extra: dict[str, np.ndarray]  # further arrays, (N, …) each
    prepared: dict[str, Any]  # how the data set was made: kind, source, image_size, what was dropped and why
    fingerprint: str  # sha256 over the checksums of the arrays and shards: the identity of the data set
    version: int = VERSION  # of its index.json
    pairs: np.ndarray | None = None  # (P, 3) int64 of a list of pairs
    # of index version 3
    crc32: np.ndarray | None = None  # (N,) uint32
    names: tuple[np.ndarray, np.ndarray] | None = None  # name and name_offset
    cache: Cache = field(default_factory=lambda: Cache(default_folder()))  # of shards that are not plain files here

    @property
    def shard_names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    @property
    def samples_per_shard(self) -> np.ndarray:
        """(number of shards,) int64."""
        return np.bincount(self.shard, minlength=len(self.shard_names))

    def shard_of(self, sample: int) -> str:
        """The name of the sample's shard: its URL, or the path of its file."""
        return str(self.source(int(self.shard[sample])))

    def source(self, shard: int) -> Place:
        """Where a shard lies."""
        found = self.shards[shard]
        return found.url or self.path / found.name

    def open_shard(self, shard: int) -> int:
        """A file descriptor of a shard as a plain tar, fetched where it is neither here nor in the cache.

        Raises OSError, and ValueError for a shard that is not what the index says.
        """
        found = self.shards[shard]
        return self.cache.open(found, self.source(shard)) if found.copied else os.open(self.source(shard), os.O_RDONLY)

    def hosts(self) -> list[str]:
        """Those that shards lie behind: protocol and host, or bucket."""
        return sorted({storage.host(shard.url) for shard in self.shards if shard.url})

    def elsewhere(self) -> str:
        """How many shards are read from copies, where they lie, and how many of these there are; empty for none."""
        copied = [shard for shard in self.shards if shard.copied]
        if not copied:
            return ""
        hosts = self.hosts()
        kinds = [f"behind {', '.join(hosts[:3])}{', …' * (len(hosts) > 3)}"] * bool(hosts)
        kinds += ["compressed"] * any(shard.compression for shard in copied)
        there = sum(map(self.cache.holds, copied))
        size = sum(shard.plain_bytes for shard in copied) / 2**30
        return (
            f"{len(copied)} of {len(self.shards)} shards are {' and '.join(kinds)}: {there} of the copies, {size:.1f} "
            f"GiB in all, are in {self.cache.folder}, which may hold {self.cache.limit() / 2**30:.1f} GiB"
        )

    def forget(self, shard: int) -> None:
        """Deletes the copy in the cache, if the shard has one there."""
        if self.shards[shard].copied:
            self.cache.drop(self.shards[shard])

    def read(self, sample: int) -> bytes:
        """The stored bytes of one sample's image. Raises as `open_shard`; the reader has a way for many samples."""
        descriptor = self.open_shard(int(self.shard[sample]))
        try:
            return os.pread(descriptor, int(self.size[sample]), int(self.offset[sample]))
        finally:
            os.close(descriptor)

    def key(self, sample: int) -> str:
        """The sample's key, from the tar header before its image; `shard@offset` where that is broken or not here."""
        shard, offset = int(self.shard[sample]), int(self.offset[sample])
        found = self.shards[shard]
        try:
            with open(self.cache.path(found) if found.copied else self.path / found.name, "rb") as file:
                file.seek(offset - _BLOCK)
                name = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape").name
        except (OSError, tarfile.HeaderError):
            return f"{found.name}@{offset}"
        folder, _, base = name.rpartition("/")
        key = base.partition(".")[0]  # WebDataset: the key ends at the first dot of the base name
        return f"{folder}/{key}" if folder else key

    def name(self, sample: int) -> str:
        """Where the sample comes from, as `prepare` noted it; empty in an index before version 3."""
        if self.names is None:
            return ""
        start, stop = (int(offset) for offset in self.names[1][sample : sample + 2])
        return self.names[0][start:stop].tobytes().decode("utf-8", "replace")

    def described(self, sample: int) -> str:
        """The sample's key and, in brackets, its source name where there is one: for messages."""
        name = self.name(sample)
        return f"{self.key(sample)} ({name})" if name else self.key(sample)

    def intact(self, sample: int, image: bytes) -> bool:
        """Whether these are the bytes that were prepared, by their CRC32; True where the index has none."""
        return self.crc32 is None or zlib.crc32(image) == self.crc32[sample]

    def classes(self) -> list[str]:
        """The names of the C classes. Raises ValueError if classes.txt is no UTF-8 or has another number of lines."""
        file = self.path / "classes.txt"
        try:
            names = file.read_bytes().decode("utf-8").split("\n")[:-1]
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8: {error.reason} at byte {error.start}: {AGAIN}") from None
        if len(names) != self.num_classes:
            raise ValueError(
                f"{self.path / 'classes.txt'} names {len(names)} classes, index.json says {self.num_classes}: {AGAIN}"
            )
        return names


def require_new(out: Path) -> None:
    """Raises FileExistsError if `out` exists. For the start of a long preparation; `write_shards` checks again."""
    if out.exists():
        raise FileExistsError(f"{out} exists: delete it, or choose another folder to write to")


def write_shards(
    out: Path,
    samples: Iterable[tuple],
    classes: list[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    prepared: dict[str, Any],
    total: int | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    pairs: np.ndarray | None = None,
    left_out: Sequence[dict[str, Any]] = (),
) -> Index:
    """Write `samples` (each a Sample, its name optional) to the new folder `out`, in this order.

    The reader shuffles within windows only: give the samples in a seeded random order. Equal input gives
    equal shards and arrays, byte for byte. The samples of a shard take at most `shard_bytes`, unless there is
    only one. `total`, the number of samples, is for the progress bar. `arrays` are further arrays of one row
    a sample; `pairs` (P, 3) makes it a list of pairs. `prepared` says what made the data set; the reader needs its
    `image_size: [H, W]`. `left_out` has name and reason of each file that was not taken. The folder appears when it
    is complete; until then it is `out` + ".partial".

    Raises FileExistsError if `out` exists, ValueError on a bad label, class name, extension or array.
    """
    out = Path(out)
    require_new(out)
    _check_class_names(classes)
    for name in arrays or {}:
        if name in _RESERVED or not name.isidentifier():
            raise ValueError(
                f"got an extra array named {name!r}, wanted an identifier other than {', '.join(_RESERVED)}"
            )

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    partial.mkdir(parents=True)
    try:
        bar = tqdm(samples, desc=f"writing {out.name}", unit=" images", total=total, mininterval=1)
        shard_names, columns, of_samples = _write_tars(partial, bar, len(classes), shard_bytes)
        num_samples = len(columns["label"])
        for name, values in (arrays or {}).items():
            if len(values) != num_samples:
                raise ValueError(f"got {len(values)} rows for array {name!r}, wanted one a sample: {num_samples}")
        columns.update(arrays or {})
        if pairs is not None:
            of_samples["pairs"] = pairs.astype(np.int64)
        shards = [
            {"name": name, "bytes": (partial / name).stat().st_size, "sha256": sha256_of(partial / name)}
            for name in shard_names
        ]
        write_index(partial, shards, columns, of_samples, classes, prepared, left_out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return load_index(out)


def write_index(
    folder: Path,
    shards: list[dict[str, Any]],
    columns: dict[str, np.ndarray],
    of_samples: dict[str, np.ndarray],
    classes: list[str],
    prepared: dict[str, Any],
    left_out: Sequence[dict[str, Any]],
) -> None:
    """Write what describes `shards` (name, bytes, sha256 each) into `folder`, index.json last.

    columns: shard, offset, size, label and further arrays; of_samples: crc32, name, name_offset, and pairs.
    """
    (folder / "index").mkdir(exist_ok=True)
    for name, values in (columns | of_samples).items():
        np.save(folder / "index" / f"{name}.npy", values, allow_pickle=False)
    write_left_out(folder, left_out)
    (folder / "classes.txt").write_bytes("".join(name + "\n" for name in classes).encode("utf-8"))
    counts = np.bincount(columns["shard"], minlength=len(shards)).tolist()
    description = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": len(columns["label"]),
        "num_classes": len(classes),
        "shards": [shard | {"samples": count} for shard, count in zip(shards, counts, strict=True)],
        "classes_sha256": sha256_of(folder / "classes.txt"),
        "arrays": {name: sha256_of(folder / "index" / f"{name}.npy") for name in columns},
        **{f"{name}_sha256": sha256_of(folder / "index" / f"{name}.npy") for name in of_samples},
        "prepared": prepared,
    }
    (folder / "index.json").write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")


def write_left_out(folder: Path, left_out: Sequence[dict[str, Any]]) -> None:
    """left_out.jsonl, where something was left out: a line each with its name and the reason."""
    if left_out:
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in left_out)
        (folder / LEFT_OUT).write_text("".join(lines), encoding="utf-8")


def load_index(path: Path | str, *, check_labels: bool = True, cache: Cache | None = None) -> Index:
    """Open the data set in the folder `path`, or at that URL, and check it against itself, without reading its shards.

    check_labels: compare the checksum of label.npy, too: 1 s for 42.5 million samples; one rank of a machine is
    enough. The other arrays are compared by `verify`; a wrong one of theirs is found by the sample's CRC32.
    cache: of shards that lie behind a URL or are compressed; None: the user's, see `default_folder`.

    Raises FileNotFoundError or ValueError naming the file, and for a label that is no class the sample's key.
    """
    where, cache = storage.place(path), cache or Cache(default_folder())
    path = local_index(where, cache) if storage.remote(where) else where
    description = read_description(path)
    shards, num_samples = description.shards, description.num_samples
    if storage.remote(where):
        shards = [s if s.url else s.model_copy(update={"url": f"{where}/{s.name}"}) for s in shards]
    for shard in shards:
        if shard.url is None:
            _check_shard_file(path / shard.name, shard.bytes)
    _check_checksum(path / "classes.txt", description.classes_sha256)  # permuted names would be other people

    arrays = {name: _open_array(path, name, num_samples) for name in description.arrays}
    for name, dtype in _DTYPES.items():
        _check_type(path, name, arrays.get(name), dtype)
    crc32 = names = pairs = None
    if description.crc32_sha256 is not None:
        crc32 = _check_type(path, "crc32", _open_array(path, "crc32", num_samples), np.uint32)
    if description.name_sha256 is not None:
        offsets = _check_type(path, "name_offset", _open_array(path, "name_offset", num_samples + 1), np.int64)
        names = (_check_type(path, "name", _open_array(path, "name"), np.uint8), offsets)
    if description.pairs_sha256 is not None:
        _check_checksum(path / "index" / "pairs.npy", description.pairs_sha256)
        pairs = _open_pairs(path, num_samples)
    checksums = [
        *([] if pairs is None else [("pairs", description.pairs_sha256)]),
        ("classes.txt", description.classes_sha256),
        *sorted(description.arrays.items()),
        *((shard.name, shard.sha256) for shard in shards),
    ]
    index = Index(
        path=path,
        num_samples=num_samples,
        num_classes=description.num_classes,
        shards=shards,
        **{name: arrays.pop(name) for name in _DTYPES},
        extra=arrays,
        pairs=pairs,
        crc32=crc32,
        names=names,
        prepared=description.prepared.model_dump(exclude_unset=True),
        fingerprint=hashlib.sha256(json.dumps(checksums).encode()).hexdigest(),
        version=description.version,
        cache=cache,
    )
    _check_samples(index, np.array([shard.plain_bytes for shard in shards], dtype=np.int64))
    got, wanted = index.samples_per_shard.tolist(), [shard.samples for shard in shards]
    if got != wanted:
        name = next(name for name, a, b in zip(index.shard_names, got, wanted, strict=True) if a != b)
        raise ValueError(f"{path}: index/shard.npy and index.json disagree on the number of samples in {name}")
    if check_labels:
        _check_checksum(path / "index" / "label.npy", description.arrays["label"])
    return index


def verify(index: Index) -> None:
    """Read every byte of the data set. Raises ValueError naming every file whose checksum is wrong.

    Of a damaged shard the error names the first samples whose bytes have changed, by their CRC32.
    """
    files = read_description(index.path).files()
    total = sum((index.path / name).stat().st_size for name in files) + sum(shard.bytes for shard in index.shards)
    damaged = []
    with tqdm(total=total, desc=f"verifying {index.path.name}", unit="B", unit_scale=True, mininterval=1) as bar:
        for name, wanted in files.items():
            got = sha256_of(index.path / name)
            bar.update((index.path / name).stat().st_size)
            if got != wanted:
                damaged.append(f"{index.path / name} is damaged: its sha256 is {got}, the index says {wanted}")
        for number, shard in enumerate(index.shards):
            try:
                wrong = index.cache.wrong(shard, index.source(number))
            except OSError as error:
                damaged.append(str(error))
                continue
            bar.update(shard.bytes)
            if wrong is not None:
                samples = "" if shard.copied else _changed(index, number)
                damaged.append(f"{index.source(number)} is damaged: {wrong}{samples}")
    if damaged:
        raise ValueError("\n".join([*damaged, AGAIN]))


def _changed(index: Index, shard: int) -> str:
    """Which samples of a shard are not what they were, as the end of a message."""
    first, stop = np.searchsorted(index.shard, [shard, shard + 1]).tolist()
    with (index.path / index.shard_names[shard]).open("rb") as file:
        changed = []
        for sample in range(first, stop):
            file.seek(int(index.offset[sample]))
            if not index.intact(sample, file.read(int(index.size[sample]))):
                changed.append(sample)
    if not changed:
        return ""
    named = ", ".join(index.described(sample) for sample in changed[:_SHOWN])
    return f"; {len(changed)} of its {stop - first} samples have changed: {named}{', …' * (len(changed) > _SHOWN)}"


def _write_tars(
    folder: Path, samples: Iterable[tuple], num_classes: int, shard_bytes: int
) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Write the shards; return their names, the index's columns, and CRC32 and names of the samples."""
    columns = {"shard": array("i"), "offset": array("q"), "size": array("i"), "label": array("q")}
    crc32, source_names, name_offset = array("I"), bytearray(), array("q", [0])
    names: list[str] = []
    writer: TarWriter | None = None
    with ExitStack() as shard:
        for number, sample in enumerate(samples):
            image, extension, label, name = Sample(*sample)
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
            crc32.append(zlib.crc32(image))
            source_names += name.encode("utf-8", "backslashreplace")
            name_offset.append(len(source_names))
            # Two calls, or the members would be in the order of their extensions.
            writer.write({"__key__": key, extension: image})
            writer.write({"__key__": key, "cls": cls})
    if not names:
        raise ValueError("got no samples to write, wanted at least one")
    of_samples: dict[str, np.ndarray] = {
        "crc32": np.frombuffer(crc32, np.uint32),
        "name": np.frombuffer(source_names, np.uint8),
        "name_offset": np.frombuffer(name_offset, np.int64),
    }
    return names, {name: np.frombuffer(values, dtype=_DTYPES[name]) for name, values in columns.items()}, of_samples


def _check_checksum(file: Path, wanted: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {AGAIN}")
    got = sha256_of(file)
    if got != wanted:
        raise ValueError(f"{file} is damaged: its sha256 is {got}, the index says {wanted}: {AGAIN}")


def _check_shard_file(file: Path, wanted: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {AGAIN}")
    got = file.stat().st_size
    if got != wanted:
        raise ValueError(f"{file} has {got} bytes, the index says {wanted}: {AGAIN}")


def _open_array(path: Path, name: str, rows: int | None = None) -> np.ndarray:
    """A memory map of index/<name>.npy of so many rows. Nothing is asked for before the header is checked."""
    file = path / "index" / f"{name}.npy"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {AGAIN}")
    try:
        with file.open("rb") as stream:
            major, _ = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream, max_header_size=_HEADER_BYTES)
            start = stream.tell()
            size = os.fstat(stream.fileno()).st_size
    except Exception as error:  # numpy evaluates the header as Python: its errors are of every kind
        raise ValueError(f"{file} is damaged: it is no .npy file ({type(error).__name__}): {AGAIN}") from None
    wrong = dtype.kind not in "biuf" or fortran and len(shape) > 1 or not 0 < len(shape) <= 32 or min(shape) < 0
    # numpy counts so, though nothing is in an array with a 0 in its shape
    if wrong or dtype.itemsize * math.prod(max(length, 1) for length in shape) >= 2**63:
        got = f"{dtype} {shortened(shape)}"
        raise ValueError(f"{file} is damaged: got {got}, wanted an array of numbers in C order: {AGAIN}")
    if rows is not None and shape[0] != rows:
        raise ValueError(f"{file} has {shape[0]} rows, index.json says {rows}: {AGAIN}")
    if size != start + dtype.itemsize * math.prod(shape):
        raise ValueError(
            f"{file} is damaged: it has {size} bytes, wanted {start + dtype.itemsize * math.prod(shape)} for "
            f"{dtype} {shape}: {AGAIN}"
        )
    if 0 in shape:  # which cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", start, shape)


def _check_type(path: Path, name: str, values: np.ndarray | None, dtype: type) -> np.ndarray:
    """`values`, which must be a vector of `dtype`."""
    if values is None or values.dtype != dtype or values.ndim != 1:
        got = "none" if values is None else f"{values.dtype} {values.shape}"
        raise ValueError(f"{path}: got {got} for the array {name!r}, wanted {np.dtype(dtype)} (N,): {AGAIN}")
    return values


def _open_pairs(path: Path, num_samples: int) -> np.ndarray:
    pairs = _open_array(path, "pairs")
    file = path / "index" / "pairs.npy"
    good = pairs.ndim == 2 and pairs.shape[1] == 3 and pairs.dtype == np.int64
    if not good:
        raise ValueError(f"{file} has {pairs.dtype} {pairs.shape}, wanted int64 (P, 3): {AGAIN}")
    bad = ((pairs < 0) | (pairs >= (num_samples, num_samples, 2))).any(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{file} has {pairs[row].tolist()} at row {row}, wanted two of {num_samples} samples, and 1 or 0: {AGAIN}"
        )
    return pairs


def _check_samples(index: Index, shard_bytes: np.ndarray) -> None:
    """Every label is a class, every image lies inside its shard, and the samples are in order."""

    last_shard, last_end = 0, 0
    for start in range(0, index.num_samples, _CHECKED_AT_ONCE):
        rows = slice(start, start + _CHECKED_AT_ONCE)
        shard, offset, label = index.shard[rows], index.offset[rows], index.label[rows]
        end = offset + index.size[rows]
        if shard.min() < 0 or shard.max() >= len(shard_bytes):
            sample = start + int(np.argmax((shard < 0) | (shard >= len(shard_bytes))))
            raise ValueError(
                f"{index.path}: sample {sample} is in shard number {index.shard[sample]}, "
                f"there are {len(shard_bytes)} shards: {AGAIN}"
            )
        before_shard, before_end = np.empty_like(shard), np.empty_like(end)
        before_shard[0], before_shard[1:] = last_shard, shard[:-1]
        before_end[0], before_end[1:] = last_end, end[:-1]
        unordered = (shard < before_shard) | ((shard == before_shard) & (offset < before_end))
        wrong = unordered | (end < offset) | (offset < _BLOCK) | (end > shard_bytes[shard])
        if wrong.any():
            sample = start + int(np.argmax(wrong))
            raise ValueError(
                f"{index.path}: got {index.size[sample]} bytes at {index.offset[sample]} of "
                f"{index.shard_of(sample)} for sample {sample}, which is outside that file or before "
                f"the end of sample {sample - 1}: {AGAIN}"
            )
        if label.min() < 0 or label.max() >= index.num_classes:
            sample = start + int(np.argmax((label < 0) | (label >= index.num_classes)))
            message = _bad_label(index.described(sample), int(index.label[sample]), index.num_classes)
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
