"""A data set from a folder of images, one folder an identity: SOURCE/<identity>/…/<image>.

Identities are the folders right under SOURCE; class ids follow their sorted names. Every image in such a folder, at
any depth, is a sample. Links are followed to identities and to images, but not to folders deeper down, which may go
in circles. Hidden files and folders are left alone.

Every image is decoded once. What is dropped is counted by its reason:
    outside_identity     lies in SOURCE itself
    not_an_image         its name does not end like an image's
    unreadable           cannot be opened: no permission, a link to nothing, no regular file
    empty                has no bytes
    undecodable          OpenCV cannot decode it
    two_identities       the same bytes are in another identity's folder as well: label noise, all copies go
    duplicate            the same bytes are in this identity's folder already
    too_few_samples      its identity has fewer than `min_samples` of what is left
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from partial_fc.data.reader import decode
from partial_fc.data.shards import Index, require_new, write_shards
from partial_fc.seeds import seed_for

REASONS = (
    "outside_identity",
    "not_an_image",
    "unreadable",
    "empty",
    "undecodable",
    "two_identities",
    "duplicate",
    "too_few_samples",
)

_JPEG = {"jpg", "jpeg", "jpe"}
_EXTENSIONS = _JPEG | {"png", "webp", "bmp", "tif", "tiff", "ppm", "pgm"}
_AT_ONCE = 1024  # files that the threads have in hand: bounds what is in memory


T = TypeVar("T")
R = TypeVar("R")


class _File(NamedTuple):
    identity: str
    path: str


class _Image(NamedTuple):
    identity: str
    path: str
    digest: bytes  # of its bytes
    size: tuple[int, int]  # (H, W)


def prepare_folder(
    source: Path,
    out: Path,
    *,
    size: tuple[int, int] | None,
    min_samples: int = 1,
    seed: int = 0,
    quality: int = 95,
) -> Index:
    """Write the images of the folder `source` to the new data set `out`, in a random order drawn from `seed`.

    size: (H, W) for all images. An image of this size keeps its bytes. Any other is cut to the shape of `size` around
    its middle, resized and encoded anew: a JPEG as JPEG of `quality` (1 to 100), anything else as PNG, which loses
    nothing. None keeps all bytes; images of several sizes are an error then.
    What was dropped and why is counted in the result's `prepared["dropped"]` and printed.

    Raises NotADirectoryError if `source` is no folder, FileExistsError if `out` exists, and ValueError if no image
    is left, if sizes differ or an option is out of range.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise NotADirectoryError(f"{source} is no folder, wanted one that holds a folder of images per identity")
    require_new(out)
    if min_samples < 1 or not 1 <= quality <= 100 or (size is not None and min(size) < 1):
        raise ValueError(
            f"got min_samples={min_samples}, quality={quality}, size={size}: wanted at least 1, 1 to 100, and "
            "positive (height, width) or None"
        )

    dropped = Counter(dict.fromkeys(REASONS, 0))
    files = _list(source, dropped)
    images = _examine_all(files, dropped)
    images = _drop_repeated(images, dropped)
    images = _drop_small_identities(images, min_samples, dropped)
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "nothing"
    if not images:
        raise ValueError(
            f"{source} has no image to use; dropped: {counts}. Wanted {source.name}/<identity>/<image> files that "
            f"end in {', '.join(sorted(_EXTENSIONS))}, and at least {min_samples} of an identity"
        )
    size = size or _only_size(images)

    identities = sorted({image.identity for image in images})
    label_of = {identity: label for label, identity in enumerate(identities)}
    order = np.random.Generator(np.random.Philox(seed_for("prepare", seed))).permutation(len(images))

    def sample(i: int) -> tuple[bytes, str, int]:
        return (*_stored(images[i], size, quality), label_of[images[i].identity])

    index = write_shards(
        out,
        in_threads(sample, order.tolist()),
        [printable(identity) for identity in identities],
        total=len(images),
        prepared={
            "kind": "folder",
            "source": printable(str(source)),
            "image_size": list(size),
            "min_samples": min_samples,
            "seed": seed,
            "encoded_anew": sum(image.size != size for image in images),
            "quality": quality,
            "dropped": dict(dropped),
            "dropped_identities": len({file.identity for file in files}) - len(identities),
        },
    )
    print(f"{out}: {len(images)} images of {len(identities)} identities; dropped: {counts}")
    return index


def _list(source: Path, dropped: Counter[str]) -> list[_File]:
    """The files in the folders of `source` that look like images, sorted by identity and path."""
    files = []
    for entry in tqdm(sorted(os.scandir(source), key=lambda entry: entry.name), desc="listing", mininterval=1):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            dropped["outside_identity"] += 1
            continue
        paths, others = images_below(entry.path)
        files += [_File(entry.name, path) for path in paths]
        dropped["not_an_image"] += others
    return files


def images_below(top: str) -> tuple[list[str], int]:
    """Paths of the files at any depth of `top` that are named like images, sorted, and how many others there are.

    Hidden files and folders are left alone. Raises OSError for a folder that may not be read.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out a folder that it may not read

    paths, others = [], 0
    for folder, folders, names in os.walk(top, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if _extension(name) in _EXTENSIONS:
                paths.append(os.path.join(folder, name))
            else:
                others += 1
    return paths, others


def _examine_all(files: list[_File], dropped: Counter[str]) -> list[_Image]:
    images = []
    for result in tqdm(in_threads(_examine, files), desc="decoding", unit=" images", total=len(files), mininterval=1):
        if isinstance(result, str):
            dropped[result] += 1
        else:
            images.append(result)
    return images


def _examine(file: _File) -> _Image | str:
    """The decoded file's facts, or the reason to drop it."""
    read = read_image(file.path)
    if isinstance(read, str):
        return read
    data, image = read
    return _Image(*file, hashlib.blake2b(data, digest_size=16).digest(), image.shape[:2])


def read_image(path: str | os.PathLike) -> tuple[bytes, np.ndarray] | str:
    """A file's bytes and pixels (h, w, 3) uint8 RGB, or the reason why it has none: unreadable, empty, undecodable."""
    if not os.path.isfile(path):  # a pipe would block
        return "unreadable"
    try:
        data = Path(path).read_bytes()
    except OSError:
        return "unreadable"
    if not data:
        return "empty"
    image = decode(data)
    return "undecodable" if image is None else (data, image)


def _drop_repeated(images: list[_Image], dropped: Counter[str]) -> list[_Image]:
    """Without the images that several identities have, and with one of those that an identity has several times."""
    owner: dict[bytes, str] = {}
    shared = {image.digest for image in images if owner.setdefault(image.digest, image.identity) != image.identity}
    kept: dict[bytes, _Image] = {}
    for image in images:
        if image.digest in shared:
            dropped["two_identities"] += 1
        elif kept.setdefault(image.digest, image) is not image:
            dropped["duplicate"] += 1
    return list(kept.values())


def _drop_small_identities(images: list[_Image], min_samples: int, dropped: Counter[str]) -> list[_Image]:
    count = Counter(image.identity for image in images)
    kept = [image for image in images if count[image.identity] >= min_samples]
    dropped["too_few_samples"] += len(images) - len(kept)
    return kept


def _only_size(images: list[_Image]) -> tuple[int, int]:
    sizes = Counter(image.size for image in images).most_common()
    if len(sizes) > 1:
        examples = ", ".join(f"{height} x {width}: {count}" for (height, width), count in sizes[:3])
        raise ValueError(
            f"got images of {len(sizes)} sizes (height x width: how many; {examples}{', …' * (len(sizes) > 3)}), "
            "wanted one: give the size that all are to have, for example --size 112"
        )
    return sizes[0][0]


def _stored(image: _Image, size: tuple[int, int], quality: int) -> tuple[bytes, str]:
    """The bytes and the extension that go into the shard."""
    data = Path(image.path).read_bytes()
    extension = "jpg" if _extension(image.path) in _JPEG else _extension(image.path)
    if image.size == size:
        return data, extension
    pixels = cv2.cvtColor(fit(decode(data), size), cv2.COLOR_RGB2BGR)
    extension = "jpg" if extension == "jpg" else "png"
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if extension == "jpg" else []
    return cv2.imencode(f".{extension}", pixels, options)[1].tobytes(), extension


def fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) → (H, W, 3): the largest middle part of the shape of `size`, resized; what has that size stays."""
    height, width = pixels.shape[:2]
    if (height, width) == tuple(size):
        return pixels
    scale = max(size[0] / height, size[1] / width)
    part_height = min(height, max(1, round(size[0] / scale)))
    part_width = min(width, max(1, round(size[1] / scale)))
    top, left = (height - part_height) // 2, (width - part_width) // 2
    part = pixels[top : top + part_height, left : left + part_width]
    # Averaging areas does not alias when an image shrinks.
    return cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function of every item, in order. OpenCV and file reads leave the interpreter to other threads."""
    remaining = iter(items)
    with ThreadPoolExecutor() as pool:
        while some := list(islice(remaining, _AT_ONCE)):
            yield from pool.map(function, some)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def printable(name: str) -> str:
    """A file name as one line of UTF-8: other bytes are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace("\n", "\\n")
