"""Lists of pairs: InsightFace's .bin and a text of one's own, into a set that is evaluated over these pairs alone."""

import hashlib
import json
import os
import pickle
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from partial_fc import cli
from partial_fc.config import EvaluationSet
from partial_fc.data.shards import load_index, verify, write_shards
from partial_fc.evaluate.embed import embed
from partial_fc.evaluate.pairs import listed_scores
from partial_fc.evaluate.protocol import evaluate_set, format_table
from partial_fc.evaluate.runs import evaluate_run, open_sets
from partial_fc.figures import verification
from partial_fc.prepare.bin_file import read_bin
from partial_fc.prepare.pairs import prepare_bin, prepare_pair_tars, prepare_pairs
from tests.conftest import run_ranks
from tests.http_store import serving
from tests.test_embed import OPTIONS, backbone
from tests.test_figures import result_of, run_of, saved
from tests.test_prepare_folder import put
from tests.test_report import report, write_run
from tests.test_train import train_here

__all__ = ["saved"]  # a fixture
SAME = [True, False, True, False, False]


def encoded(folder: Path, count: int, size: tuple[int, int] = (16, 12)) -> list[bytes]:
    return [put(folder / f"{i}.{('jpg', 'png')[i % 2]}", i, size) for i in range(count)]


def bytes_of(index) -> list[bytes]:
    """Of every sample, in their order."""
    data = []
    for i in range(index.num_samples):
        with Path(index.shard_of(i)).open("rb") as file:
            data.append(os.pread(file.fileno(), int(index.size[i]), int(index.offset[i])))
    return data


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """As lfw.bin is: strings of Python 2, protocol 2. Their opcodes T and U have lengths as those of bytes, B and C."""
    data = b"\x80\x02(]q\x01("
    for image in images:
        data += (
            b"U" + bytes([len(image)]) + image if len(image) < 256 else b"T" + len(image).to_bytes(4, "little") + image
        )
        data += b"q\x02"
    return data + b"e]q\x03(" + b"".join(b"\x88" if one else b"\x89" for one in same) + b"etq\x04."


def forms(images: list[bytes], same: list[bool]):
    yield "python 2", python2(images, same)
    for protocol in range(1, pickle.HIGHEST_PROTOCOL + 1):
        yield f"protocol {protocol}", pickle.dumps((images, same), protocol=protocol)
        arrays = [np.frombuffer(image, np.uint8).copy() for image in images]  # what cv2.imencode gives
        yield f"arrays, protocol {protocol}", pickle.dumps((arrays, [np.bool_(one) for one in same]), protocol=protocol)
        yield f"numbers, protocol {protocol}", pickle.dumps((images, [int(one) for one in same]), protocol=protocol)
        yield f"one array, protocol {protocol}", pickle.dumps((images, np.array(same)), protocol=protocol)
        wide = [np.int64(one) for one in same]
        yield f"wide numbers, protocol {protocol}", pickle.dumps((images, wide), protocol=protocol)
        yield f"a wide array, protocol {protocol}", pickle.dumps((images, np.array(wide)), protocol=protocol)


def write_pairs(file: Path, samples: list[dict]) -> str:
    with webdataset.TarWriter(str(file)) as writer:
        for sample in samples:
            writer.write(sample)
    return str(file)


@pytest.mark.parametrize("form", ["img1", "img1.jpg", "jpg"])
def test_pairs_of_shards_are_those_of_the_bin_file(tmp_path, form, monkeypatch):
    """Both from behind a URL, by the command."""
    images = encoded(tmp_path, 10)
    names = {"img1": ("img1", "img2"), "img1.jpg": ("img1.jpg", "img2.png"), "jpg": ("jpg", "png")}[form]
    rows = []
    for i, same in enumerate(SAME):
        key = f"{('impostor', 'genuine')[same]}/{i:04d}"
        label = {} if form == "jpg" else {"cls": str(int(same))}
        rows.append({"__key__": key, **label, names[0]: images[2 * i], names[1]: images[2 * i + 1]})
    write_pairs(tmp_path / "pairs-0.tar", rows[:3])
    write_pairs(tmp_path / "pairs-1.tar.gz", rows[3:])
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, SAME)))
    with serving(tmp_path) as store:
        pairs = f"{store.url}/pairs-{{0.tar,1.tar.gz}}"
        for kind, source, out in (("pairs", pairs, "of_tars"), ("bin", f"{store.url}/lfw.bin", "of_bin")):
            monkeypatch.setattr("sys.argv", ["partial-fc", "prepare", kind, source, str(tmp_path / out)])
            cli.main()
    of_tars, of_bin = load_index(tmp_path / "of_tars"), load_index(tmp_path / "of_bin")
    assert bytes_of(of_tars) == bytes_of(of_bin) == images
    assert of_tars.pairs.tolist() == of_bin.pairs.tolist()
    assert of_tars.prepared["source"] == pairs and of_bin.prepared["source"] == f"{store.url}/lfw.bin"
    assert not list(tmp_path.glob("*fetched*"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"img2": None}, "a.tar: the sample 1 has 1.cls, 1.img1: wanted two images of at most 256 MiB"),
        ({"cls": b"2"}, r"a.tar: the sample 1 has .cls \['2'\]: wanted 1 for one identity or 0 in .cls"),
        ({"cls": None}, "a.tar: the sample 1 has no .cls, and no folder genuine or impostor in the key"),
        ({"__key__": "genuine/impostor/1", "cls": None}, "a.tar: the sample genuine/impostor/1 has no .cls"),
        ({"png": b"third"}, "wanted two images"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, change, said):
    images = encoded(tmp_path, 2)
    row = {"__key__": "1", "cls": b"1", "img1": images[0], "img2": images[1]} | change
    source = write_pairs(tmp_path / "a.tar", [{key: value for key, value in row.items() if value is not None}])
    with pytest.raises(ValueError, match=said):
        prepare_pair_tars(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pair_of_links_is_named_and_not_left_out(tmp_path, monkeypatch):
    images = encoded(tmp_path, 2)
    write_pairs(tmp_path / "a.tar", [{"__key__": "1", "cls": b"1", "img1": images[0], "img2": images[1]}])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("2.img1")
        link.type, link.linkname = tarfile.LNKTYPE, "1.img1"
        tar.addfile(link)
    (tmp_path / "list.json").write_text('{"shardlist": [{"url": "a.tar"}]}')
    command = ["partial-fc", "prepare", "pairs", str(tmp_path / "list.json"), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"a.tar: 1 members belong to no pair, the first is 2.img1 \(link\)"):
        cli.main()


def test_columns_are_of_a_text_alone(monkeypatch):
    monkeypatch.setattr("sys.argv", ["partial-fc", "prepare", "pairs", "a.tar", "out", "--columns", "same,image,image"])
    with pytest.raises(SystemExit, match="error: got --columns for the shards a.tar, wanted none"):
        cli.main()


def test_every_form_of_the_file(tmp_path):
    images = [*encoded(tmp_path, 8), b"short", b"x" * 255]
    images[6] = images[0]  # pickle names it instead of writing it again
    path = tmp_path / "lfw.bin"
    for form, data in forms(images, SAME):
        path.write_bytes(data)
        assert read_bin(path) == (images, SAME), form
    assert pickle.loads(python2(images, SAME), encoding="bytes") == (images, SAME)


def test_pairs_in_their_order_and_each_image_once(tmp_path, capsys):
    images = encoded(tmp_path, 10)
    images[6] = images[0]
    (tmp_path / "lfw.bin").write_bytes(python2(images, SAME))
    index = prepare_bin(tmp_path / "lfw.bin", tmp_path / "lfw")
    assert bytes_of(index) == images[:6] + images[7:] and index.prepared["image_size"] == [16, 12]
    wanted = [[0, 1, 1], [2, 3, 0], [4, 5, 1], [0, 6, 0], [7, 8, 0]]
    assert load_index(tmp_path / "lfw").pairs.tolist() == wanted
    assert index.label.tolist() == list(range(9)) and index.classes()[5:7] == ["image 5", "image 7"]
    assert "9 images in 5 pairs, 2 of one identity, 3 of two" in capsys.readouterr().out
    verify(index)

    resized = prepare_bin(tmp_path / "lfw.bin", tmp_path / "resized", size=(8, 8))
    assert resized.prepared["image_size"] == [8, 8] and resized.prepared["encoded_anew"] == 9


def test_a_data_set_with_pairs_is_of_a_later_version_and_checked(tmp_path):
    (tmp_path / "lfw.bin").write_bytes(python2(encoded(tmp_path, 4), [True, False]))
    path = prepare_bin(tmp_path / "lfw.bin", tmp_path / "lfw").path
    description = json.loads((path / "index.json").read_text())
    assert description["version"] == 3
    pairs = path / "index" / "pairs.npy"
    good = np.load(pairs)
    for bad in (good[:, :2], good.astype(np.int32), good + [[4, 0, 0]], good - [[1, 0, 0]], good + [[0, 0, 1]]):
        np.save(pairs, bad)
        with pytest.raises(ValueError, match="pairs.npy is damaged: its sha256"):
            load_index(path)
        description["pairs_sha256"] = hashlib.sha256(pairs.read_bytes()).hexdigest()
        (path / "index.json").write_text(json.dumps(description))
        got = r"int.* \(\d, \d\), wanted int64 \(P, 3\)"
        if bad.shape == good.shape and bad.dtype == good.dtype:
            got = r"\[-?\d, \d, \d\] at row \d, wanted two of 4 samples, and 1 or 0"
        with pytest.raises(ValueError, match=f"pairs.npy has {got}: copy the data set again"):
            load_index(path)
    pairs.unlink()
    with pytest.raises(FileNotFoundError, match="pairs.npy is missing"):
        load_index(path)


@pytest.mark.parametrize("between", ["\t", ",", ", ", " "])
def test_a_text_gives_the_same_set(tmp_path, between, monkeypatch):
    images = encoded(tmp_path / "faces", 10)
    images[6] = images[0]
    names = [f"faces/{i}.{('jpg', 'png')[i % 2]}" for i in range(10)]
    names[6] = names[0]
    lines = [between.join([*names[2 * i : 2 * i + 2], str(int(one))]) for i, one in enumerate(SAME)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, SAME)))
    monkeypatch.setattr(
        "sys.argv", ["partial-fc", "prepare", "pairs", str(tmp_path / "pairs.txt"), str(tmp_path / "a")]
    )
    cli.main()
    of_bin, of_text = prepare_bin(tmp_path / "lfw.bin", tmp_path / "b"), load_index(tmp_path / "a")
    assert bytes_of(of_text) == bytes_of(of_bin) and of_text.pairs.tolist() == of_bin.pairs.tolist()
    assert of_text.classes()[:2] == [f"{tmp_path}/faces/0.jpg", f"{tmp_path}/faces/1.png"]


def test_nothing_that_a_file_names_is_called(tmp_path):
    """The first two would make the file when unpickled; the third holds itself."""
    made = tmp_path / "made"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {made}",)

    path = tmp_path / "evil.bin"
    for value in (Evil(), ([Evil(), b"a"], [True])):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match="evil.bin is no verification set as InsightFace's lfw.bin"):
            read_bin(path)
    state_of_itself = b"(](cos\nsystem\n(tRq\x01(h\x01tbe]\x88at."
    path.write_bytes(b"\x80\x02" + state_of_itself)
    with pytest.raises(ValueError, match="evil.bin is no verification set"):
        read_bin(path)
    assert not made.exists()


@pytest.mark.slow
def test_a_hostile_file_takes_no_more_time_and_memory_than_its_size(tmp_path):
    """Nested as deep as it is long; lengths beyond any memory; one string that is made into bytes again and again."""
    path = tmp_path / "hostile.bin"
    number, long = 100_000, b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6
    start = b"\x80\x02c_codecs\nencode\nq\x01" + long + b"q\x02(]("
    files = [
        b"\x80\x02" + b"(" * number + b"t" * number + b".",
        b"\x80\x02" + b"(]" * number + b"e" * number + b".",
        b"\x80\x04\x8e" + (2**45).to_bytes(8, "little") + b"abc.",
        b"\x80\x04\x8e" + (2**63 - 1).to_bytes(8, "little") + b"abc.",
        b"\x80\x04\x8d" + (2**45).to_bytes(8, "little") + b"abc.",
        start + b"h\x01h\x02\x85R" * number + b"e]\x88at.",
        # one array of 1 MB stands where 1,000 numbers were wanted: each of them would be made of all its bytes
        b"\x80\x04(](C\x01aq\x01"
        + b"h\x01" * 1999
        + b"e](cx\nscalar\nC\x01a"
        + b"B"
        + (10**6).to_bytes(4, "little")
        + b"\1"
        + bytes(10**6 - 1)
        + b"\x86Rq\x03"
        + b"h\x03" * 999
        + b"et.",
    ]
    for data in files:
        path.write_bytes(data)
        tracemalloc.start()
        began = time.process_time()
        with pytest.raises(ValueError, match="hostile.bin is no verification set"):
            read_bin(path)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # quadratic time would be minutes, all of the copies 100 GB
        assert time.process_time() - began < 30 and used < 100e6, (data[:20], used)


def test_an_array_that_is_named_many_times_is_looked_at_once(tmp_path):
    """100,000 images, each the same array of arrays, 900 in each other: 60 s where each is looked at anew."""
    nested = b"](cx\n_frombuffer\nq\x01C\x01a\x85Rq\x02" + b"h\x01h\x02\x85Rq\x02" * 899
    path = tmp_path / "nested.bin"
    path.write_bytes(b"\x80\x04(" + nested + b"h\x02" * 99_100 + b"e](" + b"\x88" * 50_000 + b"et.")
    began = time.process_time()
    images, same = read_bin(path)
    assert images == [b"a"] * 100_000 and same == [True] * 50_000
    assert time.process_time() - began < 15  # 0.4 s alone


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    path = tmp_path / "lfw.bin"
    files = dict(forms([b"first", b"second" * 50, b"third", b"fourth"], [True, False]))
    for form in ("python 2", "protocol 4", "arrays, protocol 2", "arrays, protocol 5"):
        data = files[form]
        for length in range(len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(ValueError, match="copy it again"):
                read_bin(path)
                raise AssertionError((form, length))


@pytest.mark.parametrize(
    "value, message",
    [
        (([b"a", b"b", b"c"], [True, False]), "has 3 images for 2 pairs, wanted two for each"),
        (([b"a", b"b"], [True, "no"]), "it has str where bytes were wanted"),
        (([b"a", {"b": 1}], [True]), "it has EMPTY_DICT at byte"),
        (([b"a", b"b"], [True], "more"), "it does not hold a list of images and one of truth values"),
        ((np.zeros((4, 2), np.uint8), [True, False]), "it does not hold a list of images and one of truth values"),
        ([b"a", "b"], "it does not hold a list of images"),
        (([b"a", b"b"], [-1]), "it has -1 where true or false was wanted"),
        (([b"a", b"b"], np.array([1, 0, 1])), "it has 1 pairs of images and an array of 24 bytes|it has .* where true"),
        (([], np.array([])), "it has 0 pairs of images and an array of 0 bytes"),
    ],
)
def test_other_pickles_are_errors(tmp_path, value, message):
    path = tmp_path / "other.bin"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=message):
        read_bin(path)


def test_lists_that_cannot_be_used(tmp_path):
    images = encoded(tmp_path, 4)
    path, out = tmp_path / "lfw.bin", tmp_path / "out"

    def refused(source: Path, message: str, prepare=prepare_bin, **options) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            prepare(source, out, **options)
        assert not out.exists() and not list(tmp_path.glob("*.partial"))

    refused(tmp_path / "none.bin", "none.bin is no file")
    path.write_bytes(pickle.dumps((images, [True, True])))
    refused(path, "2 pairs of one identity and 0 of two, wanted some of both")
    path.write_bytes(pickle.dumps(([*images[:3], b"no image"], [True, False])))
    refused(path, "lfw.bin: image 3 .undecodable. cannot be used; in all 1 undecodable. Mend them")
    path.write_bytes(pickle.dumps(([*images[:3], images[2][:-2]], [True, False])))
    refused(path, "lfw.bin: image 3 .(damaged|undecodable). cannot be used")
    path.write_bytes(pickle.dumps(([*images[:3], put(tmp_path / "large.png", 9, (20, 20))], [True, False])))
    refused(path, "images of 2 sizes")
    refused(path, "got quality=0, wanted 1 to 100", size=(8, 8), quality=0)
    refused(path, "got the size 0 x 8, wanted height", size=(0, 8))
    refused(path, "no text in UTF-8 or CSV .*wanted a line each: image, image, 1", prepare_pairs)

    text = tmp_path / "pairs.txt"
    for line in ("0.jpg 1.png", "a b.jpg 1.png 1", "0.jpg,1.png,1,2", "0.jpg,,1"):
        text.write_text(f"0.jpg 1.png 0\n{line}\n")
        refused(text, f"line 2: got '{line}', wanted image, image, 1 for one identity or 0, with a tab", prepare_pairs)
    text.write_text("\n0.jpg 1.png yes\n")
    refused(text, "line 2: got 'yes' behind two images, wanted 1 for one identity or 0", prepare_pairs)
    (tmp_path / "cut.jpg").write_bytes(images[0][:-20] + b"\xff\xd9")
    text.write_text("0.jpg 1.png 0\n0.jpg 7.png 1\ncut.jpg 7.png 1\n")
    wanted = "pairs.txt: .*7.png .unreadable., .*cut.jpg .damaged. cannot be used; in all 1 unreadable, 1 damaged. Mend"
    refused(text, wanted, prepare_pairs)
    text.write_text("left_image,image2,same\n0.jpg,1.png,0\n")
    refused(text, "names the columns left_image, image2, same .* --columns index,image,image,same", prepare_pairs)
    text.write_text("image1,image2,same\n0.jpg,1.png,yes\n")
    refused(text, "line 2: got 'yes' behind two images, wanted 1 .* --columns same,image,image", prepare_pairs)
    out.mkdir()
    with pytest.raises(FileExistsError, match="delete it, or choose another"):
        prepare_pairs(text, out)


def test_columns_of_pairs_and_damaged_images_that_are_kept(tmp_path):
    encoded(tmp_path, 3)
    jpeg = tmp_path / "0.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-20] + b"\xff\xd9")
    text = tmp_path / "pairs.csv"
    pairs = []
    for number, (lines, columns) in enumerate(
        [
            ("Image_1,image_2,is same\n0.jpg,1.png,0\n0.jpg,2.jpg,1\n", None),
            ("file_a\tlabel\tfile_b\n0.jpg\t0\t1.png\n0.jpg\t1\t2.jpg\n", None),
            ("0,0.jpg,1.png\n1,0.jpg,2.jpg\n", ["same", "image", "image"]),
        ]
    ):
        text.write_text(lines)
        index = prepare_pairs(text, tmp_path / str(number), keep_damaged=True, columns=columns)
        pairs.append((index.pairs.tolist(), [index.name(i) for i in range(3)]))
    assert pairs == [([[0, 1, 0], [0, 2, 1]], ["0.jpg", "1.png", "2.jpg"])] * 3


@pytest.fixture(scope="module")
def listed(glyphs_ci, tmp_path_factory) -> Path:
    """A list of 60 pairs of letters in the fonts of the tests, ten folds of three of either kind, as LFW's is."""
    index = load_index(glyphs_ci / "test_seen")
    rng = np.random.default_rng(0)
    data, same = bytes_of(index), np.tile([True] * 3 + [False] * 3, 10).tolist()
    images = []
    for one in same:
        first = int(rng.integers(index.num_samples))
        other = (index.label == index.label[first]) == one
        other[first] = False
        images += [data[first], data[int(rng.choice(np.flatnonzero(other)))]]
    folder = tmp_path_factory.mktemp("listed")
    (folder / "letters.bin").write_bytes(pickle.dumps((images, same)))
    prepare_bin(folder / "letters.bin", folder / "letters")
    return folder / "letters"


def evaluate(path: Path) -> dict:
    return evaluate_set(backbone(), load_index(path), batch_size=8, **OPTIONS)


def scores_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of every pair, and whether it is of one identity; naively."""
    index = load_index(path)
    embeddings = embed(backbone(), index, batch_size=8, **OPTIONS).double()
    first, second, same = index.pairs.T
    return (embeddings[first.copy()] * embeddings[second.copy()]).sum(dim=1).numpy(), same == 1


def accuracy_of(score: np.ndarray, same: np.ndarray, fold: np.ndarray) -> list[float]:
    """Of every fold, by the threshold that is best on the others."""
    accuracy = []
    for name in range(10):
        held = fold == name
        tried = sorted(score[~held], reverse=True)
        right = [np.mean((score[~held] >= threshold - 1e-7) == same[~held]) for threshold in tried]
        accuracy.append(np.mean((score[held] >= tried[int(np.argmax(right))] - 1e-7) == same[held]))
    return accuracy


def test_the_result_is_that_of_the_listed_pairs(listed):
    score, same = scores_of(listed)
    accuracy = accuracy_of(score, same, np.arange(60) // 6)  # the list's own folds

    result = evaluate(listed)
    assert result["fold_accuracy"] == pytest.approx(np.mean(accuracy), abs=1e-12)
    assert result["fold_accuracy_std"] == pytest.approx(np.std(accuracy), abs=1e-12)
    assert (result["num_genuine"], result["num_impostor"], result["num_fold_pairs"]) == (30, 30, 60)
    assert sum(result["histogram"]["genuine"]) == sum(result["histogram"]["impostor"]) == 30
    highest = sorted(score[~same])[::-1]
    for far, tar in result["roc"]:
        threshold = highest[round(far * 30)] if far < 1 else -1  # the first impostor that is not accepted
        assert tar == np.mean(score[same] > threshold + 1e-7)
    hardest = result["examples"]["hardest"]
    assert [pair["score"] for pair in hardest[:6]] == pytest.approx(highest[:6], abs=1e-6)
    assert [pair["score"] for pair in hardest[6:]] == pytest.approx(sorted(score[same])[:6], abs=1e-6)
    pairs = {(*sorted(pair[:2]), bool(pair[2])) for pair in load_index(listed).pairs.tolist()}
    for group in result["examples"].values():
        assert {(pair["a"], pair["b"], pair["same"]) for pair in group} <= pairs | {(b, a, s) for a, b, s in pairs}
    assert result["rank1"] is None and result["dir_at_far"] == {"0.01": None} and result["num_identities"] is None
    text = format_table({"trained": {"letters": result}})
    assert "letters: – for rank-1 and DIR: a list of pairs does not say who is who." in text
    assert "the set has no more" not in text


def rewritten(listed: Path, out: Path, order: np.ndarray) -> Path:
    """The set with its pairs in another order, or fewer of them."""
    index = load_index(listed)
    samples = [(data, "png", label) for label, data in enumerate(bytes_of(index))]
    prepared = dict(index.prepared)
    return write_shards(out, samples, index.classes(), prepared=prepared, pairs=index.pairs[order]).path


def test_a_list_that_is_sorted_or_uneven_has_folds_of_both_kinds(listed, tmp_path):
    """All of one kind first is the same as fold after fold; of 23 and 27 pairs the folds are 2 or 3 of either kind."""
    same = load_index(listed).pairs[:, 2] == 1
    by_kind = rewritten(listed, tmp_path / "by_kind", np.argsort(~same, kind="stable"))
    wanted, got = evaluate(listed), evaluate(by_kind)
    for name in ("fold_accuracy", "fold_accuracy_std", "roc", "tar_at_far"):
        assert got[name] == wanted[name], name
    order = np.random.default_rng(1).permutation([*np.flatnonzero(same)[:23], *np.flatnonzero(~same)[:27]])
    uneven = rewritten(listed, tmp_path / "uneven", order)
    score, same = scores_of(uneven)
    fold = np.empty(50, dtype=int)
    for kind, sizes in ((same, [2, 2, 2, 3, 2, 2, 3, 2, 2, 3]), (~same, [2, 3, 3, 2, 3, 3, 2, 3, 3, 3])):
        fold[kind] = np.repeat(np.arange(10), sizes)
    assert evaluate(uneven)["fold_accuracy"] == pytest.approx(np.mean(accuracy_of(score, same, fold)), abs=1e-12)
    few = evaluate(rewritten(listed, tmp_path / "few", np.arange(50)[:30]))
    assert few["num_fold_pairs"] == 30
    fewer = evaluate(rewritten(listed, tmp_path / "fewer", np.arange(12)))
    assert fewer["fold_accuracy"] is None and fewer["num_genuine"] == 6
    assert "it needs 10 pairs of one identity, and of two" in format_table({"trained": {"fewer": fewer}})
    one_kind = rewritten(listed, tmp_path / "one_kind", np.arange(3))
    with pytest.raises(ValueError, match="one_kind has pairs of one kind alone"):
        open_sets({"P": EvaluationSet(data=str(one_kind))}, (32, 32))


def test_scores_in_chunks_are_the_same():
    embeddings = torch.nn.functional.normalize(torch.randn(20, 8))
    pairs = np.random.default_rng(0).integers(0, 20, (50, 2))
    assert np.array_equal(listed_scores(embeddings, pairs, chunk=7), listed_scores(embeddings, pairs))


@pytest.mark.slow
def test_the_same_on_any_number_of_ranks(listed):
    wanted = evaluate(listed)
    for world_size in (2, 3):
        assert run_ranks(evaluate, world_size, listed) == [wanted] * world_size


@pytest.mark.slow
def test_evaluated_reported_and_not_trained_on(listed, glyphs_ci, tmp_path):
    """As a set of the config beside another, evaluated after the training; on the page and in the figure."""
    sets = f"{{letters: {{data: {listed}}}, unseen: {{data: {glyphs_ci}/test_unseen}}}}"
    run = tmp_path / "run"
    run_ranks(train_here, 1, run, glyphs_ci / "train", "run.steps=3", f"evaluate.sets={sets}")
    evaluation = evaluate_run(run, torch.device("cpu"))
    results = evaluation["models"]["trained"]
    assert results["letters"]["num_fold_pairs"] == 60 and results["unseen"]["rank1"] is not None
    page = report([run], tmp_path / "page.html")
    assert "a list of 30 genuine and 30 impostor pairs" in page.text and "does not say who is who" in page.text
    with pytest.raises(AssertionError, match="data.train: .* is a list of pairs, which does not say who is who"):
        run_ranks(train_here, 1, tmp_path / "other", listed, "run.steps=3", "evaluate.sets={}")


def test_lists_have_no_distractors(listed, glyphs_ci):
    for data, distractors in ((listed, glyphs_ci / "test_seen"), (glyphs_ci / "test_seen", listed)):
        sets = {"P": EvaluationSet(data=str(data), distractors=str(distractors))}
        with pytest.raises(ValueError, match="evaluation set P: .*letters is a list of pairs: it has no gallery"):
            open_sets(sets, (32, 32))
    found = open_sets({"P": EvaluationSet(data=str(listed))}, (32, 32))
    assert len(found["P"][0].pairs) == 60


@pytest.mark.slow
def test_a_figure_with_and_without_cmc(saved):
    without = result_of(0.5) | {"cmc": []}
    runs = [run_of(name, P1=result_of(0.5), list=without) for name in ("one", "two")]
    figure = verification.draw_verification(verification.curves_of(runs))
    assert [axes.get_xlim()[1] for axes in figure.axes[1::2]] == [3, 3]  # the row without CMC shares the axis
    assert "one (no CMC)" in [text.get_text() for text in figure.axes[3].texts]
    saved(figure)
    saved(verification.draw_verification(verification.curves_of([run_of("one", list=without)])))


@pytest.mark.slow
def test_other_lists_of_the_same_size_are_told_apart(listed, tmp_path):
    order = np.random.default_rng(0).permutation(60)
    for name, path in (("first", listed), ("second", rewritten(listed, tmp_path / "other", order))):
        write_run(tmp_path / name, {"trained": {"list": evaluate(path)}}, lr=0.1)
    different = "The runs were evaluated on different data"
    assert different in report([tmp_path / "first", tmp_path / "second"], tmp_path / "page.html").text
    assert different not in report([tmp_path / "first", tmp_path / "first"], tmp_path / "page.html").text
