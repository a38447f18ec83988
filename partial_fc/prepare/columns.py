"""A text with columns, of images and of what they are: which column holds what, and its rows."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from partial_fc.files import one_line, shortened

# What the first line may call a column, without case, spaces, - and _. Of a pair's images one more character is let by.
_CALLED = {
    "image": {"image", "images", "img", "photo", "file", "path", "filename", "filepath"}
    | {first + second for first in ("image", "img") for second in ("file", "id", "name", "path")},
    "identity": {"identity", "class", "label", "person", "subject", "id"}
    | {first + second for first in ("identity", "class", "label", "person", "subject") for second in ("id", "name")},
    "same": {"same", "issame", "match", "ismatch", "genuine", "label", "target"},
}
_MEANING = {"same": "1 for one identity or 0"}
_IM2REC = ("index", "identity", "image")


def read_rows(
    source: Path, wanted: Sequence[str], columns: Sequence[str] | None = None
) -> Iterator[tuple[int, list[str | int]]]:
    """Number, from 1, and the `wanted` fields of every line that is not empty and does not name the columns.

    wanted: of "image", "identity", "same", in the order of what is given. columns: what each column holds, another name
    for one that is skipped; None: what is wanted, or what the first line says.
    Raises FileNotFoundError without the file, and ValueError for a line with another number of fields, and for columns
    that do not hold what is wanted.
    """
    text = ", ".join(_MEANING.get(name, name) for name in wanted)
    if not source.is_file():
        raise FileNotFoundError(f"{source} is no file; give a text with a line each: {text}")
    if columns is not None and sorted(name for name in columns if name in wanted) != sorted(wanted):
        raise ValueError(
            f"got the columns {','.join(columns)}, wanted {','.join(wanted)} in the list's order, and other names for "
            "columns to skip"
        )
    given, places = columns, None
    for number, line, fields in _lines(source, text):
        if places is None:
            named = _named_columns(source, fields, wanted, given)
            if columns is None:
                columns = named or (_IM2REC if "identity" in wanted and _is_im2rec(line, fields) else wanted)
            places = _places(columns, wanted)
            if columns is _IM2REC:
                print(f"{source}: taken for a list of im2rec: index, label, file")
            if named:
                taken = (f"{name} from column {place + 1}" for name, place in zip(wanted, places, strict=True))
                print(one_line(f"{source}: line {number} names the columns; taken: {', '.join(taken)}"))
                continue
        if len(fields) != len(columns) or not all(fields[place] for place in places):
            more = f"; which of more columns to take is said by --columns, as --columns index,{','.join(wanted)}"
            raise ValueError(
                f"{source}, line {number}: got {shortened(line)}, wanted {', '.join(columns) if given else text}, with "
                f"a tab or comma between them{more if len(fields) > len(columns) else ''}"
            )
        row: list[str | int] = [fields[place] for place in places]
        yield number, [row[0], _class_number(source, number, str(row[1]))] if columns is _IM2REC else row


def _lines(source: Path, text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Number, text and fields of every line that is not empty."""
    with source.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                line = line.strip("\n")
                if line.strip():
                    between = next((character for character in "\t," if character in line), None)
                    reader = csv.reader([line], delimiter=between, skipinitialspace=True) if between else None
                    fields = line.split() if reader is None else [field.strip() for field in next(reader)]
                    yield number, line, fields
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{source} is no text in UTF-8 or CSV ({error}); wanted a line each: {text}") from error


def _named_columns(
    source: Path, fields: list[str], wanted: Sequence[str], given: Sequence[str] | None
) -> Sequence[str] | None:
    """What each column holds by the first line, None if that names no columns. What is `given` counts more."""

    def called(field: str, name: str) -> bool:
        plain = "".join(character for character in field.lower() if character not in " -_")
        return plain in _CALLED[name] or wanted.count(name) > 1 and plain[:-1] in _CALLED[name]

    if given is not None:
        here = len(fields) == len(given)
        return given if here and all(called(fields[i], given[i]) for i in _places(given, wanted)) else None
    columns = [next((name for name in wanted if called(field, name)), "") for field in fields]
    if not set(wanted) <= set(columns) or (source.parent / fields[columns.index("image")]).is_file():
        return None
    if sorted(name for name in columns if name) != sorted(wanted):
        raise ValueError(
            f"{source} names the columns {', '.join(fields)} in its first line, wanted one each for "
            f"{', '.join(wanted)}: say which with --columns, as --columns index,{','.join(wanted)}"
        )
    return columns


def _is_im2rec(line: str, fields: list[str]) -> bool:
    return len(fields) == 3 and "\t" in line and fields[0].isdecimal() and _number(fields[1]) is not None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _class_number(source: Path, number: int, label: str) -> int:
    value = _number(label)
    if value is None or not 0 <= value < 2**53 or value != int(value):
        raise ValueError(
            f"{source}, line {number}: got the label {label}, wanted the number of a class, since the first line is "
            "im2rec's (index, label, file): number the classes, or take the labels as names with "
            f"--columns {','.join(_IM2REC)}"
        )
    return int(value)


def _places(columns: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where in a line the wanted fields are; those of one name in their order."""
    of_name = {name: [place for place, column in enumerate(columns) if column == name] for name in wanted}
    return [of_name[name].pop(0) for name in wanted]
