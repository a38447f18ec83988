"""Characters as identities, fonts as photos: a real open-set data set that any machine can make.

A code point is an identity, one face (typeface) drawing it is one sample. Four data sets come out:

    OUT/train         85 % of the identities, faces seen in training
    OUT/test_seen     the other 15 %, the same faces        unseen identities
    OUT/test_unseen   the same 15 %, the held-out faces     unseen identities, unseen faces: the hard one
    OUT/distractors   identities with too few samples for either, seen faces; they enlarge a gallery

and on request OUT/validation_seen and OUT/validation_unseen, like the test sets, of identities that are in neither.

    font files ─ read_faces ─► faces, and what each claims to draw
               ─ measure ────► one pen (size and position) a face; a design that comes twice is used once
               ─ draw_many ──► glyphs: bitmap digest and PNG
               ─ select ─────► a split for each glyph, or the reason why it is dropped
               ─ write ──────► shards, in a seeded random order

Samples are grayscale, white on black. All glyphs are held in memory as PNG: 1.7 KB each at 64 pixels with what is
known about them, 0.4 GB for the small set.
"""

import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from partial_fc.data.shards import Index, Sample, load_index, write_left_out, write_shards
from partial_fc.prepare.faces import Dropped, Glyph, degraded, draw_faces, fit_faces, read_fonts
from partial_fc.prepare.fonts import FONT_SETS, fetch_fonts, font_cache
from partial_fc.prepare.images import LeftOut
from partial_fc.seeds import seed_for

SPLITS = ("train", "test_seen", "test_unseen", "distractors")
VALIDATION_SPLITS = ("validation_seen", "validation_unseen")
TEST_SHARE = 0.15  # of the identities
LARGEST = 4096  # pixels of a side, and of a blur
PLACEHOLDER = 5  # code points of one face with the same bitmap: a box that stands for "no glyph"

Ranges = tuple[tuple[int, int], ...]  # of code points, first and last


class Defaults(NamedTuple):
    min_samples: int
    ranges: Ranges
    hold_out: tuple[str, ...]
    fill: float
    """Of the canvas: the median longer side of a face's reference characters."""


# The unified ideographs; the compatibility ideographs repeat some of them under a second code point.
HAN: Ranges = ((0x4E00, 0x9FFF),)
ALL_HAN: Ranges = ((0x3400, 0x4DBF), *HAN, (0x20000, 0x2A6DF), (0x2A700, 0x2EBE0), (0x30000, 0x323AF))
# Latin, Greek, Cyrillic.
LETTERS: Ranges = ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x52F), (0x1E00, 0x1EFF))
# Brush, display and pixel faces of the named sets.
STYLIZED = ("kouzan", "aoyagi", "seto", "reggae", "stick", "yusei-magic", "smiley-sans", "dotgothic16")

DEFAULTS = {
    "small": Defaults(10, HAN, STYLIZED, 56 / 64),
    "medium": Defaults(10, HAN, STYLIZED, 56 / 64),
    "large": Defaults(2, ALL_HAN, STYLIZED, 56 / 64),
    "letters": Defaults(6, LETTERS, ("STIX",), 36 / 64),  # more would cut accents off
}
"""What `prepare_glyphs` does with a named source unless told otherwise; a folder is treated like `small`."""


def prepare_glyphs(
    source: str | Path,
    out: Path,
    *,
    min_samples: int | None = None,
    size: int = 64,
    seed: int = 0,
    ranges: Ranges | None = None,
    hold_out: Sequence[str] | None = None,
    validation: float = 0.0,
    identities: int | None = None,
    detail: int | None = None,
    blur: float = 0.0,
    workers: int | None = None,
) -> dict[str, Index]:
    """Draw the glyphs of many fonts and write the four data sets to the new folder `out`.

    `source` is a named font set (`small`, `medium`, `large`: fetched once and cached), `letters` (a small
    set from the fonts that come with matplotlib: no download, seconds) or a folder of TTF, OTF, TTC files.
    An identity takes part in training or testing if at least `min_samples` seen faces draw it, each in its
    own way. A face is held out if a folder or file name on its path, or what follows "fonts-" in it, begins
    with one of `hold_out`; case and punctuation do not count. What is None depends on the source: see
    DEFAULTS. `validation` is the share of the identities that validation_seen and validation_unseen take from
    train. `identities`: train keeps so many at most, those of fewer are among those of more; None: all.
    `detail` and `blur` make all images poorer (see faces.degraded), of the same glyphs in the same order. The result
    does not depend on `workers`.

    Returns the data sets by the name of their split; `distractors` is missing where nothing is left for it.
    Each has an array `face` (N,) int32 of indices into `prepared["faces"]`. `prepared["dropped"]` counts,
    by reason, the glyphs that a character map claims and no data set has; `out`/left_out.jsonl names them, and
    the glyph that looks the same. `prepared["mean"]` and `["std"]` are those of the pixels of train (RGB, 0 to 255).

    Raises FileExistsError if `out` exists; ValueError if the source has no fonts or leaves a data set empty.
    """
    if not 0 <= validation < 1 - TEST_SHARE:
        raise ValueError(f"got {validation} of the identities for validation, wanted 0 to below {1 - TEST_SHARE}")
    if identities is not None and identities < 1:
        raise ValueError(f"got {identities} identities for training, wanted at least 1")
    if not 1 <= size <= LARGEST or (min_samples is not None and min_samples < 1):
        raise ValueError(
            f"got images of {size} pixels a side and min_samples {min_samples}, wanted 1 to {LARGEST} pixels, and 1 or "
            "more samples"
        )
    if (detail is not None and not 1 <= detail <= size) or not 0 <= blur <= LARGEST:
        raise ValueError(f"got detail {detail} and blur {blur}, wanted 1 to {size} pixels and a blur of 0 to {LARGEST}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: delete it, or choose another folder to write to")
    defaults = DEFAULTS.get(str(source), DEFAULTS["small"])
    min_samples = defaults.min_samples if min_samples is None else min_samples
    ranges = tuple(defaults.ranges if ranges is None else ranges)
    hold_out = tuple(defaults.hold_out if hold_out is None else hold_out)
    folder, files = font_files(source)

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["partial_fc.prepare.faces"])
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        found, dropped_faces = read_fonts(pool, files, ranges)
        fitted, useless = fit_faces(pool, found, size, defaults.fill, seed)
        held = {face.path: is_held_out(face.path.relative_to(folder), hold_out) for face, _ in fitted}
        fitted.sort(key=lambda pair: (held[pair[0].path], pair[0].path, pair[0].number))
        faces = [face for face, _ in fitted]
        held_out = {number for number, face in enumerate(faces) if held[face.path]}
        if not faces:
            raise ValueError(
                f"none of the {len(files)} font files of {folder} draws enough characters of the ranges: "
                "choose other fonts or ranges"
            )
        if not held_out or len(held_out) == len(faces):
            raise ValueError(
                f"{len(held_out)} of {len(faces)} faces are held out, wanted some but not all of them: set "
                f"hold_out (got {','.join(hold_out)}) to beginnings of some of these names: "
                f"{', '.join(face.name for face in faces)}"
            )
        glyphs, dropped = draw_faces(pool, fitted, size)

    claimed = len(glyphs) + len(dropped)
    splits, unused = select(
        glyphs, held_out, min_samples=min_samples, seed=seed, validation=validation, identities=identities
    )
    wanted = (*SPLITS[:3], *(VALIDATION_SPLITS if validation else ()))
    if empty := [split for split in wanted if not splits[split]]:
        raise ValueError(
            f"no glyph is left for {', '.join(empty)}: {len(faces) - len(held_out)} seen faces and "
            f"{len(held_out)} held-out ones claim {claimed} glyphs, min_samples is {min_samples}: "
            "lower it, add fonts or widen the ranges"
        )
    if detail is not None or blur:
        for split, sharp in splits.items():
            bar = tqdm(sharp, desc=f"making {split} poorer", unit=" images", mininterval=1, delay=2)
            splits[split] = [degraded(glyph, detail, blur) for glyph in bar]
    mean, std = _mean_and_std(splits["train"], size)
    given = {"validation": validation, "identities": identities, "detail": detail, "blur": blur}
    prepared = {
        "kind": "glyphs",
        "source": str(source),
        "options": {"min_samples": min_samples, "seed": seed, "ranges": ranges, "hold_out": hold_out}
        | {name: value for name, value in given.items() if value},
        "image_size": [size, size],
        "mean": [mean] * 3,
        "std": [std] * 3,
        "faces": [face.name for face in faces],
        "held_out_faces": [faces[i].name for i in sorted(held_out)],
        "dropped_faces": dropped_faces | useless,
        "claimed": claimed,
        "dropped": dict(sorted(Counter(one.reason for one in dropped + unused).items())),
    }
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    for split in splits:
        if splits[split]:
            _write(partial / split, splits[split], prepared | {"split": split}, seed)
    left_out, names = LeftOut(), prepared["faces"]
    for one in sorted(dropped + unused, key=lambda one: (one.code_point, one.face)):
        more = {} if one.other is None else {"other": _name(one.other.code_point, one.other.face, names)}
        left_out.add(_name(one.code_point, one.face, names), one.reason, **more)
    write_left_out(partial, left_out.rows)
    partial.rename(out)
    return {split: load_index(out / split) for split in splits if splits[split]}


def font_files(source: str | Path) -> tuple[Path, list[Path]]:
    """The folder and font files of a named set (fetched if need be), or of a folder with its subfolders."""
    if str(source) == "letters":
        import matplotlib  # half a second, and only for this source

        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        # The others are symbols, and Computer Modern, whose character maps put symbols under letters.
        return folder, sorted([*folder.glob("DejaVuS*.ttf"), *folder.glob("STIXGeneral*.ttf")])
    folder = fetch_fonts(str(source), font_cache()) if str(source) in FONT_SETS else Path(source)
    if not folder.is_dir():
        raise ValueError(f"got the source {str(source)!r}, wanted {', '.join(DEFAULTS)} or a folder of font files")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc", ".otc"))
    if not files:
        raise ValueError(
            f"{folder} has no font file (TTF, OTF, TTC): choose a folder that has some, or one of {', '.join(DEFAULTS)}"
        )
    return folder, files


def is_held_out(path: Path, names: Iterable[str]) -> bool:
    """Whether a part of `path`, or what follows "fonts-" in it, begins with one of `names`."""
    parts = [_plain(part.removeprefix("fonts-")) for part in path.parts]
    return any(part.startswith(name) for name in map(_plain, names) if name for part in parts)


def place(code_point: int, seed: int) -> int:
    """An identity's place in [0, 2^63): the test takes the lowest ones, validation the next. A function of itself."""
    return seed_for("glyphs", seed, code_point)


def is_test(code_point: int, seed: int) -> bool:
    """Whether an identity is for testing: a function of nothing but itself and the seed."""
    return place(code_point, seed) < TEST_SHARE * 2**63


def is_validation(code_point: int, seed: int, share: float) -> bool:
    """Whether an identity is among the `share` for validation: a function of nothing else."""
    return not is_test(code_point, seed) and place(code_point, seed) < (TEST_SHARE + share) * 2**63


def select(
    glyphs: Iterable[Glyph],
    held_out: set[int],
    *,
    min_samples: int,
    seed: int,
    validation: float = 0.0,
    identities: int | None = None,
) -> tuple[dict[str, list[Glyph]], list[Dropped]]:
    """Sort glyphs into SPLITS, each in the order of (code point, face); and those that are dropped, with the reason.

    With a share for `validation` also into VALIDATION_SPLITS. `placeholder`: at least PLACEHOLDER code points look
    alike in that face: its box for a missing glyph. `shared_bitmap`: fewer do, which is label noise. `duplicate`:
    another face draws the identity the same way. `held_out_face`: drawn by a held-out face, of an identity that is not
    in test or validation. `spare_identity`: train has its `identities` without this one.
    """
    glyphs = sorted(glyphs, key=lambda glyph: (glyph.code_point, glyph.face in held_out, glyph.face))
    alike: dict[tuple[int, bytes], list[Glyph]] = {}
    for glyph in glyphs:
        alike.setdefault((glyph.face, glyph.digest), []).append(glyph)
    dropped: list[Dropped] = []

    def drop(glyphs: Iterable[Glyph], reason: str, other: Glyph | None = None) -> None:
        dropped.extend(Dropped(glyph.code_point, glyph.face, reason, other) for glyph in glyphs)

    drawn: dict[int, list[Glyph]] = {}
    for glyph in glyphs:
        identity = drawn.setdefault(glyph.code_point, [])
        copies = alike[glyph.face, glyph.digest]
        same = next((one for one in identity if glyph.digest == one.digest or glyph.shape == one.shape), None)
        if len(copies) > 1:
            reason = "placeholder" if len(copies) >= PLACEHOLDER else "shared_bitmap"
            drop([glyph], reason, copies[0] if glyph is not copies[0] else copies[1])
        elif same is not None:
            drop([glyph], "duplicate", same)
        else:
            identity.append(glyph)

    splits: dict[str, list[Glyph]] = {split: [] for split in (*SPLITS, *(VALIDATION_SPLITS if validation else ()))}
    training: dict[int, list[Glyph]] = {}
    for code_point, identity in drawn.items():
        seen = [glyph for glyph in identity if glyph.face not in held_out]
        unseen = [glyph for glyph in identity if glyph.face in held_out]
        enough = len(seen) >= min_samples
        if enough and is_test(code_point, seed):
            splits["test_seen"] += seen
            splits["test_unseen"] += unseen
        elif enough and is_validation(code_point, seed, validation):
            splits["validation_seen"] += seen
            splits["validation_unseen"] += unseen
        else:
            drop(unseen, "held_out_face")
            if enough:
                training[code_point] = seen
            else:
                splits["distractors"] += seen
    # the highest places: what a test or validation share takes does not move them
    kept = set(sorted(training, key=lambda code_point: place(code_point, seed), reverse=True)[:identities])
    for code_point, seen in training.items():
        if code_point in kept:
            splits["train"] += seen
        else:
            drop(seen, "spare_identity")
    return splits, dropped


def _mean_and_std(glyphs: Sequence[Glyph], size: int) -> tuple[float, float]:
    pixels = len(glyphs) * size * size
    mean = sum(glyph.ink[0] for glyph in glyphs) / pixels
    square = sum(glyph.ink[1] for glyph in glyphs) / pixels
    return round(mean, 3), round((square - mean * mean) ** 0.5, 3)


def _write(out: Path, glyphs: Sequence[Glyph], prepared: dict, seed: int) -> None:
    code_points = sorted({glyph.code_point for glyph in glyphs})
    label = {code_point: number for number, code_point in enumerate(code_points)}
    random = np.random.Generator(np.random.Philox(seed_for("glyph order", seed, prepared["split"])))
    shuffled = [glyphs[i] for i in random.permutation(len(glyphs))]
    write_shards(
        out,
        (
            Sample(glyph.png, "png", label[glyph.code_point], _name(glyph.code_point, glyph.face, prepared["faces"]))
            for glyph in shuffled
        ),
        [f"U+{code_point:04X}" for code_point in code_points],
        prepared=prepared,
        total=len(shuffled),
        arrays={"face": np.array([glyph.face for glyph in shuffled], np.int32)},
    )


def _name(code_point: int, face: int, faces: Sequence[str]) -> str:
    return f"U+{code_point:04X} in {faces[face]}"


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
