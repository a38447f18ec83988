"""A data set from a list of images: a text with a line an image, its file and its identity.

Files are relative to the list's folder. Between the two stands a tab, or a comma, or a space where no name has one;
names with a comma are quoted, as in CSV. Every image is decoded once; what is left out is counted by the reasons of
`prepare.folder`, and named in left_out.jsonl.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from partial_fc.data.shards import Index, require_new
from partial_fc.prepare.images import (
    File,
    LeftOut,
    Source,
    check_options,
    drop_repeated,
    examine_all,
    kind_of,
    read_file,
    write_images,
)

REASONS = ("unreadable", "empty", "undecodable", "damaged", "two_identities", "duplicate", "too_few_samples")


def prepare_list(
    source: Path,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    min_samples: int = 1,
    seed: int = 0,
    quality: int = 95,
    keep_damaged: bool = False,
) -> Index:
    """Write the images that the text file `source` lists to the new data set `out`, in a random order by `seed`.

    Class ids follow the sorted identities. size and quality: as for `prepare_folder`; None keeps all bytes.

    Raises FileNotFoundError without the list, FileExistsError if `out` exists, and ValueError for a line that is none,
    if no image is left, if sizes differ or an option is out of range.
    """
    source, out = Path(source), Path(out)
    require_new(out)
    check_options(min_samples, quality, size)
    left_out = LeftOut(REASONS)
    rows = read_rows(source, "image, identity")
    files = [File(identity, str(source.parent / image)) for _, (image, identity) in rows]
    where = Source(read_file, lambda _, data: kind_of(data), lambda path: os.path.relpath(path, source.parent))
    images = drop_repeated(
        examine_all(files, where, left_out, digests=True, keep_damaged=keep_damaged), where, left_out
    )
    return write_images(
        out,
        files,
        images,
        where,
        left_out,
        kind="list",
        place=source,
        wanted="image files that OpenCV reads",
        size=size,
        min_samples=min_samples,
        seed=seed,
        quality=quality,
        keep_damaged=keep_damaged,
    )


def read_rows(source: Path, wanted: str) -> Iterator[tuple[int, list[str]]]:
    """Number, from 1, and fields of every line that is not empty; as many fields as `wanted` names, between commas.

    Raises FileNotFoundError without the file, and ValueError for a line with another number of fields.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source} is no file; give a text with a line each: {wanted}")
    with source.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                line = line.strip("\n")
                if not line.strip():
                    continue
                between = next((character for character in "\t," if character in line), None)
                fields = next(csv.reader([line], delimiter=between, skipinitialspace=True)) if between else line.split()
                fields = [field.strip() for field in fields]
                if len(fields) != wanted.count(",") + 1 or not all(fields):
                    raise ValueError(
                        f"{source}, line {number}: got {line!r}, wanted {wanted}, with a tab or comma between them"
                    )
                yield number, fields
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{source} is no text in UTF-8 or CSV ({error}); wanted a line each: {wanted}") from error
