import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from partial_fc.data.pixels import decode
from partial_fc.data.reader import images_in_order
from partial_fc.data.shards import Index, verify
from partial_fc.prepare import folder
from partial_fc.prepare.folder import REASONS, prepare_folder
from partial_fc.prepare.listing import prepare_list

SIZE = (16, 12)


def pixels(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W, 3) RGB, smooth enough for JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR)


def put(path: Path, seed: int, size: tuple[int, int] = SIZE) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = cv2.imencode(path.suffix.lower(), pixels(seed, size)[..., ::-1])[1].tobytes()
    path.write_bytes(data)
    return data


def stored(index: Index) -> dict[bytes, str]:
    """The bytes of every stored image, with the name of its class."""
    names = index.classes()
    out = {}
    for i in range(index.num_samples):
        with Path(index.shard_of(i)).open("rb") as file:
            out[os.pread(file.fileno(), int(index.size[i]), int(index.offset[i]))] = names[index.label[i]]
    return out


def dropped(index: Index) -> dict[str, int]:
    return {reason: count for reason, count in index.prepared["dropped"].items() if count}


def test_images_of_the_wanted_size_keep_their_bytes(tmp_path):
    source = tmp_path / "source"
    wanted = {}
    for i in range(30):
        identity, extension = ("b", "a", "c")[i % 3], ("png", "jpg", "bmp", "webp")[i % 4]
        wanted[put(source / identity / f"{i}.{extension}", i)] = identity
    index = prepare_folder(source, tmp_path / "out", size=SIZE)
    assert stored(index) == wanted
    assert index.classes() == ["a", "b", "c"]
    assert index.prepared["image_size"] == [16, 12]
    assert index.prepared["encoded_anew"] == 0
    assert set(index.prepared["dropped"]) == set(REASONS) and dropped(index) == {}
    verify(index)
    (batch,) = images_in_order(index, np.arange(30), 30, 0)
    assert batch.images.shape == (30, 3, 16, 12)


def test_images_of_other_sizes_are_cut_and_resized(tmp_path):
    kept = put(tmp_path / "source" / "a" / "kept.png", 0)
    put(tmp_path / "source" / "a" / "wide.png", 1, (16, 32))
    put(tmp_path / "source" / "a" / "large.png", 2, (160, 120))
    index = prepare_folder(tmp_path / "source", tmp_path / "out", size=SIZE)
    assert index.prepared["encoded_anew"] == 2
    assert kept in stored(index)
    wanted = {
        pixels(0).tobytes(),
        pixels(1, (16, 32))[:, 10:22].tobytes(),  # the middle; not scaled
        np.rint(pixels(2, (160, 120)).reshape(16, 10, 12, 10, 3).mean(axis=(1, 3))).astype(np.uint8).tobytes(),
    }
    assert {decode(data).tobytes() for data in stored(index)} == wanted


def test_jpeg_stays_jpeg_and_the_rest_becomes_png(tmp_path):
    for seed, extension in enumerate(("jpg", "jpeg", "png", "bmp", "webp")):
        put(tmp_path / "source" / extension / f"0.{extension}", seed, (32, 24))
    index = prepare_folder(tmp_path / "source", tmp_path / "out", size=SIZE)
    is_jpeg = {name: data.startswith(b"\xff\xd8\xff") for data, name in stored(index).items()}
    assert is_jpeg == {"jpg": True, "jpeg": True, "png": False, "bmp": False, "webp": False}


def test_the_quality_is_that_of_the_jpegs(tmp_path):
    put(tmp_path / "source" / "a" / "large.jpg", 2, (160, 120))
    sizes = [
        prepare_folder(tmp_path / "source", tmp_path / str(quality), size=(80, 60), quality=quality).size[0]
        for quality in (20, 95)
    ]
    assert sizes[0] < sizes[1]


def test_what_is_dropped_is_counted_by_its_reason(tmp_path, capsys):
    source = tmp_path / "source"
    wanted = {put(source / "a" / f"{i}.png", i): "a" for i in range(3)}
    wanted |= {put(source / "b" / f"{i}.png", 10 + i): "b" for i in range(2)}
    put(source / "stray.png", 20)
    (source / "readme.txt").write_text("about")
    (source / "a" / "notes.txt").write_text("about")
    (source / "a" / "empty.png").write_bytes(b"")
    (source / "a" / "text.png").write_text("no image")
    (source / "a" / "cut.png").write_bytes(put(source / "a" / "whole.png", 30)[:-30])
    (source / "a" / "whole.png").unlink()
    (source / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "a" / "pipe.png")
    put(source / "a" / "same.png", 0)
    put(source / "a" / "noise.png", 40)
    put(source / "b" / "noise.png", 40)
    put(source / "b" / "noise2.png", 40)
    put(source / "single" / "0.png", 50)
    (source / "nothing").mkdir()
    put(source / ".hidden" / "0.png", 60)
    put(source / "a" / ".hidden.png", 61)
    put(source / "a" / ".thumbs" / "0.png", 62)

    index = prepare_folder(source, tmp_path / "out", size=SIZE, min_samples=2)
    counts = {
        "outside_identity": 2,
        "no_image": 1,
        "not_an_image": 1,
        "unreadable": 2,
        "empty": 1,
        "undecodable": 2,
        "two_identities": 3,
        "duplicate": 1,
        "too_few_samples": 1,
    }
    assert dropped(index) == counts
    assert stored(index) == wanted
    assert index.prepared["dropped_identities"] == 1
    printed = capsys.readouterr().out
    assert "5 images of 2 identities" in printed and "3 two_identities" in printed
    on_disk = json.loads((tmp_path / "out" / "index.json").read_text(encoding="utf-8"))
    assert on_disk["prepared"]["dropped"] == counts | {"damaged": 0}

    rows = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {reason: sum(row["reason"] == reason for row in rows) for reason in counts} == counts
    named = {row["name"]: row for row in rows}
    assert named["a/text.png"] == {"name": "a/text.png", "reason": "undecodable"}
    assert named["a/same.png"]["other"] == "a/0.png" and named["a/noise.png"]["other"] == "b/noise.png"
    assert named["nothing"] == {"name": "nothing", "reason": "no_image"}
    assert named["b/noise2.png"]["other"] == "a/noise.png" and "a/notes.txt" in named
    assert sorted(index.name(i).split("/")[0] for i in range(index.num_samples)) == [*"aaa", *"bb"]
    assert all((source / index.name(i)).is_file() for i in range(index.num_samples))


def test_depth_links_case_and_unicode(tmp_path):
    source = tmp_path / "source"
    wanted = {
        put(source / "王" / "deep" / "er" / "1.PNG", 1): "王",
        put(source / "Zoë" / "2.JPG", 2): "Zoë",
        put(source / "Zoë" / "ünï cödé.name.png", 3): "Zoë",
        put(tmp_path / "elsewhere" / "4.png", 4): "linked",
        put(tmp_path / "5.png", 5): "王",
    }
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "王" / "link.png").symlink_to(tmp_path / "5.png")
    (source / "王" / "deep" / "circle").symlink_to(source / "王")
    (source / "itself").symlink_to("itself")
    (source / "王" / "itself.png").symlink_to("itself.png")
    index = prepare_folder(source, tmp_path / "out", size=SIZE)
    assert stored(index) == wanted
    assert index.classes() == sorted(["王", "Zoë", "linked"])
    assert dropped(index) == {"outside_identity": 1, "unreadable": 1}


def test_a_name_that_is_no_utf8_is_escaped(tmp_path):
    for name in (b"\xff", b"line\nbreak"):
        put(Path(os.fsdecode(os.fsencode(tmp_path / "source") + b"/" + name)) / "0.png", len(name))
    index = prepare_folder(tmp_path / "source", tmp_path / "out", size=SIZE)
    assert index.classes() == ["line\\nbreak", "\\xff"]


def test_equal_sources_and_seeds_give_equal_shards(tmp_path):
    def digest(out: str, seed: int) -> tuple[str, bytes]:
        index = prepare_folder(tmp_path / "source", tmp_path / out, size=(8, 8), seed=seed)
        shards = b"".join((index.path / name).read_bytes() for name in index.shard_names)
        return index.fingerprint, hashlib.sha256(shards).digest()

    for i in range(20):
        put(tmp_path / "source" / f"{i % 4}" / f"{i}.jpg", i)
    assert digest("first", 0) == digest("again", 0) != digest("other", 1)


def test_samples_are_in_random_order(tmp_path):
    for i in range(40):
        put(tmp_path / "source" / f"{i // 10}" / f"{i}.png", i)
    label = prepare_folder(tmp_path / "source", tmp_path / "out", size=SIZE).label
    assert np.count_nonzero(np.diff(label)) > 5 and label.tolist() != sorted(label.tolist())


def test_without_a_size_all_images_must_have_one(tmp_path):
    put(tmp_path / "source" / "a" / "0.png", 0)
    assert prepare_folder(tmp_path / "source", tmp_path / "out", size=None).prepared["image_size"] == [16, 12]
    put(tmp_path / "source" / "a" / "1.png", 1, (8, 6))
    with pytest.raises(ValueError, match="got images of 2 sizes .*16 x 12: 1.*wanted one: give the size"):
        prepare_folder(tmp_path / "source", tmp_path / "other", size=None)
    assert not (tmp_path / "other").exists()


def test_a_source_without_images_is_an_error(tmp_path):
    (tmp_path / "source" / "a").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="has no image to use; left out: 1 no_image .a.. Wanted source/<identity>/<image>"
    ):
        prepare_folder(tmp_path / "source", tmp_path / "out", size=SIZE)
    put(tmp_path / "source" / "a" / "0.png", 0)
    with pytest.raises(ValueError, match="left out: 1 too_few_samples.* at least 2 of an identity"):
        prepare_folder(tmp_path / "source", tmp_path / "out", size=SIZE, min_samples=2)


@pytest.mark.parametrize("size", [SIZE, (8, 8)])
@pytest.mark.parametrize("becomes", [None, b"", b"no image"])
def test_a_file_that_changes_on_the_way_is_an_error(tmp_path, monkeypatch, size, becomes):
    put(tmp_path / "source" / "a" / "0.png", 0)
    path = tmp_path / "source" / "a" / "0.png"
    examine_all = folder.examine_all

    def and_then(*arguments, **options):
        images = examine_all(*arguments, **options)
        path.unlink() if becomes is None else path.write_bytes(becomes)
        return images

    monkeypatch.setattr(folder, "examine_all", and_then)
    if becomes == b"no image" and size == SIZE:  # bytes that stay as they are are not looked at again
        index = prepare_folder(tmp_path / "source", tmp_path / "out", size=size)
        assert stored(index) == {becomes: "a"}
        return
    with pytest.raises(OSError, match="0.png is not what it was when it was read before"):
        prepare_folder(tmp_path / "source", tmp_path / "out", size=size)
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_errors(tmp_path):
    put(tmp_path / "source" / "a" / "0.png", 0)
    with pytest.raises(NotADirectoryError, match="missing is no folder"):
        prepare_folder(tmp_path / "missing", tmp_path / "out", size=SIZE)
    with pytest.raises(FileExistsError, match="delete it, or choose another"):
        prepare_folder(tmp_path / "source", tmp_path / "source", size=SIZE)
    for wrong, message in (
        ({"min_samples": 0}, "got min_samples=0, wanted 1 or more"),
        ({"quality": 101}, "got quality=101, wanted 1 to 100"),
        ({"size": (0, 4)}, "got the size 0 x 4, wanted height and width of 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_folder(tmp_path / "source", tmp_path / "out", **{"size": SIZE} | wrong)


@pytest.mark.parametrize("size", [SIZE, (8, 6)])
def test_transparent_images_are_stored_on_white(tmp_path, size, capsys):
    """A reader that knows nothing of transparency, of another program, sees what ours does."""
    opaque = put(tmp_path / "source" / "a" / "opaque.png", 9)
    alpha = np.full(SIZE, 255, np.uint8)
    alpha[:, :6], alpha[:, 6:8] = 0, 128
    kinds = {"png": {}, "tif": {}, "webp": {"lossless": True, "exact": True}}
    for seed, (kind, options) in enumerate(kinds.items()):
        (tmp_path / "source" / kind).mkdir()
        image = Image.fromarray(np.dstack([pixels(seed), alpha]))
        image.save(tmp_path / "source" / kind / f"0.{kind}", **options)
    index = prepare_folder(tmp_path / "source", tmp_path / "out", size=size)
    assert index.prepared["transparent"] == 3 and index.prepared["encoded_anew"] == 3 + (size != SIZE)
    assert (
        "4 images of 4 identities; 3 are transparent and stored on white; left out: nothing" in capsys.readouterr().out
    )
    images = {
        name: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) for data, name in stored(index).items()
    }
    assert all(image.shape == (*size, 3) for image in images.values())
    if size != SIZE:
        return
    assert opaque in stored(index)
    for seed, kind in enumerate(kinds):
        image, hidden = images[kind][..., ::-1], pixels(seed)
        assert (image[:, :6] == 255).all() and (image[:, 8:] == hidden[:, 8:]).all()
        np.testing.assert_allclose(image[:, 6:8], hidden[:, 6:8] * (128 / 255) + 127, rtol=0, atol=1)


def test_damaged_jpegs_are_named_and_can_be_kept(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", noise)[1].tobytes()
    (tmp_path / "source" / "a").mkdir(parents=True)
    half = len(jpeg) // 2
    broken = {"end": jpeg[:half] + b"\xff\xd9", "zeros": jpeg[:half] + bytes(len(jpeg)) + b"\xff\xd9"}
    for name, data in ({"whole": jpeg} | broken).items():
        (tmp_path / "source" / "a" / f"{name}.jpg").write_bytes(data)
    index = prepare_folder(tmp_path / "source", tmp_path / "out", size=None)
    assert list(stored(index)) == [jpeg] and dropped(index) == {"damaged": 2}
    assert "left out: 2 damaged (a/end.jpg, …)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert rows == [{"name": f"a/{name}.jpg", "reason": "damaged"} for name in broken]
    kept = prepare_folder(tmp_path / "source", tmp_path / "kept", size=None, keep_damaged=True)
    assert set(stored(kept)) == {jpeg, *broken.values()} and kept.prepared["keep_damaged"] and dropped(kept) == {}


def test_kinds_of_files(tmp_path):
    """By their names; what is inside decides how they are read."""
    image = Image.fromarray(pixels(0))
    names = ["0.jfif", "1.GIF", "2.avif", "3.jp2", "4.tiff", "5.pnm", "6.dib"]
    kinds = ["JPEG", "GIF", "AVIF", "JPEG2000", "TIFF", "PPM", "BMP"]
    (tmp_path / "source" / "a").mkdir(parents=True)
    for name, kind in zip(names, kinds, strict=True):
        image.save(tmp_path / "source" / "a" / name, kind)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "source" / "a" / "7.avif", "AVIF", exif=turned)
    index = prepare_folder(tmp_path / "source", tmp_path / "out", size=None)
    assert index.num_samples == 8 and index.prepared["encoded_anew"] == 1 and dropped(index) == {}
    (tmp_path / "list.txt").write_text("".join(f"source/a/{name}\ta\n" for name in [*names, "7.avif"]))
    assert set(stored(prepare_list(tmp_path / "list.txt", tmp_path / "listed"))) == set(stored(index))


def test_a_folder_one_level_too_high(tmp_path, capsys):
    for i, identity in enumerate("abc"):
        put(tmp_path / "all" / "photos" / "faces" / identity / f"{i}.png", i)
    for source in ("all", "all/photos"):
        with pytest.raises(
            ValueError,
            match="has one identity: .*/all/photos/faces has no image itself, but the folders "
            "a, b, c. .* give .*/all/photos/faces; or, if",
        ):
            prepare_folder(tmp_path / source, tmp_path / "out", size=SIZE)
    for i, split in enumerate(("train", "test")):
        for identity in "abc":
            put(tmp_path / "splits" / split / f"{identity}{i}" / "0.png", 10 * i + ord(identity))
    assert prepare_folder(tmp_path / "splits", tmp_path / "splits_out", size=SIZE).num_classes == 2
    said = capsys.readouterr().out
    assert "warning: no image is right in an identity's folder: test has the folders a1, b1, c1; if these" in said
    assert f"prepare {tmp_path}/splits/test\n" in said
    put(tmp_path / "albums" / "a" / "0.png", 0)  # one image in its place, and folders are albums
    for i in (1, 2):
        put(tmp_path / "albums" / "a" / f"album {i}" / "0.png", i)
    assert prepare_folder(tmp_path / "albums", tmp_path / "albums_out", size=SIZE).num_samples == 3
    said = capsys.readouterr().out
    assert "warning" in said and "albums_out has one identity, a; training wants two or more" in said
