"""A data set from a list of images: a text with a line an image, its file and its identity.

Files are relative to the list's folder. Between the two stands a tab, or a comma, or a space where no name has one;
names with a comma are quoted, as in CSV. A first line that names the columns is recognized, and so are the lists of
MXNet's im2rec (index, label, file between tabs), whose labels are the numbers of the classes. Every image is decoded
once; what is left out is counted by the reasons of `prepare.folder`, and named in left_out.jsonl.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from partial_fc.data.shards import Index, require_new
from partial_fc.files import one_line
from partial_fc.prepare.columns import read_rows
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

_SHOWN = 3  # identities that a warning names
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
    columns: Sequence[str] | None = None,
) -> Index:
    """Write the images that the text file `source` lists to the new data set `out`, in a random order by `seed`.

    columns: what each column holds, "image", "identity", or another name for one that is skipped; None: these two, or
    what the first line says. Class ids follow the sorted identities. Other options: as for `prepare_folder`; a size of
    None keeps all bytes.

    Raises FileNotFoundError without the list, FileExistsError if `out` exists, and ValueError for a line that is none,
    if the identities are files, if no image is left, if sizes differ or an option is out of range.
    """
    source, out = Path(source), Path(out)
    require_new(out)
    check_options(min_samples, quality, size)
    left_out = LeftOut(REASONS)
    rows = list(read_rows(source, ("image", "identity"), columns))
    _check_columns(source, rows, columns)
    _warn_of_roots(source, rows)
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


def _check_columns(source: Path, rows: Iterable[tuple[int, list[str | int]]], columns: Sequence[str] | None) -> None:
    """Raises ValueError where files stand in place of identities: swapped, all would be unreadable."""
    for number, (image, identity) in rows:
        if (source.parent / str(image)).is_file():
            return
        if (source.parent / str(identity)).is_file():
            place = "the second column holds" if columns is None else "the column of identities holds"
            raise ValueError(
                f"{source}, line {number}: got the image {image!r}, which is no file, and the identity {identity!r}, "
                f"which is one: {place} the files; swap image and identity with --columns identity,image"
            )


def _warn_of_roots(source: Path, rows: Iterable[tuple[int, list[str | int]]]) -> None:
    """An identity whose folder is in several places, A/0001 and B/0001, may be several people."""
    roots: dict[str, dict[str, None]] = {}
    for _, (image, identity) in rows:
        parts = str(image).split("/")[:-1]
        if identity in parts:
            roots.setdefault(str(identity), {})["/".join(parts[: parts.index(str(identity))])] = None
    several = {identity: list(places) for identity, places in roots.items() if len(places) > 1}
    if several:
        named = "; ".join(
            f"{identity} under {' and '.join(place or '.' for place in places[:2])}"
            for identity, places in list(several.items())[:_SHOWN]
        )
        warning = (
            f"warning: {source}: {len(several)} identities have folders of their name in several places: {named}"
            f"{'; …' * (len(several) > _SHOWN)}. If these are not the same, give them names of their own, as A/0001"
        )
        print(one_line(warning))
