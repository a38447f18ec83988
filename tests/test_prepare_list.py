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


def faces(folder: Path) -> list[tuple[str, str]]:
    """Four files and their identities; two identities have the same name in two places."""
    rows = [(f"{root}/{person}/0.png", person) for root in "AB" for person in ("0001", "0002")]
    for seed, (name, _) in enumerate(rows):
        put(folder / name, seed)
    return rows


def write(folder: Path, lines: list[str]) -> Path:
    (folder / "list.txt").write_text("\n".join(lines))
    return folder / "list.txt"


def test_equal_names_in_two_places_are_warned_of(tmp_path, capsys):
    rows = faces(tmp_path)
    index = prepare_list(write(tmp_path, [f"{name},{person}" for name, person in rows]), tmp_path / "out")
    assert index.classes() == ["0001", "0002"] and index.num_samples == 4
    wanted = "2 identities have folders of their name in several places: 0001 under A and B; 0002 under A and B. If"
    assert f"warning: {tmp_path / 'list.txt'}: {wanted}" in capsys.readouterr().out
    for name, lines in (
        ("apart", [f"{name},{name[:6]}" for name, _ in rows]),
        ("other names", [f"{name},{'xy'[i % 2]}" for i, (name, _) in enumerate(rows)]),
        ("one place", [f"{name},{person}" for name, person in rows[:2]] + ["A/0001/more/1.png,0001"]),
    ):
        prepare_list(write(tmp_path, lines), tmp_path / name)
        assert "warning" not in capsys.readouterr().out, name


@pytest.mark.parametrize(
    ("header", "row", "columns"),
    [
        ("file,identity", "{file},{person}", None),
        ("Image_Path\tclass name", "{file}\t{person}", None),
        ("label,filename", "{person},{file}", None),
        ("index,person,photo,age", "{i},{person},{file},7", None),
        (None, "{person} {file}", "identity,image"),
        (None, "{i},{file},{i},{person}", "index,image,other,identity"),
        ("id,file,label", "{i},{file},{person}", "index,image,identity"),
    ],
)
def test_columns(tmp_path, header, row, columns, capsys):
    rows = faces(tmp_path)
    lines = [row.format(i=i, file=file, person=person) for i, (file, person) in enumerate(rows)]
    columns = columns and columns.split(",")
    index = prepare_list(write(tmp_path, [header, *lines] if header else lines), tmp_path / "out", columns=columns)
    assert sorted(index.name(i) for i in range(4)) == [file for file, _ in rows] and dropped(index) == {}
    assert index.classes() == ["0001", "0002"]
    assert ("line 1 names the columns; taken: image from column" in capsys.readouterr().out) == (header is not None)


def test_a_list_of_im2rec(tmp_path):
    """Its labels are numbers: class 2 comes before class 10, as in the .rec file made of it."""
    rows = faces(tmp_path)
    labels = (10, 2, 10, 0)
    lines = [f"{i}\t{label:f}\t{file}" for i, (label, (file, _)) in enumerate(zip(labels, rows, strict=True))]
    index = prepare_list(write(tmp_path, lines), tmp_path / "out")
    assert index.classes() == ["0", "2", "10"] and index.num_samples == 4
    label_of = {index.name(i): int(index.classes()[index.label[i]]) for i in range(4)}
    assert label_of == {file: label for label, (file, _) in zip(labels, rows, strict=True)}
    for label in ("0.5", "nan", "-1", "x"):
        with pytest.raises(ValueError, match=f"line 5: got the label {label}, wanted the number of a class, .* --col"):
            prepare_list(write(tmp_path, [*lines, f"4\t{label}\t{rows[0][0]}"]), tmp_path / "other")


def test_columns_that_are_not_meant(tmp_path):
    rows = faces(tmp_path)
    swapped = write(tmp_path, [f"{person},{file}" for file, person in rows])
    with pytest.raises(
        ValueError,
        match="list.txt, line 1: got the image '0001', which is no file, and the identity "
        "'A/0001/0.png', which is one: the second column holds the files; swap .* --columns identity,image",
    ):
        prepare_list(swapped, tmp_path / "out")
    with pytest.raises(ValueError, match="the column of identities holds the files"):
        prepare_list(
            write(tmp_path, [f"{file},{person}" for file, person in rows]),
            tmp_path / "out",
            columns=["identity", "image"],
        )
    for columns in (["image"], ["image", "image", "identity"], ["file", "identity"]):
        with pytest.raises(ValueError, match="got the columns .*, wanted image,identity in the list's order"):
            prepare_list(swapped, tmp_path / "out", columns=columns)
    with pytest.raises(ValueError, match="names the columns id, file, label in its first line, wanted one each"):
        prepare_list(write(tmp_path, ["id,file,label", "1,A/0001/0.png,x"]), tmp_path / "out")
    with pytest.raises(ValueError, match="line 1: got 'a,b,c', wanted image, identity, .*; which of more columns"):
        prepare_list(write(tmp_path, ["a,b,c"]), tmp_path / "out")
    (tmp_path / "file").write_bytes((tmp_path / rows[0][0]).read_bytes())
    assert prepare_list(write(tmp_path, ["file,label"]), tmp_path / "out").classes() == ["label"]  # a file of that name
    assert not (tmp_path / "other").exists()
