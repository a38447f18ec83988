"""From images somewhere to shards: what of them can be used, at one size, in a seeded random order."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from partial_fc import storage
from partial_fc.data.pixels import damaged, decode, decode_pixels
from partial_fc.data.shards import LEFT_OUT, Index, Sample, write_shards
from partial_fc.documents import MIB
from partial_fc.files import one_line, printable
from partial_fc.opencv import MAX_PIXELS, cv2
from partial_fc.seeds import seed_for
from partial_fc.storage import Place

_STARTS = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"BM": "bmp", b"RIFF": "webp", b"GIF8": "gif", b"II*\0": "tif"}
_STARTS |= {b"MM\0*": "tif", b"\0\0\0\x0cjP": "jp2"}
MOST_IMAGE_BYTES = 256 * MIB
_AT_ONCE = 1024  # images that the threads have in hand: bounds what is in memory

T = TypeVar("T")
R = TypeVar("R")


class File(NamedTuple):
    identity: str | int
    key: str | int  # what finds its bytes: a path, an offset


class Image(NamedTuple):
    identity: str | int
    key: str | int
    size: tuple[int, int]  # (H, W)
    digest: bytes | None  # of its bytes, where it is wanted
    transparent: bool  # in part: stored on white
    by_opencv: bool  # a reader that knows OpenCV only sees the same: its bytes can be stored


class Source(NamedTuple):
    """Where images are: `read` gives the bytes of a key, or the reason to drop it; `extension` its kind of file; `name`
    what its user would look for."""

    read: Callable[[str | int], bytes | str]
    extension: Callable[[str | int, bytes], str]
    name: Callable[[str | int], str]


class LeftOut:
    """What is not taken, and why: counted, and named in the data set's left_out.jsonl."""

    def __init__(self, reasons: Iterable[str] = ()):
        self.counts = Counter(dict.fromkeys(reasons, 0))
        self.rows: list[dict[str, str]] = []

    def add(self, name: str, reason: str, **more: str) -> None:
        """more: `other`, the file that has the same bytes."""
        self.counts[reason] += 1
        self.rows.append({"name": as_utf8(name), "reason": reason} | {key: as_utf8(v) for key, v in more.items()})

    def said(self) -> str:
        """The counts, and the first name of each reason."""
        first = {row["reason"]: row["name"] for row in reversed(self.rows)}
        return ", ".join(
            f"{n} {reason} ({one_line(first[reason])}{', …' * (n > 1)})" for reason, n in self.counts.items() if n
        )


def check_options(min_samples: int, quality: int, size: tuple[int, int] | None) -> None:
    if min_samples < 1:
        raise ValueError(f"got min_samples={min_samples}, wanted 1 or more")
    if not 1 <= quality <= 100:
        raise ValueError(f"got quality={quality}, wanted 1 to 100")
    if size is not None and min(size) < 1:
        raise ValueError(f"got the size {size[0]} x {size[1]}, wanted height and width of 1 or more")
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"got the size {size[0]} x {size[1]}, wanted at most {MAX_PIXELS:,} pixels")


def examine_all(
    files: list[File], source: Source, left_out: LeftOut, *, digests: bool, keep_damaged: bool
) -> list[Image]:
    """Those that can be decoded, and are not damaged. digests: of their bytes, too."""

    def examine(file: File) -> Image | str:
        data = source.read(file.key)
        if isinstance(data, str):
            return data
        pixels = decode_pixels(data)
        if pixels is None:
            return "undecodable"
        if not keep_damaged and damaged(data):
            return "damaged"
        digest = hashlib.blake2b(data, digest_size=16).digest() if digests else None
        return Image(*file, pixels.rgb.shape[:2], digest, pixels.transparent, pixels.by_opencv)

    images = []
    results = tqdm(in_threads(examine, files), desc="decoding", unit=" images", total=len(files), mininterval=1)
    for file, result in zip(files, results, strict=True):
        if isinstance(result, str):
            left_out.add(source.name(file.key), result)
        else:
            images.append(result)
    return images


def drop_repeated(images: list[Image], source: Source, left_out: LeftOut) -> list[Image]:
    """Without the images that several identities have, and with one of those that an identity has several times."""
    first: dict[bytes, Image] = {}
    of_another: dict[bytes, Image] = {}  # the first of the same bytes under another identity
    for image in images:
        if first.setdefault(image.digest, image).identity != image.identity:
            of_another.setdefault(image.digest, image)
    kept = []
    for image in images:
        same, other = first[image.digest], of_another.get(image.digest)
        if other is not None:
            other = same if same.identity != image.identity else other
            left_out.add(source.name(image.key), "two_identities", other=source.name(other.key))
        elif same is not image:
            left_out.add(source.name(image.key), "duplicate", other=source.name(same.key))
        else:
            kept.append(image)
    return kept


def write_images(
    out: Path,
    files: list[File],
    images: list[Image],
    source: Source,
    left_out: LeftOut,
    *,
    kind: str,
    place: Place,
    wanted: str,
    size: tuple[int, int] | None,
    min_samples: int,
    seed: int,
    quality: int,
    keep_damaged: bool,
) -> Index:
    """Writes `images`, which are what is left of `files`, to the data set `out`, and says what was dropped.

    Class ids follow the sorted identities that have min_samples images, samples come in a random order by `seed`. size:
    as in `prepare_folder`. Raises ValueError, with what was `wanted` of `place`, if no image is left, and if images are
    of several sizes where `size` is None.
    """
    count = Counter(image.identity for image in images)
    enough = [image for image in images if count[image.identity] >= min_samples]
    for image in images:
        if count[image.identity] < min_samples:
            left_out.add(source.name(image.key), "too_few_samples")
    if not enough:
        raise ValueError(
            f"{place} has no image to use; left out: {left_out.said() or 'nothing'}. Wanted {wanted}, and at least "
            f"{min_samples} of an identity"
        )
    size = size or only_size(enough)
    identities = sorted({image.identity for image in enough})
    label_of = {identity: label for label, identity in enumerate(identities)}
    order = np.random.Generator(np.random.Philox(seed_for("prepare", seed))).permutation(len(enough))

    def sample(i: int) -> Sample:
        image = enough[i]
        return Sample(*stored(image, source, size, quality), label_of[image.identity], source.name(image.key))

    index = write_shards(
        out,
        in_threads(sample, order.tolist()),
        [as_utf8(str(identity)) for identity in identities],
        total=len(enough),
        prepared={
            "kind": kind,
            "source": as_utf8(str(place)),
            "image_size": list(size),
            "min_samples": min_samples,
            "seed": seed,
            **made_of(enough, size, quality, keep_damaged),
            "dropped": dict(left_out.counts),
            "dropped_identities": len({file.identity for file in files}) - len(identities),
        },
        left_out=left_out.rows,
    )
    see = f"; all are named in {out / LEFT_OUT}" if left_out.rows else ""
    transparent = index.prepared["transparent"]
    on_white = f"; {transparent} are transparent and stored on white" if transparent else ""
    said = f"{len(enough)} images of {len(identities)} identities{on_white}; left out: {left_out.said() or 'nothing'}"
    print(printable(f"{out}: {said}{see}"))
    if len(identities) == 1:
        print(printable(f"warning: {out} has one identity, {index.classes()[0]}; training wants two or more"))
    return index


@contextmanager
def fetched(source: Place, out: Path) -> Iterator[tuple[Path, Place]]:
    """The file `source`, for a URL fetched beside `out` meanwhile, and its place: of the Hugging Face hub's its commit.

    Raises FileNotFoundError without the file, and OSError for one that cannot be fetched.
    """
    if storage.remote(source):
        source = storage.pinned(source)
    with storage.local_copy(source, out.with_name(out.name + ".fetched"), bar=True) as file:
        yield file, source


def read_file(path: str | os.PathLike) -> bytes | str:
    """A file's bytes, or the reason why it has none: unreadable, empty, too_large."""
    if not os.path.isfile(path):  # a pipe would block
        return "unreadable"
    try:
        return "too_large" if os.path.getsize(path) > MOST_IMAGE_BYTES else Path(path).read_bytes() or "empty"
    except OSError:
        return "unreadable"


def read_image(path: str | os.PathLike, *, keep_damaged: bool = False) -> tuple[bytes, np.ndarray] | str:
    """A file's bytes and pixels (h, w, 3) uint8 RGB, or why there are none: unreadable, empty, undecodable, damaged."""
    data = read_file(path)
    if isinstance(data, str):
        return data
    image = decode(data)
    if image is None:
        return "undecodable"
    return "damaged" if not keep_damaged and damaged(data) else (data, image)


def made_of(images: list[Image], size: tuple[int, int], quality: int, keep_damaged: bool) -> dict[str, int | bool]:
    """How images of (H, W) `size` were made of these, for the index."""
    return {
        "encoded_anew": sum(image.size != size or not image.by_opencv for image in images),
        "transparent": sum(image.transparent for image in images),
        "quality": quality,
        "keep_damaged": keep_damaged,
    }


def only_size(images: list[Image]) -> tuple[int, int]:
    sizes = Counter(image.size for image in images).most_common()
    if len(sizes) > 1:
        examples = ", ".join(f"{height} x {width}: {count}" for (height, width), count in sizes[:3])
        raise ValueError(
            f"got images of {len(sizes)} sizes (height x width: how many; {examples}{', …' * (len(sizes) > 3)}), "
            "wanted one: give the size that all are to have, for example --size 112"
        )
    return sizes[0][0]


def stored(image: Image, source: Source, size: tuple[int, int], quality: int) -> tuple[bytes, str]:
    """The bytes and the extension that go into the shard."""
    data = source.read(image.key)
    same = image.size == size and image.by_opencv
    pixels = None if same or isinstance(data, str) else decode(data)
    if isinstance(data, str) or not same and pixels is None:
        raise OSError(
            f"{image.key} is not what it was when it was read before: prepare from files that stay as they are"
        )
    extension = source.extension(image.key, data)
    if same:
        return data, extension
    pixels = cv2.cvtColor(fit(pixels, size), cv2.COLOR_RGB2BGR)
    extension = "jpg" if extension == "jpg" and image.by_opencv else "png"  # a PNG may be called .jpg
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


def kind_of(data: bytes) -> str:
    """The extension for an image's bytes."""
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((extension for start, extension in _STARTS.items() if data.startswith(start)), "img")


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function of every item, in order. OpenCV and file reads leave the interpreter to other threads."""
    remaining = iter(items)
    with ThreadPoolExecutor() as pool:
        while some := list(islice(remaining, _AT_ONCE)):
            yield from pool.map(function, some)


def as_utf8(name: str) -> str:
    """A file name as one line of UTF-8: other bytes are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace("\n", "\\n")
