"""`prepare index`: shards that others wrote, compared with what webdataset reads of them."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from webdataset import ShardWriter, WebDataset

from partial_fc import cli
from partial_fc.data.shards import Index, load_index, verify
from partial_fc.prepare import tars
from partial_fc.prepare.tar_members import split_key
from partial_fc.prepare.tar_places import shard_places
from partial_fc.prepare.tars import prepare_index


def image(seed: int, extension: str = "png", size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return cv2.imencode(f".{extension}", pixels)[1].tobytes()


def write(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def indexed(source: Path | str, **options) -> Index:
    out = Path(str(source).split("{")[0].rstrip("/") + ".out")
    index = prepare_index(str(source), out, workers=1, **options)
    verify(index)
    return index


def stored(index: Index) -> dict[str, tuple[bytes, str]]:
    """Bytes and class name of each sample, by its name."""
    found, classes = {}, index.classes()
    for i in range(index.num_samples):
        data = index.read(i)
        assert index.intact(i, data)
        found[index.name(i)] = data, classes[index.label[i]]
    return found


def left_out(index: Index) -> dict[str, str]:
    file = index.path / "left_out.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
    return {row["name"]: row["reason"] for row in rows}


def assert_as_webdataset(index: Index, files: list[Path], extension: str, label: str) -> None:
    read = WebDataset([str(file) for file in files], shardshuffle=False)
    wanted = {f"{one['__key__']}.{extension}": (one[extension], one[label]) for one in read}
    found = {name.lower(): (data, of) for name, (data, of) in stored(index).items()}
    assert found.keys() == {name.lower() for name in wanted}
    for name, (data, of) in wanted.items():
        text = json.loads(of)["person"]["id"] if label == "json" else of.decode()
        assert found[name.lower()] == (data, text)


@pytest.mark.parametrize("kind", ["jpg and cls", "png and json"])
def test_what_shard_writer_writes(tmp_path, kind):
    """Key and label as webdataset itself gives them back; integers that name classes, texts that name people."""
    with ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            person = "βγα"[i % 3]
            if kind == "jpg and cls":
                writer.write({"__key__": f"{i:04d}", "jpg": image(i, "jpg"), "cls": str(i % 3)})
            else:
                writer.write({"__key__": f"p/{i:04d}", "png": image(i), "json": {"person": {"id": person}}})
    files = sorted(tmp_path.glob("*.tar"))
    index = indexed(f"{tmp_path}/set-{{000..002}}.tar", label=None if kind == "jpg and cls" else "person.id")
    extension, label = ("jpg", "cls") if kind == "jpg and cls" else ("png", "json")
    assert_as_webdataset(index, files, extension, label)
    assert index.classes() == (["0", "1", "2"] if kind == "jpg and cls" else sorted("βγα"))
    assert index.shard_names == [file.name for file in files] and index.samples_per_shard.tolist() == [4, 4, 2]
    assert index.prepared["image_size"] == [8, 8] and left_out(index) == {}


@pytest.mark.slow
def test_gnu_tar_and_a_folder_for_a_label(tmp_path):
    if shutil.which("tar") is None:
        pytest.skip("not run: no tar here")
    deep = "a" * 90 + "/" + "b" * 90  # longer than a header's name
    for i, name in enumerate(["ada/1.png", "ada/2.PNG", "bob/1.webp", f"{deep}/1.jpeg"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i, name.rpartition(".")[2].lower()))
    os.link(tmp_path / "photos" / "ada" / "1.png", tmp_path / "photos" / "bob" / "2.png")
    os.symlink("1.webp", tmp_path / "photos" / "bob" / "3.webp")
    (tmp_path / "photos" / "README").write_text("about")
    for form in ("gnu", "pax"):
        subprocess.run(
            ["tar", "--format", form, "--sort=name", "-cf", tmp_path / f"{form}.tar", "-C", tmp_path / "photos", "."],
            check=True,
        )
        index = indexed(tmp_path / f"{form}.tar")
        found = {name.removeprefix("./"): of.removeprefix("./") for name, (_, of) in stored(index).items()}
        assert found == {"ada/1.png": "ada", "ada/2.PNG": "ada", "bob/1.webp": "bob", f"{deep}/1.jpeg": deep}
        assert left_out(index) == {"./bob/2.png": "link", "./bob/3.webp": "link", "./README": "no_key"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_is_left_out_is_named(tmp_path, form):
    """All that a sample may lack, of one shard whose other samples are used."""
    file = write(
        tmp_path / "set.tar",
        [
            ("__meta__/info.json", b"{}"),
            ("x/s0.jpg", image(0, "jpg")), ("x/s0.cls", b"0\n"), ("x/s0.npy", b"more"),
            ("x/s1.JPG", image(1, "jpg")), ("x/s1.json", b'{"label": 3}'),
            ("s2.0.png", image(2)), ("s2.0.cls", b"1"),
            ("s3.jpg", image(3, "jpg")),
            ("s4.jpg", image(4, "jpg")), ("s4.jpg", image(5, "jpg")), ("s4.cls", b"0"),
            ("s5.png", b"no image"), ("s5.cls", b"0"),
            ("s6.png", image(6)), ("s6.jpg", image(6, "jpg")), ("s6.cls", b"0"),
            ("s7.png", image(7, size=(8, 9))), ("s7.cls", b"0"),
            ("s8.png", image(8)), ("s8.cls", b"\n"),
            ("s9.png", image(9)), ("s9.json", b'{"label": [1]}'),
            ("s10.png", image(10)), ("s10.cls", b"\xff"),
            ("../s11.webp", image(11, "webp")), ("../s11.txt", b"2"),
        ],
        format=form,
    )  # fmt: skip
    index = indexed(file)
    assert {name: of for name, (_, of) in stored(index).items()} == {
        "x/s0.jpg": "0", "x/s1.JPG": "3", "../s11.webp": "2"
    }  # fmt: skip
    assert index.num_classes == 4 and index.prepared["empty_classes"] == 1
    assert left_out(index) == {
        "s2": "no_image", "s3.jpg": "no_label", "s4": "duplicate_key", "s5": "undecodable", "s6": "several_images",
        "s7.png": "other_size", "s8": "bad_label", "s9": "bad_label", "s10": "bad_label",
    }  # fmt: skip
    by_last_dot = prepare_index(str(file), tmp_path / "last", last_dot=True, workers=1)
    assert stored(by_last_dot)["s2.0.png"][1] == "1" and by_last_dot.prepared["empty_classes"] == 0


def test_keys_are_split_as_webdataset_splits_them():
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "x/a.jpg", "x.y/a.0.JPG", "./a.b", ".hidden", "x/.hidden.jpg", "a", "x/", "x/a.", "../a.png"):
        key, extension = base_plus_ext(name)
        assert split_key(name, False) == (key, "" if key is None else extension.lower()), name
    assert split_key("x.y/a.0.PNG", True) == ("x.y/a.0", "png")


def test_integers_are_classes_and_gaps_can_be_closed(tmp_path):
    file = write(
        tmp_path / "set.tar", [(f"{i}.{kind}", data) for i in (0, 3, 9) for kind, data in
        (("png", image(i)), ("txt", str(i).encode()))],
    )  # fmt: skip
    with pytest.raises(ValueError, match="7 of 10 classes would have no image: .* up to 9, 3 different .*--close-gaps"):
        prepare_index(str(file), tmp_path / "out", workers=1)
    index = prepare_index(str(file), tmp_path / "out", close_gaps=True, workers=1)
    assert index.classes() == ["0", "3", "9"] and index.label.tolist() == [0, 1, 2]


def test_a_killed_run_goes_on_and_changed_shards_are_read_again(tmp_path, monkeypatch):
    for n in range(3):
        write(tmp_path / f"{n}.tar", [("a.png", image(n)), ("a.cls", b"0"), ("b.png", image(n + 5)), ("b.cls", b"1")])
    read = []
    scan = tars.scan_shard

    def scanned(file: Path, options: tars.Options, place: Path) -> tars.Scan:
        read.append(file.name)
        if file.name == "2.tar" and len(read) == 3:
            raise KeyboardInterrupt
        return scan(file, options, place)

    monkeypatch.setattr(tars, "scan_shard", scanned)
    with pytest.raises(KeyboardInterrupt):
        prepare_index(str(tmp_path), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    os.utime(tmp_path / "1.tar", (1, 1))
    index = prepare_index(str(tmp_path), tmp_path / "out", workers=1)
    assert read == ["0.tar", "1.tar", "2.tar", "1.tar", "2.tar"]
    assert index.num_samples == 6 and not (tmp_path / "out.partial").exists() and not (index.path / "scans").exists()


def test_shards_are_found_by_every_way_and_called_alike(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "0.tar", [(f"{folder}.png", image(ord(folder))), (f"{folder}.cls", folder.encode())])
    (tmp_path / "list.json").write_text('{"shardlist": [{"url": "a/0.tar", "nsamples": 1}, {"url": "b/0.tar"}]}')
    wanted = [tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"]
    ways = (f"{tmp_path}/{{a,b}}/0.tar", f"{tmp_path}/*/0.tar", f"{tmp_path}/a::{tmp_path}/b", f"{tmp_path}/list.json")
    assert all(shard_places(way) == wanted for way in ways)
    index = prepare_index(ways[0], tmp_path / "out", workers=1)
    assert index.shard_names == ["shard-000000.tar", "shard-000001.tar"] and index.classes() == ["a", "b"]
    for bad, message in (("none.tar", "is no file, as 1 of 1"), ("{0..2}.tar", "3 of 3"), ("*.none", "names no shard")):
        with pytest.raises(FileNotFoundError, match=message):
            shard_places(f"{tmp_path}/{bad}")
    for text in ("{", "[]", '{"shardlist": [{}]}', '{"shardlist": 3}'):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(ValueError, match="list.json"):
            shard_places(f"{tmp_path}/list.json")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-11_000], "set.tar is no whole tar: unexpected end of data"),
        (lambda data: b"<html>" * 2000, "set.tar is no whole tar: invalid header"),
        (lambda data: b"", "set.tar is no whole tar: empty file"),
        (lambda data: data.replace(b"a.cls", b"b.cls"), "set.tar is no whole tar: damaged or cut off at byte"),
        (lambda data: data[: data.index(b"a.cls")], "set.tar is no whole tar: damaged or cut off at byte"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, damage, message):
    file = write(tmp_path / "set.tar", [("a.png", image(0, size=(80, 80))), ("a.cls", b"0")])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        prepare_index(str(file), tmp_path / "out", workers=1)


def test_images_of_many_sizes_are_an_error(tmp_path):
    members = [
        (f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", image(i, size=(8, 8 + i))), ("cls", b"0"))
    ]
    write(tmp_path / "set.tar", members)
    with pytest.raises(ValueError, match="images of 3 sizes .* wanted one that most have"):
        prepare_index(str(tmp_path / "set.tar"), tmp_path / "out", workers=1)


@pytest.mark.slow
def test_the_command_reads_shards_side_by_side(tmp_path, monkeypatch, capsys):
    for n in range(3):
        write(tmp_path / f"{n}.tar", [(f"{n}.png", image(n)), (f"{n}.cls", b"0"), ("x.png", b""), ("x.cls", b"0")])
    arguments = ["partial-fc", "prepare", "index", f"{tmp_path}/{{0..2}}.tar", str(tmp_path / "out"), "--workers", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    cli.main()
    assert "3 images of 1 identities in 3 shards; left out: 3 undecodable (x, …)" in capsys.readouterr().out
    assert [load_index(tmp_path / "out").name(i) for i in range(3)] == ["0.png", "1.png", "2.png"]
