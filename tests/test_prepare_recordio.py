"""RecordIO: tests/insightface.rec was written by MXNet 1.9.1, in the layout of InsightFace's files."""

import hashlib
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from partial_fc import cli
from partial_fc.data.reader import images_in_order
from partial_fc.data.shards import verify
from partial_fc.prepare.images import LeftOut, Source, examine_all
from partial_fc.prepare.recordio import MAGIC, REASONS, RecordFile, _images, prepare_recordio
from tests.http_store import serving
from tests.test_prepare_folder import dropped, put, stored

REC = Path(__file__).parent / "insightface.rec"
# What MXNet was given: seven images by hash, with their labels. The third ends in two magic words and is in four parts,
# the fourth has two labels, the sixth is a PNG. After them the header with the ranges, and three ranges:
#   from mxnet.recordio import IRHeader, MXIndexedRecordIO, pack
#   file = MXIndexedRecordIO("insightface.idx", "insightface.rec", "w")
#   for i, (label, image) in enumerate(images, start=1):
#       file.write_idx(i, pack(IRHeader(0, label, i, 0), image))
#   file.write_idx(0, pack(IRHeader(2, [8.0, 11.0], 0, 0), b""))
#   for i, ends in enumerate([[1.0, 4.0], [4.0, 6.0], [6.0, 8.0]], start=8):
#       file.write_idx(i, pack(IRHeader(2, ends, i, 0), b""))
IMAGES = {
    "f2146b19078c776d": "0",
    "f82f76048ebbb246": "0",
    "73436a5bb5b37749": "0",
    "af00d090abcee7ff": "1",
    "0e0bb017f8deef6c": "1",
    "940a7f8d7010dc44": "3",
    "a5807a578f76df67": "3",
}


def record(data: bytes, label: float = 0.0, flag: int = 0, part: int = 0) -> bytes:
    data = struct.pack("<IfQQ", flag, label, 0, 0) + data
    return MAGIC + struct.pack("<I", part << 29 | len(data)) + data + b"\0" * (-len(data) % 4)


def hashes(index) -> dict[str, str]:
    return {hashlib.sha256(data).hexdigest()[:16]: name for data, name in stored(index).items()}


def test_a_file_of_mxnet(tmp_path, capsys):
    index = prepare_recordio(REC, tmp_path / "out")
    assert hashes(index) == IMAGES
    assert index.classes() == ["0", "1", "3"] and index.prepared["image_size"] == [16, 12]
    assert set(index.prepared["dropped"]) == set(REASONS) and dropped(index) == {"not_an_image": 4}
    assert "7 images of 3 identities; left out: 4 not_an_image (insightface.rec@5600, …)" in capsys.readouterr().out
    verify(index)
    (batch,) = images_in_order(index, np.arange(7), 7, 0)
    assert batch.images.shape == (7, 3, 16, 12)


def test_a_folder_with_its_train_rec(tmp_path):
    """As it is published; another order with another seed, the same with the same."""
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "train.rec").write_bytes(REC.read_bytes())
    indexes = [
        prepare_recordio(tmp_path / "faces", tmp_path / f"out{i}", seed=seed) for i, seed in enumerate((0, 0, 1))
    ]
    assert indexes[0].fingerprint == indexes[1].fingerprint != indexes[2].fingerprint
    assert hashes(indexes[2]) == IMAGES


@pytest.mark.parametrize("source", ["faces/train.rec", "faces"])
def test_behind_a_url(tmp_path, source):
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "train.rec").write_bytes(REC.read_bytes())
    with serving(tmp_path) as store:
        store.faults["faces/train.rec"] = ["short"]
        index = prepare_recordio(f"{store.url}/{source}", tmp_path / "out")
        assert hashes(index) == IMAGES and index.prepared["source"] == f"{store.url}/faces/train.rec"
        (tmp_path / "faces" / "train.rec").write_bytes(REC.read_bytes()[:-5])
        with pytest.raises(ValueError, match=rf"{store.url}/faces/train.rec ends at byte \d+, in the record at byte"):
            prepare_recordio(f"{store.url}/faces", tmp_path / "cut")
        with pytest.raises(FileNotFoundError, match=f"cannot read {store.url}/none/train.rec"):
            prepare_recordio(f"{store.url}/none", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "out"]


def test_an_image_that_begins_with_the_magic_word_is_one(tmp_path):
    """Its first part is the header alone; what follows is no image that OpenCV knows."""
    first = MAGIC + struct.pack("<I", 1 << 29 | 24) + struct.pack("<IfQQ", 0, 2.0, 0, 0)
    (tmp_path / "train.rec").write_bytes(REC.read_bytes() + first + MAGIC + struct.pack("<I", 3 << 29 | 4) + b"abcd")
    index = prepare_recordio(tmp_path, tmp_path / "out")
    assert dropped(index) == {"not_an_image": 4, "undecodable": 1} and hashes(index) == IMAGES


def test_sizes_and_small_identities(tmp_path):
    index = prepare_recordio(REC, tmp_path / "out", size=(8, 8), min_samples=3)
    assert index.classes() == ["0"] and index.num_samples == 3
    assert index.prepared["encoded_anew"] == 3 and dropped(index) == {"not_an_image": 4, "too_few_samples": 4}
    assert index.prepared["dropped_identities"] == 2


def test_repeated_images_stay_and_undecodable_ones_go(tmp_path):
    image = put(tmp_path / "0.png", 0)
    (tmp_path / "train.rec").write_bytes(
        record(image, 5) + record(image, 5) + record(image, 4) + record(b"no image", 4) + record(b"", 9)
    )
    index = prepare_recordio(tmp_path, tmp_path / "out")
    assert index.classes() == ["4", "5"] and np.bincount(index.label).tolist() == [1, 2]
    assert dropped(index) == {"not_an_image": 1, "undecodable": 1}
    with pytest.raises(
        ValueError,
        match="left out: 1 not_an_image .train.rec@1912., 1 undecodable .*, 3 too_few_samples .*. Wanted records",
    ):
        prepare_recordio(tmp_path, tmp_path / "more", min_samples=3)


def test_equal_to_a_folder_of_the_same_images(tmp_path):
    """Numbers sort as numbers: class 10 comes after class 9."""
    data = b""
    for label in range(11):
        data += record(put(tmp_path / "folder" / f"{label:02d}" / "0.png", label), label)
    (tmp_path / "train.rec").write_bytes(data)
    ours = prepare_recordio(tmp_path, tmp_path / "out")
    assert ours.classes() == [str(label) for label in range(11)]
    from_folder = {int(name): data for data, name in stored(ours).items()}
    assert from_folder == {label: (tmp_path / "folder" / f"{label:02d}" / "0.png").read_bytes() for label in range(11)}


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    """But between two records; between two parts of one it is an error too."""
    data = REC.read_bytes()
    with RecordFile(REC) as file:
        ends = [offset for offset, _, _ in file.records()]
    assert len(ends) == 11
    lengths = {end + more for end in [*ends, len(data)] for more in range(-5, 45)} | set(range(1, len(data), 97))
    for length in sorted(lengths & set(range(1, len(data)))):
        (tmp_path / "train.rec").write_bytes(data[:length])
        with RecordFile(tmp_path / "train.rec") as file:
            if length in ends:
                assert len(list(file.records())) == ends.index(length)
                continue
            with pytest.raises(ValueError, match="ends at byte|breaks off at byte"):
                list(file.records())


def test_parts_of_no_record_are_an_error(tmp_path):
    image = put(tmp_path / "0.png", 0)
    whole, first, further, last = (record(image, part=part) for part in range(4))
    for wrong in (whole + further, whole + last, first + whole, first + first, first + further, last):
        (tmp_path / "train.rec").write_bytes(wrong)
        with pytest.raises(ValueError, match="breaks off at byte"):
            prepare_recordio(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"PK\3\4" + bytes(100), "no record begins at byte 0; wanted a .rec file of MXNet"),
        (record(b"x") + b"\0" * 8, "no record begins at byte 36"),
        (record(b"x") + MAGIC, "ends at byte 40, in the record at byte 36"),
        (MAGIC + struct.pack("<I", 4) + b"abcd", "the record at byte 0 has no header of 24 bytes"),
        (MAGIC + struct.pack("<I", 5 << 29 | 4) + b"abcd", "no record begins at byte 0; wanted"),
        (record(b"x", -1.0), "has label -1.0; wanted the number of its class, below 16777216"),
        (record(b"x", 0.5), "has label 0.5"),
        (record(b"x", float("nan")), "has label nan"),
        (record(b"x", float("inf")), "has label inf"),
        (record(b"x", 2.0**24), "has label 16777216.0"),
        (record(b"x", flag=1), "the record at byte 0 has 25 bytes, too few for 1 labels"),
        (record(b"x" * 50, flag=1000), "the record at byte 0 has 74 bytes, too few for 1000 labels"),
        (b"", "has no image to use; left out: nothing"),
    ],
)
def test_damaged_files_and_labels_are_errors(data, message, tmp_path):
    (tmp_path / "train.rec").write_bytes(data)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        prepare_recordio(tmp_path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["train.rec"]


def test_memory_of_an_image(tmp_path):
    """What is kept of each until the last one is written."""
    image, count = put(tmp_path / "0.png", 0, (2, 2)), 5000
    (tmp_path / "train.rec").write_bytes(b"".join(record(image, i) for i in range(count)))
    left_out = LeftOut()
    with RecordFile(tmp_path / "train.rec") as file:
        tracemalloc.start()
        where = Source(file.image, None, str)
        files = list(_images(file, where, left_out))
        images = examine_all(files, where, left_out, digests=False, keep_damaged=False)
        order = list(range(count))
        kept = tracemalloc.get_traced_memory()[0] / count
        tracemalloc.stop()
    assert len(images) == len(order) == count
    print(f"{kept:.0f} bytes an image")
    assert 100 < kept < 500


def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*arguments) -> None:
        monkeypatch.setattr("sys.argv", ["partial-fc", "prepare", "recordio", *map(str, arguments)])
        cli.main()

    run(REC, tmp_path / "out", "--min-samples", 3, "--size", "16x12")
    assert "3 images of 1 identities" in capsys.readouterr().out
    for arguments, message in (
        ((REC, tmp_path / "out"), "delete it, or choose another"),
        ((tmp_path / "nowhere.rec", tmp_path / "new"), "nowhere.rec is no file; give the .rec file, or a folder"),
        ((tmp_path, tmp_path / "new"), "train.rec is no file; give the .rec file"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert message in end.value.code and "\n" not in end.value.code
