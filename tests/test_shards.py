import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from webdataset import WebDataset

from partial_fc import cli
from partial_fc.data import shards
from partial_fc.data.shards import Index, Sample, load_index, verify, write_shards

CLASSES = ["alpha", "βήτα", "丙"]
PREPARED = {"kind": "test", "image_size": [2, 2]}


def payloads(count: int) -> list[tuple[bytes, str, int]]:
    """Payloads of awkward sizes: below, at and above a tar block."""
    rng = np.random.default_rng(0)
    sizes = [1, 511, 512, 513, 1024, 2000]
    return [(rng.bytes(sizes[i % 6]), ("jpg", "png", "bmp")[i % 3], i % len(CLASSES)) for i in range(count)]


def write(out: Path, count: int = 25, **options) -> Index:
    options = {"shard_bytes": 20_000, "prepared": PREPARED, **options}
    samples = [Sample(*sample, f"photos/β{i}.jpg") for i, sample in enumerate(payloads(count))]
    return write_shards(out, samples, CLASSES, **options)


def edit_description(index: Index, **changes) -> None:
    file = index.path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_array(index: Index, name: str, sample: int, value: int) -> None:
    file = index.path / "index" / f"{name}.npy"
    values = np.load(file)
    values[sample] = value
    np.save(file, values)


def test_an_offset_and_a_size_are_the_image(tmp_path):
    index = write(tmp_path / "set")
    assert len(index.shard_names) > 2
    for i, (image, _, label) in enumerate(payloads(25)):
        with Path(index.shard_of(i)).open("rb") as file:
            assert os.pread(file.fileno(), int(index.size[i]), int(index.offset[i])) == image
        assert index.label[i] == label
        assert index.key(i) == f"{i:09d}"
        assert index.name(i) == f"photos/β{i}.jpg" and index.described(i) == f"{i:09d} (photos/β{i}.jpg)"
        assert index.crc32[i] == zlib.crc32(image) and index.intact(i, image) and not index.intact(i, image + b"x")


def test_the_index_describes_the_folder(tmp_path):
    index = write(tmp_path / "set", prepared=PREPARED | {"dropped": {"empty": 3}})
    assert (index.num_samples, index.num_classes) == (25, 3)
    assert index.classes() == CLASSES
    assert index.prepared == PREPARED | {"dropped": {"empty": 3}}
    assert sum(index.samples_per_shard) == 25
    assert sorted(path.name for path in index.path.glob("*.tar")) == index.shard_names
    for name in index.shard_names:
        assert (index.path / name).stat().st_size <= 20_000 + 10_240  # tar pads the end to 10,240 bytes
    assert isinstance(index.label, np.memmap)
    assert not (tmp_path / "set.partial").exists()


def test_permuted_class_names_are_an_error(tmp_path):
    index = write(tmp_path / "set")
    names = (index.path / "classes.txt").read_text().splitlines()
    (index.path / "classes.txt").write_text("\n".join(reversed(names)) + "\n")
    with pytest.raises(ValueError, match="classes.txt is damaged: its sha256"):
        load_index(index.path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: "{", "index.json is no JSON"),
        (lambda d: "[]", "has the format None"),
        (lambda d: "[" * 100_000, "too many lists or objects in each other"),
        (lambda d: json.dumps(d | {"shards": 7}), "index.json: shards: got 7, wanted a valid list"),
        (lambda d: json.dumps(d | {"shards": [d["shards"][0]["name"]]}), "shards.0: got 'shard-000000.tar', wanted"),
        (lambda d: json.dumps(d | {"shards": [{"samples": 1}]}), "shards.0.name is missing"),
        (lambda d: json.dumps(d | {"shards": [d["shards"][0]] * 2}), "got shard-000000.tar twice"),
        (lambda d: json.dumps(d | {"shards": [d["shards"][0] | {"bytes": "many"}]}), "shards.0.bytes: got 'many'"),
        (lambda d: json.dumps(d | {"shards": [d["shards"][0] | {"url": "file:///etc"}]}), "url: got 'file:///etc'"),
        (lambda d: json.dumps(d | {"shards": [d["shards"][0] | {"compression": "gzip"}]}), "wanted both or neither"),
        (lambda d: json.dumps(d | {"version": "two"}), "version: got 'two', wanted a valid integer"),
        (lambda d: json.dumps(d | {"arrays": ["shard"]}), "arrays: got .'shard'., wanted a valid dictionary"),
        (lambda d: json.dumps(d | {"num_samples": 2**62}), f"num_samples: got {2**62}, wanted less than {2**40}"),
        (lambda d: json.dumps(d | {"num_classes": None}), "num_classes: got None, wanted a valid integer"),
        (lambda d: json.dumps(d | {"prepared": "x"}), "prepared: got 'x', wanted a valid dictionary"),
        (lambda d: json.dumps(d | {"prepared": {"image_size": "32x32"}}), "prepared.image_size: got '32x32'"),
        (lambda d: json.dumps(d | {"prepared": {"image_size": [65536, 65536]}}), "image_size: .*at most 134,217,728 p"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "crc32_sha256"}), "crc32_sha256 is missing"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "shards"}), "index.json: shards is missing"),
        (lambda d: json.dumps(d | {"shards": [d["shards"][0] | {"name": "../x.tar"}]}), "wanted the plain name of a"),
        (lambda d: json.dumps(d | {"arrays": {"../x": ""}}), "outside its folder"),
    ],
)
def test_a_damaged_or_hostile_index_is_one_clear_error(tmp_path, damage, message):
    index = write(tmp_path / "set")
    file = index.path / "index.json"
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=message):
        load_index(index.path)


def test_a_damaged_array_names_its_file(tmp_path):
    index = write(tmp_path / "set")
    file = index.path / "index" / "label.npy"
    whole = file.read_bytes()
    huge = whole.replace(b"(25,)", b"(%d,)" % 10**15).replace(b" " * 14 + b"\n", b"\n", 1)
    shaped = []
    for shape in (f"(25, 0, {10**30})", f"({10**3000}, {10**3000})", f"(25, {'1, ' * 100})", "()", "(-1, 25)"):
        text = b"{'descr': '<i8', 'fortran_order': False, 'shape': " + shape.encode() + b", }\n"
        shaped.append(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text)
    for content in (b"garbage", whole[:100], whole[:-1], b"", whole.replace(b"'<i8'", b"'|O' "), huge, *shaped):
        file.unlink()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"label.npy (is damaged|has 10{15} rows)"):
            load_index(index.path)


def test_webdataset_reads_the_same_samples(tmp_path):
    index = write(tmp_path / "set")
    urls = [str(index.path / name) for name in index.shard_names]
    read = list(WebDataset(urls, shardshuffle=False))
    assert len(read) == 25
    for i, (sample, (image, extension, label)) in enumerate(zip(read, payloads(25), strict=True)):
        assert sample["__key__"] == f"{i:09d}"
        assert sample[extension] == image
        assert sample["cls"] == str(label).encode()


def test_equal_input_gives_equal_bytes(tmp_path):
    def digests(index: Index) -> dict[str, str]:
        files = sorted(path for path in index.path.rglob("*") if path.is_file())
        return {str(f.relative_to(index.path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    assert digests(first) == digests(second)
    assert first.fingerprint == second.fingerprint


def test_the_fingerprint_tells_data_sets_apart(tmp_path):
    fingerprints = {
        write(tmp_path / "a").fingerprint,
        write(tmp_path / "b", count=24).fingerprint,
        write(tmp_path / "c", shard_bytes=10_000).fingerprint,
        write(tmp_path / "d", arrays={"face": np.zeros(25, np.int32)}).fingerprint,
        write(tmp_path / "e", arrays={"face": np.ones(25, np.int32)}).fingerprint,
    }
    assert len(fingerprints) == 5


def test_extra_arrays_come_back(tmp_path):
    face = np.arange(25, dtype=np.int32)
    index = write(tmp_path / "set", arrays={"face": face})
    np.testing.assert_array_equal(index.extra["face"], face)


def test_a_sample_larger_than_a_shard_gets_its_own(tmp_path):
    index = write(tmp_path / "set", count=6, shard_bytes=1)
    assert index.samples_per_shard.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([(b"x", "jpg", 0), (b"x", "jpg", 3)], "sample 000000001 has the label 3, wanted 0 <= label < 3"),
        ([(b"x", "jpg", -1)], "sample 000000000 has the label -1"),
        ([(b"x", ".jpg", 0)], "extension '.jpg'"),
        ([(b"x", "cls", 0)], "extension 'cls'"),
        ([], "no samples"),
    ],
)
def test_bad_samples_are_named_and_leave_nothing(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "set", samples, CLASSES, prepared=PREPARED)
    assert list(tmp_path.iterdir()) == []


def test_bad_class_names_and_arrays_are_errors(tmp_path):
    with pytest.raises(ValueError, match="line break"):
        write_shards(tmp_path / "set", payloads(2), ["a", "b\nc"], prepared=PREPARED)
    with pytest.raises(ValueError, match="got 24 rows for array 'face', wanted one a sample: 25"):
        write(tmp_path / "set", arrays={"face": np.zeros(24)})
    with pytest.raises(ValueError, match="named 'label'"):
        write(tmp_path / "set", arrays={"label": np.zeros(25)})


def test_an_existing_folder_is_an_error_and_stays(tmp_path):
    fingerprint = write(tmp_path / "set").fingerprint
    with pytest.raises(FileExistsError, match="delete it, or choose another folder"):
        write(tmp_path / "set", count=3)
    assert load_index(tmp_path / "set").fingerprint == fingerprint


def test_what_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "shard-000099.tar").write_bytes(b"half")
    index = write(tmp_path / "set")
    assert not list(index.path.glob("shard-000099.tar"))


def test_a_folder_without_an_index_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index.json"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 4}, "format version 4, this partial_fc reads up to 3"),
        ({"format": "other"}, "has the format 'other'"),
        ({"num_samples": 26}, "has 25 rows, index.json says 26"),
        ({"arrays": {}}, "got none for the array 'shard'"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(tmp_path, changes, message):
    index = write(tmp_path / "set")
    edit_description(index, **changes)
    with pytest.raises(ValueError, match=message):
        load_index(index.path)


def test_a_truncated_shard_is_named(tmp_path):
    index = write(tmp_path / "set")
    shard = index.path / index.shard_names[1]
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(ValueError, match=rf"shard-000001.tar has {size - 1} bytes, the index says {size}"):
        load_index(index.path)


@pytest.mark.parametrize("file", ["shard-000001.tar", "index/size.npy"])
def test_a_missing_file_is_named(tmp_path, file):
    index = write(tmp_path / "set")
    (index.path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load_index(index.path)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_named_with_its_key(tmp_path, label):
    index = write(tmp_path / "set")
    edit_array(index, "label", 17, label)
    with pytest.raises(ValueError, match=f"000000017 .photos/β17.jpg. has the label {label}, wanted 0 <= label < 3"):
        load_index(index.path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shard", 99, "sample 17 is in shard number 99, there are"),
        ("shard", 0, "for sample 17, which is outside"),
        ("offset", 0, "got .* bytes at 0 of .*shard-.* for sample 17"),
        ("size", 2**30, "for sample 17, which is outside"),
    ],
)
def test_an_image_outside_its_shard_is_named(tmp_path, name, value, message):
    index = write(tmp_path / "set")
    edit_array(index, name, 17, value)
    with pytest.raises(ValueError, match=message):
        load_index(index.path)


@pytest.mark.parametrize("sample", [15, 16, 17, 24])
def test_the_checks_reach_across_their_chunks(tmp_path, monkeypatch, sample):
    monkeypatch.setattr(shards, "_CHECKED_AT_ONCE", 4)
    index = write(tmp_path / "set", shard_bytes=2**20)
    edit_array(index, "offset", sample, int(index.offset[sample - 1]))
    with pytest.raises(ValueError, match=f"for sample {sample}, .* before the end of sample {sample - 1}"):
        load_index(index.path)


def test_an_array_of_another_type_is_an_error(tmp_path):
    index = write(tmp_path / "set")
    file = index.path / "index" / "label.npy"
    np.save(file, np.load(file).astype(np.float32))
    with pytest.raises(ValueError, match=r"got float32 \(25,\) for the array 'label', wanted int64"):
        load_index(index.path)


def test_missing_class_names_are_an_error(tmp_path):
    index = write(tmp_path / "set")
    (index.path / "classes.txt").write_text("only\n")
    with pytest.raises(ValueError, match="names 1 classes, index.json says 3"):
        index.classes()


@pytest.mark.parametrize("wrong", [lambda v: v[::-1], lambda v: np.where(np.arange(25) < 12, v, 0)])
def test_other_labels_are_an_error(tmp_path, wrong):
    index = write(tmp_path / "set")
    file = index.path / "index" / "label.npy"
    np.save(file, wrong(np.load(file)))
    with pytest.raises(ValueError, match="label.npy is damaged: its sha256 is .*, the index says"):
        load_index(index.path)
    assert load_index(index.path, check_labels=False).num_samples == 25  # another rank of the node has looked


@pytest.mark.parametrize("version", [1, 2])
def test_older_versions_load(tmp_path, version):
    """Of 1, without pairs, and 2, neither with CRC32 nor names; the fingerprint is that of version 3."""
    new = write(tmp_path / "set", pairs=None if version == 1 else np.array([[0, 1, 1], [0, 2, 0]]))
    file = new.path / "index.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    for name in ("crc32", "name", "name_offset"):
        (new.path / "index" / f"{name}.npy").unlink()
        del description[f"{name}_sha256"]
    file.write_text(json.dumps(description | {"version": version}), encoding="utf-8")
    old = load_index(new.path)
    assert old.fingerprint == new.fingerprint and old.crc32 is None and (old.pairs is None) == (version == 1)
    assert old.name(3) == "" and old.described(3) == "000000003" and old.intact(3, b"anything")
    verify(old)


def test_names_are_damaged_alone(tmp_path):
    """Offsets that lead nowhere give an empty or a wrong name, never an error in the midst of a message."""
    index = write(tmp_path / "set")
    edit_array(index, "name_offset", 5, 10**12)
    assert load_index(index.path).name(5) == "" and len(load_index(index.path).name(4)) < 1000
    with pytest.raises(ValueError, match="name_offset.npy is damaged"):
        verify(index)


@pytest.mark.parametrize("file", ["shard-000001.tar", "index/label.npy", "index/crc32.npy", "index/name.npy"])
def test_verify_names_the_file_with_a_flipped_bit(tmp_path, file):
    index = write(tmp_path / "set")
    verify(index)
    path = index.path / file
    content = bytearray(path.read_bytes())
    content[-20_000 if file.endswith("tar") else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        verify(index)


def test_verify_names_all_files_and_the_samples_that_changed(tmp_path, monkeypatch, capsys):
    index = write(tmp_path / "set")
    for sample in (9, 17):
        with Path(index.shard_of(sample)).open("r+b") as file:
            file.seek(int(index.offset[sample]))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    edit_array(index, "label", 3, 1)
    monkeypatch.setattr("sys.argv", ["partial-fc", "verify", str(index.path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = str(end.value)
    assert said.startswith("error: ") and "label.npy is damaged" in said and said.count(" is damaged") == 3
    for sample in (9, 17):
        assert index.described(sample) in said


def test_a_broken_tar_header_gives_shard_and_offset_for_a_key(tmp_path):
    index = write(tmp_path / "set")
    offset = int(index.offset[17])
    with Path(index.shard_of(17)).open("r+b") as file:
        file.seek(offset - 512)
        file.write(bytes(100))
    assert index.key(17) == f"{Path(index.shard_of(17)).name}@{offset}"
