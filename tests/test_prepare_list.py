"""A list of images: the same set as a folder of them gives, with names that lists have."""

from pathlib import Path

import pytest

from partial_fc import cli
from partial_fc.data.shards import load_index, verify
from partial_fc.prepare.folder import prepare_folder
from partial_fc.prepare.listing import REASONS, prepare_list
from tests.test_prepare_folder import dropped, put, stored


def images(folder: Path) -> dict[str, str]:
    """Six files by name, with their identities: one is there twice, one under two identities, one is no image."""
    named = {}
    for i, identity in enumerate(("a", "b", "a", "c", "b", "c")):
        named[f"{identity}/{i}.{('jpg', 'png')[i % 2]}"] = identity
        put(folder / f"{identity}/{i}.{('jpg', 'png')[i % 2]}", i)
    for name, same_as in (("a/again.jpg", "a/0.jpg"), ("b/other.png", "c/3.png"), ("c/none.png", None)):
        (folder / name).write_bytes((folder / same_as).read_bytes() if same_as else b"no image")
        named[name] = name[0]
    return named


@pytest.mark.parametrize("between", ["\t", ",", " ,  ", " "])
def test_the_same_as_of_the_folder(tmp_path, between, monkeypatch, capsys):
    named = images(tmp_path / "photos")
    lines = [between.join((f"photos/{name}", identity)) for name, identity in sorted(named.items())]
    (tmp_path / "list.csv").write_bytes("\r\n".join(["", *lines, ""]).encode("utf-8-sig"))
    arguments = [
        "prepare",
        "list",
        str(tmp_path / "list.csv"),
        str(tmp_path / "out"),
        "--min-samples",
        "1",
        "--seed",
        "3",
    ]
    monkeypatch.setattr("sys.argv", ["partial-fc", *arguments])
    cli.main()
    index = load_index(tmp_path / "out")
    of_folder = prepare_folder(tmp_path / "photos", tmp_path / "of_folder", size=None, seed=3)
    assert index.fingerprint == of_folder.fingerprint
    assert dropped(index) == {"duplicate": 1, "two_identities": 2, "undecodable": 1} == dropped(of_folder)
    assert set(index.prepared["dropped"]) == set(REASONS)
    said = capsys.readouterr().out
    assert "5 images of 3 identities; left out: 1 undecodable (photos/" in said and "2 two_identities (photos/" in said
    verify(index)


def test_names_with_commas_spaces_and_places_elsewhere(tmp_path):
    put(tmp_path / "one, two.png", 0)
    put(tmp_path / "elsewhere" / "a b.jpg", 1)
    put(tmp_path / "plain.png", 2)
    text = f'"one, two.png","Doe, Jane"\n{tmp_path}/elsewhere/a b.jpg,X Æ\nplain.png,X Æ\nmissing.png,Y\n'
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    index = prepare_list(tmp_path / "list.csv", tmp_path / "out", size=(8, 8))
    assert sorted(stored(index).values()) == ["Doe, Jane", "X Æ", "X Æ"] and dropped(index) == {"unreadable": 1}
    assert index.prepared["dropped_identities"] == 1 and index.prepared["image_size"] == [8, 8]


def test_lists_that_cannot_be_used(tmp_path):
    def refused(text: str, message: str) -> None:
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            prepare_list(tmp_path / "list.txt", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    put(tmp_path / "a.png", 0)
    refused(
        "a.png x\na.png\n", "list.txt, line 2: got 'a.png', wanted image, identity, with a tab or comma between them"
    )
    refused("a.png x y\n", "line 1: got 'a.png x y', wanted image, identity")
    refused("a.png,\n", "line 1: got 'a.png,', wanted")
    refused(
        "b.png x\n",
        "list.txt has no image to use; left out: 1 unreadable .b.png.. Wanted image files that OpenCV reads",
    )
    refused("", "has no image to use; left out: nothing")
    with pytest.raises(FileNotFoundError, match="none.txt is no file; give a text with a line each: image, identity"):
        prepare_list(tmp_path / "none.txt", tmp_path / "out")
