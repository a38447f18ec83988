"""Real fonts (those in matplotlib's wheel), really drawn: selection, splits, pens, errors; no network."""

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTCollection, TTFont

from partial_fc.data.shards import Index, load_index, verify
from partial_fc.prepare.faces import Glyph, Pen, draw_faces, draw_many, fit_faces, measure, read_faces
from partial_fc.prepare.glyphs import (
    HAN,
    LETTERS,
    SPLITS,
    STYLIZED,
    VALIDATION_SPLITS,
    is_held_out,
    is_test,
    is_validation,
    prepare_glyphs,
    select,
)

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
LATIN = ((0x41, 0x5A), (0x61, 0x7A))
SIZE = 32


SLOW_FIXTURES = ("letters",)  # tests that use one are slow


@pytest.fixture(scope="module")
def letters(glyphs_ci) -> dict[str, Index]:
    """Made by an earlier version, they would differ from those of the tests that prepare the same splits."""
    return {split: load_index(glyphs_ci / split) for split in SPLITS}


@pytest.fixture(scope="module")
def latin(tmp_path_factory) -> dict[str, Index]:
    """Few letters: quick to make, to compare with."""
    folder = tmp_path_factory.mktemp("glyphs") / "latin"
    return prepare_glyphs("letters", folder, size=SIZE, ranges=LATIN, min_samples=4, workers=2)


@pytest.fixture(scope="module")
def mixed_fonts(tmp_path_factory) -> Path:
    """Three designs, one of them under two names, a font of placeholders, and a file that is no font."""
    folder = tmp_path_factory.mktemp("fonts")
    for name in ("DejaVuSans", "DejaVuSerif", "LastResortHE-Regular", "STIXGeneral"):
        shutil.copy(FONTS / f"{name}.ttf", folder)
    (folder / "more").mkdir()
    shutil.copy(FONTS / "DejaVuSans.ttf", folder / "more" / "Twin.ttf")
    (folder / "more" / "broken.ttf").write_text("this is not a font")
    return folder


def images(index: Index) -> list[bytes]:
    assert len(index.shard_names) == 1
    shard = Path(index.shard_of(0)).read_bytes()
    return [shard[start : start + size] for start, size in zip(index.offset, index.size, strict=True)]


def identities(index: Index) -> dict[str, list[int]]:
    """Class name -> its sample numbers."""
    names = index.classes()
    found: dict[str, list[int]] = {name: [] for name in names}
    for sample, label in enumerate(index.label.tolist()):
        found[names[label]].append(sample)
    return found


def glyph(code_point: int, face: int, drawing: str, shape: str = "") -> Glyph:
    return Glyph(code_point, face, drawing.encode(), (shape or drawing).encode(), b"", (0, 0))


def test_some_hundreds_of_identities_come_without_a_download(letters):
    assert set(letters) == set(SPLITS)
    assert letters["train"].num_classes >= 500
    assert letters["test_seen"].num_classes >= 80
    assert letters["test_unseen"].num_classes >= 40
    for index in letters.values():
        verify(index)


def test_every_image_decodes_and_has_ink(letters):
    for index in letters.values():
        for png in images(index):
            image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
            assert image.shape == (SIZE, SIZE) and image.dtype == np.uint8
            assert image.mean() >= 1


def test_mean_and_std_are_those_of_the_training_pixels(letters):
    pixels = np.stack(
        [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) for png in images(letters["train"])]
    )
    for index in letters.values():
        assert index.prepared["mean"] == pytest.approx([pixels.mean()] * 3, abs=1e-3)
        assert index.prepared["std"] == pytest.approx([pixels.std()] * 3, abs=1e-3)


def test_identities_are_in_one_split_only(letters):
    train, seen, unseen, distractors = (set(letters[split].classes()) for split in SPLITS)
    assert unseen <= seen
    assert not train & seen and not distractors & (train | seen)
    assert all(is_test(int(name[2:], 16), seed=0) for name in seen)
    assert not any(is_test(int(name[2:], 16), seed=0) for name in train)


def test_held_out_faces_are_in_test_unseen_only(letters):
    held_out = {"STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic"}
    for split, index in letters.items():
        faces = index.prepared["faces"]
        assert set(index.prepared["held_out_faces"]) == held_out
        drawn_by = {faces[number] for number in index.extra["face"].tolist()}
        assert drawn_by == held_out if split == "test_unseen" else not drawn_by & held_out


def test_identities_have_enough_distinct_samples(letters):
    for split in ("train", "test_seen"):
        pngs, faces = images(letters[split]), letters[split].extra["face"]
        for samples in identities(letters[split]).values():
            assert len(samples) >= 6
            assert len({pngs[i] for i in samples}) == len({int(faces[i]) for i in samples}) == len(samples)
    assert max(map(len, identities(letters["distractors"]).values())) < 6


def test_letters_that_look_alike_are_no_identities(letters):
    # Latin A, Greek Alpha and Cyrillic A have one bitmap in every face: a label would be a guess.
    names = {name for split in SPLITS[:3] for name in letters[split].classes()}
    assert not names & {"U+0041", "U+0391", "U+0410"}
    assert {"U+0052", "U+03A9", "U+0416"} <= names  # R, Omega, Zhe look like nothing else


def test_every_claimed_glyph_is_accounted_for(letters):
    prepared = letters["train"].prepared
    written = sum(index.num_samples for index in letters.values())
    assert written + sum(prepared["dropped"].values()) == prepared["claimed"]
    assert prepared["dropped"]["shared_bitmap"] > 0 and prepared["dropped"]["held_out_face"] > 0
    lines = (letters["train"].path.parent / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert Counter(row["reason"] for row in rows) == prepared["dropped"]
    assert len({row["name"] for row in rows}) == len(rows)
    of_latin_a = [row["other"] for row in rows if row["name"] == "U+0041 in DejaVuSans"]
    assert of_latin_a == ["U+0391 in DejaVuSans"]  # Greek Alpha


def test_samples_are_in_a_random_order(letters):
    label = letters["train"].label
    assert np.count_nonzero(np.diff(label) >= 0) / len(label) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_result_does_not_depend_on_the_number_of_processes(latin, tmp_path):
    """One, against two."""
    alone = prepare_glyphs("letters", tmp_path / "alone", size=SIZE, ranges=LATIN, min_samples=4, workers=1)
    assert set(alone) == set(latin)
    for split in alone:
        assert alone[split].fingerprint == latin[split].fingerprint
        assert alone[split].prepared == latin[split].prepared


def test_split_of_an_identity_depends_on_nothing_else(letters, latin):
    assert not set(latin["train"].classes()) & set(letters["test_seen"].classes())
    assert not set(latin["test_seen"].classes()) & set(letters["train"].classes())


def test_test_share_and_seed():
    first, last = HAN[0]
    of_seed = [{c for c in range(first, last + 1) if is_test(c, seed)} for seed in (0, 1)]
    for chosen in of_seed:
        assert len(chosen) / (last + 1 - first) == pytest.approx(0.15, abs=0.01)
    assert len(of_seed[0] & of_seed[1]) / len(of_seed[0]) == pytest.approx(0.15, abs=0.03)


@pytest.mark.slow
def test_validation_takes_identities_from_training_alone(letters, tmp_path):
    made = prepare_glyphs("letters", tmp_path / "out", size=SIZE, validation=0.2, identities=200, workers=2)
    assert set(made) == {*SPLITS, *VALIDATION_SPLITS}
    for split in SPLITS[1:]:
        assert made[split].fingerprint == letters[split].fingerprint
    train, seen, unseen = (set(made[split].classes()) for split in ("train", *VALIDATION_SPLITS))
    assert len(train) == 200 and unseen <= seen
    assert train | seen < set(letters["train"].classes()) and not train & seen
    assert len(seen) / letters["train"].num_classes == pytest.approx(0.2 / 0.85, abs=0.06)
    assert all(is_validation(int(name[2:], 16), 0, 0.2) for name in seen)
    held_out = set(made["train"].prepared["held_out_faces"])
    for split in VALIDATION_SPLITS:
        faces = made[split].prepared["faces"]
        drawn_by = {faces[number] for number in made[split].extra["face"].tolist()}
        assert drawn_by <= held_out if split == "validation_unseen" else not drawn_by & held_out
    prepared = made["train"].prepared
    assert prepared["options"]["validation"] == 0.2 and prepared["options"]["identities"] == 200
    assert not {"validation", "identities"} & set(letters["train"].prepared["options"])
    written = sum(index.num_samples for index in made.values())
    assert written + sum(prepared["dropped"].values()) == prepared["claimed"]
    assert prepared["dropped"]["spare_identity"] > 0


def test_fewer_identities_are_among_more_and_validation_leaves_them():
    glyphs = [glyph(code_point, 0, f"{code_point}") for code_point in range(1000)]

    def training(identities, validation):
        splits, _ = select(glyphs, set(), min_samples=1, seed=0, validation=validation, identities=identities)
        assert not {one.code_point for one in splits["train"]} & {
            one.code_point for one in splits.get("validation_seen", [])
        }
        return {one.code_point for one in splits["train"]}

    assert len(training(None, 0.0)) > 800 and len(training(300, 0.0)) == 300
    assert training(100, 0.0) < training(300, 0.0) == training(300, 0.2)
    assert training(None, 0.2) < training(None, 0.0) == training(5000, 0.0)
    for options in ({"validation": 0.9}, {"validation": -0.1}, {"identities": 0}):
        with pytest.raises(ValueError, match="wanted"):
            prepare_glyphs("letters", Path("never written"), **options)


@pytest.mark.slow
def test_poorer_images_are_of_the_same_glyphs(latin, tmp_path):
    options, clear = {"size": SIZE, "ranges": LATIN, "min_samples": 4, "workers": 2}, latin
    for name, poorer in (("detail", {"detail": 8}), ("blur", {"blur": 2.0})):
        made = prepare_glyphs("letters", tmp_path / name, **options, **poorer)
        for split, index in made.items():
            assert (index.label == clear[split].label).all()
            assert (index.extra["face"] == clear[split].extra["face"]).all()
        pixels, before = (
            np.stack([cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) for png in images(one["train"])])
            for one in (made, clear)
        )
        assert made["train"].prepared["mean"] == pytest.approx([pixels.mean()] * 3, abs=1e-3)
        assert made["train"].prepared["options"][name] == poorer[name]
        edges, edges_before = (np.abs(np.diff(one.astype(int), axis=2)).mean() for one in (pixels, before))
        assert edges < 0.6 * edges_before and pixels.mean() == pytest.approx(before.mean(), rel=0.05)
    with pytest.raises(ValueError, match="got detail 33 and blur 0.0, wanted 1 to 32 pixels"):
        prepare_glyphs("letters", tmp_path / "none", **options, detail=33)


def reasons(dropped) -> Counter:
    return Counter(one.reason for one in dropped)


def test_select_drops_bitmaps_that_a_face_uses_more_than_once():
    boxes = [glyph(code_point, 0, "box") for code_point in range(5)]
    shared = [glyph(10, 0, "same"), glyph(11, 0, "same")]
    fine = [glyph(20, 0, "a"), glyph(21, 0, "b"), glyph(10, 1, "same")]
    splits, dropped = select(boxes + shared + fine, set(), min_samples=1, seed=0)
    kept = [glyph for split in splits.values() for glyph in split]
    assert Counter(kept) == Counter(fine)
    assert reasons(dropped) == Counter(placeholder=5, shared_bitmap=2)
    other = {one.code_point: one.other.code_point for one in dropped}
    assert other[0] == 1 and other[1] == 0 and other[10] == 11 and other[11] == 10


def test_select_counts_distinct_samples_of_seen_faces_only():
    train = next(c for c in range(100) if not is_test(c, 0))
    enough = [glyph(train, 0, "a"), glyph(train, 1, "b")]
    held_out = [glyph(train, 2, "c"), glyph(train, 3, "d")]
    for glyphs, split in (
        (enough + held_out, "train"),
        (enough[:1] + held_out, "distractors"),
        ([enough[0], glyph(train, 1, "a"), *held_out], "distractors"),  # the same bitmap
        ([enough[0], glyph(train, 1, "moved a", shape="a"), *held_out], "distractors"),  # the same drawing
    ):
        splits, dropped = select(glyphs, {2, 3}, min_samples=2, seed=0)
        assert [name for name in SPLITS if splits[name]] == [split]
        assert reasons(dropped)["held_out_face"] == 2 and not splits["test_unseen"]
        assert sum(map(len, splits.values())) + len(dropped) == len(glyphs)


def test_select_keeps_the_seen_one_of_two_equal_drawings():
    test = next(c for c in range(100) if is_test(c, 0))
    glyphs = [glyph(test, 0, "a"), glyph(test, 1, "a"), glyph(test, 0 + 2, "b")]
    splits, dropped = select(glyphs, {0}, min_samples=2, seed=0)
    assert [sample.face for sample in splits["test_seen"]] == [1, 2]
    assert splits["test_unseen"] == [] and reasons(dropped) == Counter(duplicate=1)
    assert dropped[0].face == 0 and dropped[0].other.face == 1


def test_pen_makes_reference_characters_fill_the_canvas_and_centers_them():
    size, fill = 64, 0.6
    for name in ("DejaVuSans", "DejaVuSerif-BoldItalic", "STIXGeneral"):
        (face,) = read_faces(FONTS / f"{name}.ttf", LATIN)
        _, drawn = measure(face, face.code_points, size, fill)
        boxes = []
        for bitmap in drawn.values():
            rows, columns = np.flatnonzero(bitmap.any(1)), np.flatnonzero(bitmap.any(0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        left, top, right, bottom = np.array(boxes).T
        assert np.median(np.maximum(right - left, bottom - top)) == pytest.approx(fill * size, abs=1.5)
        assert np.median((left + right) / 2) == pytest.approx(size / 2, abs=1)
        assert np.median((top + bottom) / 2) == pytest.approx(size / 2, abs=1)
        x, capital_x = (drawn[ord(letter)].any(1).sum() for letter in "xX")
        assert x < 0.8 * capital_x  # one pen for the whole face, not one per glyph


@pytest.mark.slow
def test_a_design_is_used_once_and_unusable_files_are_named(mixed_fonts, tmp_path):
    made = prepare_glyphs(
        mixed_fonts, tmp_path / "out", min_samples=2, size=SIZE, ranges=LETTERS, hold_out=["stix"], workers=2
    )
    prepared = made["train"].prepared
    assert prepared["faces"] == ["DejaVuSans", "DejaVuSerif", "STIXGeneral"]
    dropped = prepared["dropped_faces"]
    assert set(dropped) == {"Twin", "LastResortHE-Regular", "broken.ttf"}
    assert dropped["Twin"] == "the same design as DejaVuSans"
    assert dropped["LastResortHE-Regular"] == "draws too few characters of the ranges"
    assert dropped["broken.ttf"].startswith("cannot be read: ")


def test_weights_and_slants_of_a_family_are_different_faces():
    files = sorted(FONTS.glob("DejaVuSans*.ttf"))
    faces = [face for path in files for face in read_faces(path, LETTERS) if len(face.code_points) > 100]
    with ThreadPoolExecutor(1) as pool:
        fitted, dropped = fit_faces(pool, faces, SIZE, 0.6, seed=0)
    assert {face.name for face, _ in fitted} == {face.name for face in faces} and not dropped
    assert len(faces) == 8


def test_glyphs_without_ink_or_with_a_damaged_outline_are_counted(tmp_path):
    font = TTFont(FONTS / "DejaVuSans.ttf")
    content = bytearray((FONTS / "DejaVuSans.ttf").read_bytes())
    start = font.reader.tables["glyf"].offset + font["loca"][font.getGlyphID("B")]
    content[start : start + 2] = b"\x7f\xff"  # the number of contours
    (tmp_path / "damaged.ttf").write_bytes(content)
    (face,) = read_faces(tmp_path / "damaged.ttf", [(0x20, 0x20), (0x41, 0x43)])
    glyphs, dropped = draw_many(face, 7, Pen(24, 4, 26), SIZE, face.code_points)
    assert [(glyph.code_point, glyph.face) for glyph in glyphs] == [(0x41, 7), (0x43, 7)]
    assert dropped == [(0x20, 7, "blank", None), (0x42, 7, "error", None)]


def test_a_collection_has_several_faces(tmp_path):
    collection = TTCollection()
    collection.fonts = [TTFont(FONTS / "DejaVuSans.ttf"), TTFont(FONTS / "cmr10.ttf")]
    collection.save(tmp_path / "both.ttc")
    sans, roman = read_faces(tmp_path / "both.ttc", LETTERS)
    assert [(face.name, face.number) for face in (sans, roman)] == [("both#0", 0), ("both#1", 1)]
    assert len(sans.code_points) > len(roman.code_points) > 50
    with ThreadPoolExecutor(1) as pool:
        fitted, _ = fit_faces(pool, [sans, roman], SIZE, 0.6, seed=0)
        glyphs, _ = draw_faces(pool, fitted, SIZE)
    drawn = {glyph.face: glyph.digest for glyph in glyphs if glyph.code_point == ord("g")}
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("fonts-kouzan-mouhitsu/usr/share/fonts/truetype/KouzanBrushFontSousyo.ttf", True),
        ("fonts-yusei-magic/a.ttf", True),
        ("YuseiMagic-Regular.ttf", True),
        ("truetype/setofont.ttf", True),
        ("fonts-arphic-ukai/usr/share/fonts/truetype/arphic/ukai.ttc", False),
        ("lipstick.ttf", False),
    ],
)
def test_held_out_faces_are_told_by_the_beginning_of_a_name(path, expected):
    assert is_held_out(Path(path), STYLIZED) is expected


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="delete it, or choose another folder"):
        prepare_glyphs("letters", tmp_path)


def test_a_source_without_fonts_is_an_error_that_names_the_sources(tmp_path):
    with pytest.raises(ValueError, match="got the source 'smal', wanted small, medium, large, letters or a"):
        prepare_glyphs("smal", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no font file"):
        prepare_glyphs(tmp_path / "empty", tmp_path / "out")


@pytest.mark.slow
def test_settings_that_leave_nothing_are_errors_that_say_what_to_change(mixed_fonts, tmp_path):
    plain = tmp_path / "plain"  # without the font of placeholders, whose 1.1 million characters take seconds to read
    plain.mkdir()
    for name in ("DejaVuSans", "DejaVuSerif", "STIXGeneral"):
        shutil.copy(mixed_fonts / f"{name}.ttf", plain)
    options = {"size": SIZE, "ranges": LATIN, "workers": 2}
    with pytest.raises(ValueError, match="0 of 3 faces are held out.*: DejaVuSans, DejaVuSerif, STIXGeneral"):
        prepare_glyphs(plain, tmp_path / "out", hold_out=["kouzan"], **options)
    with pytest.raises(ValueError, match="no glyph is left for train.*2 seen faces.*min_samples is 3"):
        prepare_glyphs(plain, tmp_path / "out", hold_out=["stix"], min_samples=3, **options)
    with pytest.raises(ValueError, match="none of the 3 font files"):
        prepare_glyphs(plain, tmp_path / "out", size=SIZE, ranges=((0x4E00, 0x4EFF),), workers=2)
    assert list(tmp_path.iterdir()) == [plain]
