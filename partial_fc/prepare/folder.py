"""A data set from a folder of images, one folder an identity: SOURCE/<identity>/…/<image>.

Identities are the folders right under SOURCE; class ids follow their sorted names. Every image in such a folder, at
any depth, is a sample. Links are followed to identities and to images, but not to folders deeper down, which may go
in circles. Hidden files and folders are left alone.

Every image is decoded once. What is left out is counted by its reason, and named in left_out.jsonl:
    outside_identity     lies in SOURCE itself
    no_image             an identity's folder without a file that is named like an image
    not_an_image         its name does not end like an image's
    unreadable           cannot be opened: no permission, a link to nothing, no regular file
    empty                has no bytes
    undecodable          OpenCV cannot decode it
    damaged              a JPEG that has lost data: some of its pixels are made up; `keep_damaged` takes it
    two_identities       the same bytes are in another identity's folder as well: label noise, all copies go
    duplicate            the same bytes are in this identity's folder already
    too_few_samples      its identity has fewer than `min_samples` of what is left
"""

import os
from pathlib import Path

from tqdm import tqdm

from partial_fc.data.shards import Index, require_new
from partial_fc.files import one_line
from partial_fc.prepare.images import (
    File,
    LeftOut,
    Source,
    as_utf8,
    check_options,
    drop_repeated,
    examine_all,
    read_file,
    write_images,
)

REASONS = (
    "outside_identity",
    "no_image",
    "not_an_image",
    "unreadable",
    "empty",
    "undecodable",
    "damaged",
    "two_identities",
    "duplicate",
    "too_few_samples",
)

DEEPEST = 100  # levels of folders below an identity's
_SHOWN = 5  # folders that a message names
_JPEG = {"jpg", "jpeg", "jpe", "jfif"}
_EXTENSIONS = _JPEG | {"avif", "bmp", "dib", "gif", "jp2", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"}


def prepare_folder(
    source: Path,
    out: Path,
    *,
    size: tuple[int, int] | None,
    min_samples: int = 1,
    seed: int = 0,
    quality: int = 95,
    keep_damaged: bool = False,
) -> Index:
    """Write the images of the folder `source` to the new data set `out`, in a random order drawn from `seed`.

    size: (H, W) for all images. An image of this size keeps its bytes. Any other is cut to the shape of `size` around
    its middle, resized and encoded anew: a JPEG as JPEG of `quality` (1 to 100), anything else as PNG, which loses
    nothing. None keeps all bytes; images of several sizes are an error then.
    What was left out and why is counted in the result's `prepared["dropped"]` and printed; left_out.jsonl names it.

    Raises NotADirectoryError if `source` is no folder, FileExistsError if `out` exists, and ValueError if no image
    is left, if the identities seem to be further down, if sizes differ or an option is out of range.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise NotADirectoryError(f"{source} is no folder, wanted one that holds a folder of images per identity")
    require_new(out)
    check_options(min_samples, quality, size)
    left_out = LeftOut(REASONS)
    where = Source(read_file, lambda path, data: _kind(path), lambda path: os.path.relpath(path, source))
    files = _list(source, where, left_out)
    _check_level(source, files)
    images = drop_repeated(
        examine_all(files, where, left_out, digests=True, keep_damaged=keep_damaged), where, left_out
    )
    return write_images(
        out,
        files,
        images,
        where,
        left_out,
        kind="folder",
        place=source,
        wanted=f"{source.name}/<identity>/<image> files that end in {', '.join(sorted(_EXTENSIONS))}",
        size=size,
        min_samples=min_samples,
        seed=seed,
        quality=quality,
        keep_damaged=keep_damaged,
    )


def _list(source: Path, where: Source, left_out: LeftOut) -> list[File]:
    """The files in the folders of `source` that look like images, sorted by identity and path."""
    files = []
    for entry in tqdm(sorted(os.scandir(source), key=lambda entry: entry.name), desc="listing", mininterval=1):
        if entry.name.startswith("."):
            continue
        if not os.path.isdir(entry.path):  # of a link that leads in a circle entry.is_dir() raises
            left_out.add(where.name(entry.path), "outside_identity")
            continue
        paths, others = images_below(entry.path)
        if not paths:
            left_out.add(where.name(entry.path), "no_image")
        files += [File(entry.name, path) for path in paths]
        for path in others:
            left_out.add(where.name(path), "not_an_image")
    return files


def _check_level(source: Path, files: list[File]) -> None:
    """Raises ValueError if all images are in folders below the only identity; warns if none is right in an identity's.

    A data set one level too high trains all too well: of one class the loss is 0.
    """
    inside: dict[str, set[str]] = {}  # folders in those of the identities
    for file in files:
        folder, *rest = os.path.relpath(file.key, os.path.join(source, file.identity)).split(os.sep)
        if not rest:
            return
        inside.setdefault(file.identity, set()).add(folder)
    if len(inside) == 1:
        folders = {os.path.dirname(file.key) for file in files}
        top = os.path.commonpath(folders)
        if top not in folders:
            names = _some({os.path.relpath(folder, top).split(os.sep)[0] for folder in folders})
            raise ValueError(
                f"{as_utf8(str(source))} has one identity: {as_utf8(top)} has no image itself, but the folders "
                f"{names}. Identities are the folders right under the source: give {as_utf8(top)}; or, if these "
                "images are of one identity, move them into its folder"
            )
    several = next((identity for identity, folders in inside.items() if len(folders) > 1), None)
    if several is not None:
        warning = (
            f"warning: no image is right in an identity's folder: {as_utf8(several)} has the folders "
            f"{_some(inside[several])}; if these are the identities, prepare {as_utf8(str(source / several))}"
        )
        print(one_line(warning))


def _some(names: set[str]) -> str:
    return ", ".join(map(as_utf8, sorted(names)[:_SHOWN])) + ", …" * (len(names) > _SHOWN)


def images_below(top: str) -> tuple[list[str], list[str]]:
    """Paths of the files at any depth of `top`, sorted: those that are named like images, and the others.

    Hidden files and folders are left alone. Raises OSError for a folder that may not be read, ValueError for folders
    more than DEEPEST levels down.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out a folder that it may not read

    paths: list[str] = []
    others: list[str] = []
    for folder, folders, names in os.walk(top, onerror=fail):
        if folder.count(os.sep) - top.count(os.sep) > DEEPEST:  # os.walk calls itself, and paths have a limit, too
            raise ValueError(
                f"{as_utf8(top)} has folders more than {DEEPEST} levels deep: is it the right one? Move the images up"
            )
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            (paths if _extension(name) in _EXTENSIONS else others).append(os.path.join(folder, name))
    return paths, others


def _kind(path: str) -> str:
    return "jpg" if _extension(path) in _JPEG else _extension(path)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()
