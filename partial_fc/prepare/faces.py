"""Faces (typefaces): what a font file claims to draw, how large and where, and its glyphs as small images.

A character map is no proof of a glyph, a face's own metrics are no proof of its size, and one design comes
under several names: everything here looks at pixels. The work is done in a pool of processes; an error of
FreeType's stays with the glyph it belongs to.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from partial_fc.opencv import cv2
from partial_fc.seeds import seed_for

REFERENCES = 70  # characters that a face's pen is fitted to
FEWEST_REFERENCES = 20  # a face that draws fewer different characters is not used
TRIES = 2000  # characters tried to find them: one face of Debian claims 55,502 and draws 303
SAME_DESIGN = 0.2  # see `distance`; measured: one design under two names up to 0.15, two designs from 0.28
GLYPHS_PER_TASK = 1000
FINE = 4  # references are measured on a canvas this many times larger: quarter pixels


@dataclass(frozen=True)
class Face:
    name: str
    path: Path
    number: int
    """Which font of a collection (TTC); 0 in a file with one font."""
    code_points: tuple[int, ...]
    """What its character map claims within the ranges, ascending."""


@dataclass(frozen=True)
class Pen:
    """How a face is drawn: one for all its glyphs, so that their relative sizes and positions survive."""

    size: float
    """Font size, pixels."""
    x: float
    y: float
    """Where the origin of the base line lies on the canvas, pixels from the top left."""


@dataclass(frozen=True)
class Glyph:
    code_point: int
    face: int
    digest: bytes
    """Of the bitmap: equal digests are equal bitmaps."""
    shape: bytes
    """Digest of the ink at one size for all faces: equal where two faces share a drawing but not the pen."""
    png: bytes
    ink: tuple[int, int]
    """Sum and sum of squares of the pixels (0 to 255): for the mean and deviation of a data set."""


class Dropped(NamedTuple):
    """A glyph that a character map claims and no data set has."""

    code_point: int
    face: int
    reason: str
    other: Glyph | None = None  # that looks the same


def read_fonts(
    pool: Executor, files: Sequence[Path], ranges: Sequence[tuple[int, int]]
) -> tuple[list[Face], dict[str, str]]:
    """The faces of all font files in the files' order; and the files that are no fonts: {name: why}."""
    found = _gather(pool, "reading fonts", " files", _read_or_say, [(path, ranges) for path in files])
    faces = [face for item in found if not isinstance(item, str) for face in item]
    return faces, {path.name: item for path, item in zip(files, found, strict=True) if isinstance(item, str)}


def fit_faces(
    pool: Executor, faces: Sequence[Face], size: int, fill: float, seed: int
) -> tuple[list[tuple[Face, Pen]], dict[str, str]]:
    """The faces worth drawing, each design once, with their pens; and the others: {name: why}."""
    claims = Counter(code_point for face in faces for code_point in face.code_points)
    # What most faces have comes first: pens are fitted to the same characters, and designs can be compared.
    candidates = sorted(claims, key=lambda c: (-claims[c], seed_for("glyph references", seed, c)))
    fits = _gather(pool, "measuring", " faces", measure, [(face, candidates, size, fill) for face in faces])
    kept: list[tuple[Face, Pen, dict[int, np.ndarray]]] = []
    dropped = {}
    # Of one design's faces the one with the largest coverage stays.
    for face, fit in sorted(zip(faces, fits, strict=True), key=lambda pair: -len(pair[0].code_points)):
        if fit is None:
            dropped[face.name] = "draws too few characters of the ranges"
            continue
        pen, drawn = fit
        twin = next((other.name for other, _, its in kept if distance(drawn, its) < SAME_DESIGN), None)
        if twin is not None:
            dropped[face.name] = f"the same design as {twin}"
            continue
        kept.append((face, pen, drawn))
    return [(face, pen) for face, pen, _ in kept], dict(sorted(dropped.items()))


def draw_faces(pool: Executor, faces: Sequence[tuple[Face, Pen]], size: int) -> tuple[list[Glyph], list[Dropped]]:
    """All glyphs that the faces claim: those with ink, and the others (see draw_many)."""
    tasks = [
        (face, number, pen, size, face.code_points[start : start + GLYPHS_PER_TASK])
        for number, (face, pen) in enumerate(faces)
        for start in range(0, len(face.code_points), GLYPHS_PER_TASK)
    ]
    parts = _gather(pool, "drawing", " glyphs", draw_many, tasks, [len(task[-1]) for task in tasks])
    return [glyph for glyphs, _ in parts for glyph in glyphs], [one for _, dropped in parts for one in dropped]


def read_faces(path: Path, ranges: Sequence[tuple[int, int]]) -> list[Face]:
    """The faces of one font file, and which code points of `ranges` (first and last, inclusive) they claim.

    Raises whatever fontTools raises for a file that is no font.
    """
    with path.open("rb") as file:
        head = file.read(12)
    collection = head[:4] == b"ttcf"
    count = struct.unpack(">L", head[8:])[0] if collection else 1
    faces = []
    for number in range(count):
        with TTFont(path, fontNumber=number, lazy=True) as font:
            claimed = font.getBestCmap() or {}
        inside = sorted(c for c in claimed if any(first <= c <= last for first, last in ranges))
        faces.append(Face(f"{path.stem}#{number}" if collection else path.stem, path, number, tuple(inside)))
    return faces


def measure(face: Face, candidates: Sequence[int], size: int, fill: float) -> tuple[Pen, dict[int, np.ndarray]] | None:
    """Fit the pen of `face` to the first REFERENCES of the code points `candidates` that it really draws.

    The median longer side of their ink becomes `fill` of the canvas of `size` pixels, their median center
    the canvas's. Returns the pen and the references drawn with it, {code point: (size, size) uint8}; None
    if there are fewer than FEWEST_REFERENCES.
    """
    claimed = set(face.code_points)
    try:
        font = _font(face.path, face.number, fill * size * FINE)
    except OSError:  # bitmaps of fixed sizes only
        return None
    boxes, seen = {}, set()
    for code_point in [c for c in candidates if c in claimed][:TRIES]:
        try:
            mask, (left, top) = font.getmask2(chr(code_point), mode="L", anchor="ls")
        except (OSError, ValueError):
            continue
        box = mask.getbbox()
        if box is None or bytes(mask) in seen:
            continue
        seen.add(bytes(mask))
        boxes[code_point] = (left + box[0], top + box[1], left + box[2], top + box[3])
        if len(boxes) == REFERENCES:
            break
    if len(boxes) < FEWEST_REFERENCES:
        return None

    longer = median(max(right - left, bottom - top) for left, top, right, bottom in boxes.values())
    grow = fill * size / longer
    pen = Pen(
        size=grow * fill * size * FINE,
        x=size / 2 - grow * median((left + right) / 2 for left, _, right, _ in boxes.values()),
        y=size / 2 - grow * median((top + bottom) / 2 for _, top, _, bottom in boxes.values()),
    )
    canvas = Image.new("L", (size, size))
    return pen, {code_point: draw(canvas, face, pen, code_point).copy() for code_point in boxes}


def distance(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> float:
    """How unlike two faces draw the code points they share: median of the differing ink over the mean ink.

    0 for equal bitmaps, 2 for disjoint ones, infinite where they share no code point. The least over moves
    by at most a pixel, as a pen is half a pixel off at times. Bitmaps: {code point: (size, size) uint8}.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return np.inf
    ours, theirs = (np.stack([drawn[c] for c in shared]).astype(np.int32) for drawn in (a, b))
    ink = np.maximum(1, (ours + theirs).sum((1, 2)) / 2)
    steps = (-1, 0, 1)
    moved = (np.roll(theirs, (down, right), (1, 2)) for down in steps for right in steps)
    return min(float(np.median(np.abs(ours - other).sum((1, 2)) / ink)) for other in moved)


def draw(canvas: Image.Image, face: Face, pen: Pen, code_point: int) -> np.ndarray:
    """The glyph in white (255) on black, (H, W) uint8; `canvas` is scratch. Raises FreeType's OSError."""
    canvas.paste(0, (0, 0, *canvas.size))
    font = _font(face.path, face.number, pen.size)
    ImageDraw.Draw(canvas).text((pen.x, pen.y), chr(code_point), fill=255, font=font, anchor="ls")
    return np.asarray(canvas)


def draw_many(
    face: Face, face_id: int, pen: Pen, size: int, code_points: Sequence[int]
) -> tuple[list[Glyph], list[Dropped]]:
    """The glyphs with ink, and those that gave an `error` or were `blank` (mean pixel below 1 of 255)."""
    cv2.setNumThreads(1)
    canvas, large = Image.new("L", (size, size)), Image.new("L", (2 * size, 2 * size))
    same_for_all = Pen(size, size / 2, 3 * size / 2)
    glyphs, dropped = [], []
    for code_point in code_points:
        try:
            draw(large, face, same_for_all, code_point)
            bitmap = draw(canvas, face, pen, code_point)
        except (OSError, ValueError):
            dropped.append(Dropped(code_point, face_id, "error"))
            continue
        values = bitmap.astype(np.int64)
        ink = int(values.sum()), int((values * values).sum())
        if ink[0] < size * size:
            dropped.append(Dropped(code_point, face_id, "blank"))
            continue
        shape = large.crop(large.getbbox())
        digests = _digest(bitmap.tobytes()), _digest(repr(shape.size).encode() + shape.tobytes())
        glyphs.append(Glyph(code_point, face_id, *digests, _png(bitmap), ink))
    return glyphs, dropped


def degraded(glyph: Glyph, detail: int | None, blur: float) -> Glyph:
    """The glyph as a poor image shows it: reduced to `detail` pixels a side and enlarged again, then blurred.

    Reduced by area averages, enlarged bilinearly; `blur` is the deviation of a Gaussian in pixels. The digests stay
    those of the clear image.
    """
    bitmap = cv2.imdecode(np.frombuffer(glyph.png, np.uint8), cv2.IMREAD_GRAYSCALE)
    if detail is not None:
        small = cv2.resize(bitmap, (detail, detail), interpolation=cv2.INTER_AREA)
        bitmap = cv2.resize(small, bitmap.shape[::-1], interpolation=cv2.INTER_LINEAR)
    if blur:
        bitmap = cv2.GaussianBlur(bitmap, (0, 0), blur)
    values = bitmap.astype(np.int64)
    return replace(glyph, png=_png(bitmap), ink=(int(values.sum()), int((values * values).sum())))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _png(bitmap: np.ndarray) -> bytes:
    # Run lengths suit line art: 947 bytes at 64 x 64 and 15k/s, against 970 bytes and 9k/s without them.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    done, png = cv2.imencode(".png", bitmap, options)
    if not done:
        raise RuntimeError(f"OpenCV could not encode a {bitmap.shape} image as PNG")
    return png.tobytes()


@lru_cache(maxsize=4)
def _font(path: Path, number: int, size: float) -> ImageFont.FreeTypeFont:
    # The basic layout draws one code point as one glyph, whatever shaping library this machine has.
    return ImageFont.truetype(path, size, index=number, layout_engine=ImageFont.Layout.BASIC)


def _read_or_say(path: Path, ranges: Sequence[tuple[int, int]]) -> list[Face] | str:
    try:
        return read_faces(path, ranges)
    except Exception as error:  # one broken file among many; what fontTools raises has no common base
        return f"cannot be read: {error!r}"


def _gather(
    pool: Executor,
    description: str,
    unit: str,
    function: Callable,
    tasks: Sequence[tuple],
    weights: Sequence[int] | None = None,
) -> list:
    """[function(*task) for task in tasks], in the pool; the progress bar counts the weights, or tasks."""
    weights = weights or [1] * len(tasks)
    futures = [pool.submit(function, *task) for task in tasks]
    weight = dict(zip(futures, weights, strict=True))
    try:
        with tqdm(total=sum(weights), desc=description, unit=unit, mininterval=1) as bar:
            for future in as_completed(futures):
                future.result()
                bar.update(weight[future])
    finally:
        for future in futures:
            future.cancel()  # after an error: do not draw the rest first
    return [future.result() for future in futures]
