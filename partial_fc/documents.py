"""Small files that someone else may have made: of bounded size, JSON or UTF-8, and errors that name the file.

Without pydantic: what the head alone reads is read by this module, too. `schema` has the rest.
"""

import json
from pathlib import Path
from typing import Any

from partial_fc.files import open_regular, read_at_most

MIB = 1 << 20


def read_bytes(path: Path, most: int, *, pipes: bool = False) -> bytes:
    """The bytes of a file. Raises ValueError for more than `most` and for what is no file, OSError without one.

    pipes: as `files.open_regular`.
    """
    with open_regular(path, pipes=pipes) as file:
        data = read_at_most(file, most)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, which is the limit: is it the right file?")
    return data


def read_text(path: Path, most: int, *, pipes: bool = False) -> str:
    """The text of a file in UTF-8, otherwise as `read_bytes`."""
    return text_of(read_bytes(path, most, pipes=pipes), path)


def text_of(data: bytes, name: object) -> str:
    """Raises ValueError, which names `name`, for what is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def parse_json(data: bytes, name: object) -> Any:
    """The values. Raises ValueError, which names `name`, for what is no JSON in UTF-8."""
    text = text_of(data, name)
    try:
        values = json.loads(text)
        if "\\ud" in text.lower():  # half a character, which no file or page can hold
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{name} is no JSON that can be read: too many lists or objects in each other") from None
    except ValueError as error:  # of integers with more than 4,300 digits, too
        raise ValueError(f"{name} is no JSON: {error}") from None
    return values
