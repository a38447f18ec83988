"""A verification set from a list of pairs: InsightFace's .bin files, WebDataset shards, or a text of one's own.

The text has a pair a line, two image files and 1 for one identity or 0 for two, as `prepare.columns` reads it. An image
that is in several pairs, with the same bytes in a .bin, the same name in a text, is stored once. Samples are in the
order in which the list has them first.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from partial_fc.data.shards import Index, Sample, require_new, write_shards
from partial_fc.files import one_line
from partial_fc.prepare.bin_file import read_bin
from partial_fc.prepare.columns import read_rows
from partial_fc.prepare.images import (
    File,
    LeftOut,
    Source,
    as_utf8,
    check_options,
    examine_all,
    fetched,
    in_threads,
    kind_of,
    made_of,
    only_size,
    read_file,
    stored,
)
from partial_fc.prepare.pair_tars import read_pair_tars
from partial_fc.prepare.tar_places import base_name, shard_places
from partial_fc.storage import Place, place, remote

_SHOWN = 10  # images that an error names


def prepare_bin(
    source: Place, out: Path, *, size: tuple[int, int] | None = None, quality: int = 95, keep_damaged: bool = False
) -> Index:
    """Write the pairs of InsightFace's file `source` to the new data set `out`; size and quality as `prepare_folder`'s.

    source: a path or a URL. Raises FileNotFoundError without the file, OSError for one that cannot be fetched,
    FileExistsError if `out` exists, and ValueError for a damaged file, an image that cannot be decoded, if sizes
    differ, if there are not both kinds of pairs, or an option is out of range.
    """
    source, out = place(source), Path(out)
    if not remote(source) and not source.is_file():
        raise FileNotFoundError(f"{source} is no file; give a verification set of InsightFace's, as lfw.bin")
    require_new(out)
    with fetched(source, out) as (file, source):
        images, same = read_bin(file, source)
    return _write(out, source, _in_memory(base_name(source)), images, same, "bin", size, quality, keep_damaged)


def prepare_pair_tars(
    source: str, out: Path, *, size: tuple[int, int] | None = None, quality: int = 95, keep_damaged: bool = False
) -> Index:
    """Write the pairs of the WebDataset shards that `source` names to the new data set `out`.

    source: as `prepare_index`'s, of samples with two images, as .img1 and .img2, and 1 for one identity or 0 in .cls,
    or a folder `genuine` or `impostor` in the key. Raises as `prepare_bin` does, and ValueError for other samples.
    """
    out = Path(out)
    require_new(out)
    images, same = read_pair_tars(shard_places(source), out.with_name(out.name + ".fetched"))
    return _write(out, source, _in_memory("a pair"), images, same, "pairs", size, quality, keep_damaged)


def _in_memory(name: str) -> Source:
    return Source(lambda data: data, lambda _, data: kind_of(data), lambda _: name)


def prepare_pairs(
    source: Path,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    quality: int = 95,
    keep_damaged: bool = False,
    columns: Sequence[str] | None = None,
) -> Index:
    """Write the pairs that the text file `source` lists to the new data set `out`. Otherwise as `prepare_bin`.

    columns: what each column holds, "image" twice, "same", or another name for one that is skipped; None: in this
    order, or what the first line says.
    """
    source, out = Path(source), Path(out)
    require_new(out)
    files, same = [], []
    for number, (first, second, one) in read_rows(source, ("image", "image", "same"), columns):
        if one not in ("0", "1"):
            raise ValueError(
                f"{source}, line {number}: got {one!r} behind two images, wanted 1 for one identity or 0; columns in "
                "another order are said with --columns, as --columns same,image,image"
            )
        files += [str(source.parent / str(first)), str(source.parent / str(second))]
        same.append(one == "1")
    where = Source(read_file, lambda _, data: kind_of(data), lambda path: os.path.relpath(path, source.parent))
    return _write(out, source, where, files, same, "pairs", size, quality, keep_damaged)


def _write(
    out: Path,
    where: Place,
    source: Source,
    keys: Sequence[str | bytes],
    same: list[bool],
    kind: str,
    size: tuple[int, int] | None,
    quality: int,
    keep_damaged: bool,
) -> Index:
    """keys: of the images in `source`, two for each pair; a .bin's are the images themselves."""
    check_options(1, quality, size)
    if all(same) or not any(same):
        raise ValueError(
            f"{where} has {sum(same)} pairs of one identity and {len(same) - sum(same)} of two, wanted some of both"
        )
    sample: dict[str | bytes, int] = {}
    samples = [sample.setdefault(key, len(sample)) for key in keys]
    first = dict(zip(reversed(samples), reversed(range(len(samples))), strict=True))  # place in the list of a sample
    names = [key if isinstance(key, str) else f"image {first[i]}" for key, i in sample.items()]
    sources = [source.name(key) if isinstance(key, str) else name for key, name in zip(sample, names, strict=True)]
    left_out = LeftOut()
    files = [File(i, key) for key, i in sample.items()]
    images = examine_all(files, source, left_out, digests=False, keep_damaged=keep_damaged)
    if left_out.rows:
        there = {image.identity for image in images}
        missing = (as_utf8(name) for i, name in enumerate(names) if i not in there)
        said = [f"{name} ({row['reason']})" for name, row in zip(missing, left_out.rows, strict=True)]
        counts = ", ".join(f"{count} {why}" for why, count in left_out.counts.items())
        raise ValueError(
            f"{where}: {', '.join(said[:_SHOWN])}{', …' * (len(said) > _SHOWN)} cannot be used; in all {counts}. Mend "
            "them, or take their pairs out of the list: left out here, the result would be one over other pairs"
        )
    size = size or only_size(images)
    index = write_shards(
        out,
        in_threads(
            lambda image: Sample(*stored(image, source, size, quality), image.identity, sources[image.identity]), images
        ),
        [as_utf8(name) for name in names],
        total=len(images),
        pairs=np.column_stack([np.reshape(samples, (-1, 2)), same]),
        prepared={
            "kind": kind,
            "source": as_utf8(str(where)),
            "image_size": list(size),
            **made_of(images, size, quality, keep_damaged),
        },
    )
    of_one = f"{sum(same)} of one identity, {len(same) - sum(same)} of two"
    print(one_line(f"{out}: {len(images)} images in {len(same)} pairs, {of_one}"))
    return index
