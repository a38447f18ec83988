"""A data set from MXNet's RecordIO, as InsightFace publishes them: train.rec, read without MXNet and without train.idx.

A record is a word 0xCED7230A, a word with the length in its lower 29 bits, and so many bytes, filled up to whole words.
Bytes that hold the first word, at a multiple of 4, are cut there into parts, which the upper 3 bits number: 0 whole,
1 first, 2 further, 3 last. What MXNet packs into one is a header of 24 bytes (flag uint32, label float32, two ids
uint64), `flag` more labels in float32, whose first one counts then, and the image's bytes. InsightFace's records
without an image, which list ranges of others, are left out.

Images are taken as they were published: repeated ones stay. Every image is decoded once. What is left out
is counted, and named by the byte where its record begins in left_out.jsonl:
    not_an_image         a record without image bytes
    undecodable          OpenCV cannot decode it
    damaged              a JPEG that has lost data: some of its pixels are made up; `keep_damaged` takes it
    too_few_samples      its identity has fewer than `min_samples` of what is left
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from partial_fc.data.shards import Index, require_new
from partial_fc.prepare.images import (
    File,
    LeftOut,
    Source,
    check_options,
    examine_all,
    fetched,
    kind_of,
    write_images,
)
from partial_fc.prepare.tar_places import base_name
from partial_fc.storage import Place, join, place, remote

REASONS = ("not_an_image", "undecodable", "damaged", "too_few_samples")
MAGIC = struct.pack("<I", 0xCED7230A)
WHOLE, FIRST, FURTHER, LAST = range(4)
MOST = 1 << 24  # class numbers are float32: from here on they are not all different
AGAIN = "if it was cut short or damaged, copy it again"
_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")


def prepare_recordio(
    source: Place,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    min_samples: int = 1,
    seed: int = 0,
    quality: int = 95,
    keep_damaged: bool = False,
) -> Index:
    """Write the images of a RecordIO file to the new data set `out`, in a random order drawn from `seed`.

    source: the .rec file, or a folder with a train.rec; a path or a URL, of which a copy lies beside `out` meanwhile.
    Class ids follow the labels, which name the classes: equal to them where images of 0 to C - 1 are left. size and
    quality: as for `prepare_folder`; None keeps all bytes.

    Raises FileNotFoundError without a file, FileExistsError if `out` exists, and ValueError for a damaged file, labels
    that are no class numbers, if no image is left, if sizes differ or an option is out of range.
    """
    source, out = place(source), Path(out)
    if not source.endswith(".rec") if remote(source) else source.is_dir():
        source = join(source, "train.rec")
    if not remote(source) and not source.is_file():
        raise FileNotFoundError(f"{source} is no file; give the .rec file, or a folder with a train.rec")
    require_new(out)
    check_options(min_samples, quality, size)
    left_out = LeftOut(REASONS)
    with fetched(source, out) as (local, source), RecordFile(local, source) as file:
        name = base_name(source)
        where = Source(file.image, lambda _, data: kind_of(data), lambda offset: f"{name}@{offset}")
        files = list(_images(file, where, left_out))
        return write_images(
            out,
            files,
            examine_all(files, where, left_out, digests=False, keep_damaged=keep_damaged),
            where,
            left_out,
            kind="recordio",
            place=source,
            wanted="records with images that OpenCV reads",
            size=size,
            min_samples=min_samples,
            seed=seed,
            quality=quality,
            keep_damaged=keep_damaged,
        )


def _images(file: "RecordFile", where: Source, left_out: LeftOut) -> Iterator[File]:
    with tqdm(desc="listing", total=file.end, unit="B", unit_scale=True, mininterval=1) as bar:
        for offset, label, has_image in file.records():
            bar.update(offset - bar.n)  # what is before it
            if not has_image:
                left_out.add(where.name(offset), "not_an_image")
                continue
            if not (0 <= label < MOST and label == int(label)):
                raise ValueError(
                    f"{file.path}: the record at byte {offset} has label {label}; wanted the number of its class, "
                    f"below {MOST}: numbers that float32 tells apart; number the classes anew"
                )
            yield File(int(label), offset)
        bar.update(file.end - bar.n)


class RecordFile:
    """An open .rec file, which errors call `called`. Threads may share it."""

    def __init__(self, file: Path, called: Place | None = None):
        self.path = called or file
        self.file = file.open("rb")
        self.end = os.fstat(self.file.fileno()).st_size

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def records(self) -> Iterator[tuple[int, float, bool]]:
        """Of each record where it begins, its label, and whether an image comes with it; no image is read.

        Raises ValueError where the file is damaged.
        """
        offset, last = 0, WHOLE
        while offset < self.end:
            part, length = self._part(offset)
            self._check_order(last, part, offset)
            last = part
            if part in (WHOLE, FIRST):
                # the header, and of several labels the first
                data = os.pread(self.file.fileno(), min(length, _HEADER.size + 4), offset + _WORDS.size)
                flag, label, image = self._unpack(data, offset)
                if part == WHOLE and length < image:
                    raise ValueError(
                        f"{self.path}: the record at byte {offset} has {length} bytes, too few for {flag} labels; "
                        f"{AGAIN}"
                    )
                if flag and len(data) == _HEADER.size + 4:
                    (label,) = struct.unpack_from("<f", data, _HEADER.size)
                yield offset, label, part == FIRST or length > image
            offset += _WORDS.size + _padded(length)
        self._check_order(last, WHOLE, offset)

    def image(self, offset: int) -> bytes:
        """The image of the record that begins at `offset`. Raises ValueError where the file is damaged."""
        parts, at, last = [], offset, WHOLE
        while not parts or last in (FIRST, FURTHER):
            part, length = self._part(at)
            self._check_order(last, part, at)
            parts.append(os.pread(self.file.fileno(), length, at + _WORDS.size))
            at, last = at + _WORDS.size + _padded(length), part
        data = MAGIC.join(parts)
        return data[self._unpack(data, offset)[2] :]

    def _check_order(self, last: int, part: int, offset: int) -> None:
        if (last in (FIRST, FURTHER)) == (part in (WHOLE, FIRST)):
            raise ValueError(f"{self.path}: a record in parts breaks off at byte {offset}; {AGAIN}")

    def _part(self, offset: int) -> tuple[int, int]:
        """Which part of a record it is, and its length in bytes."""
        words = os.pread(self.file.fileno(), _WORDS.size, offset)
        word = _WORDS.unpack(words.ljust(_WORDS.size, b"\0"))[1]
        part, length = word >> 29, word & (1 << 29) - 1
        if not words.startswith(MAGIC[: len(words)]) or part > LAST:
            raise ValueError(f"{self.path}: no record begins at byte {offset}; wanted a .rec file of MXNet, {AGAIN}")
        if len(words) < _WORDS.size or offset + _WORDS.size + _padded(length) > self.end:
            raise ValueError(f"{self.path} ends at byte {self.end}, in the record at byte {offset}; {AGAIN}")
        return part, length

    def _unpack(self, data: bytes, offset: int) -> tuple[int, float, int]:
        """Flag and label of the header, and where the image begins."""
        if len(data) < _HEADER.size:
            raise ValueError(f"{self.path}: the record at byte {offset} has no header of {_HEADER.size} bytes; {AGAIN}")
        flag, label, *_ = _HEADER.unpack_from(data)
        return flag, label, _HEADER.size + 4 * flag


def _padded(length: int) -> int:
    return -(-length // 4) * 4
