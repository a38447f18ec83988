"""Names and files that somebody else made: checked before anything is done with them, shown so that they do no harm."""

import hashlib
import os
import reprlib
import stat
import unicodedata
from io import BufferedReader
from pathlib import Path
from typing import IO

MAX_PIXELS = 1 << 27  # of an image: 134 million, 400 MB decoded; the largest common cameras have 108 million
MOST_NAME_BYTES = 255  # of a file, in every file system that we know
_HARMLESS = "\n\t\u200c\u200d"  # the last two join letters in Persian, in Indian scripts, in emoji
_AT_ONCE = 1 << 20  # bytes of a file
_REPR = reprlib.Repr()  # does not write out what it then cuts
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlevel = 3


class NoFile(ValueError):
    """Something else than a regular file in a file's place."""


def open_regular(path: str | os.PathLike, *, pipes: bool = False) -> BufferedReader:
    """Opens a file to read. Raises NoFile, a ValueError that names it, for a folder, and for a pipe or a device.

    pipes: opens those too, as of `<(command)`. In a folder from elsewhere a pipe would block, and a device has no end.
    """
    if "\0" in str(path):
        raise NoFile(f"{shortened(str(path))} is no name of a file: it has a null byte")
    # a pipe that nobody writes to does not block when it is opened so
    descriptor = os.open(path, os.O_RDONLY | (0 if pipes else os.O_NONBLOCK))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise NoFile(f"{path} is a folder, wanted a file")
        if not (pipes or stat.S_ISREG(mode)):
            raise NoFile(f"{path} is no regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_at_most(file: IO[bytes], most: int | None) -> bytes:
    """All bytes; of more than `most` the first most + 1.

    Piece by piece: a server's answer may come in parts, and one large read takes its memory in advance.
    """
    data = bytearray()
    while most is None or len(data) <= most:
        piece = file.read(_AT_ONCE if most is None else min(_AT_ONCE, most + 1 - len(data)))
        if not piece:
            break
        data += piece
    return bytes(data)


def sha256_of(path: Path) -> str:
    """64 hexadecimal digits. Raises NoFile for what is no regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | str, *, lasting: bool = False) -> None:
    """Writes a file that is there as a whole or not at all: its sibling <name>.partial, renamed. Text is UTF-8.

    lasting: waits for the disk, so that a loss of power leaves the file.
    """
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        if lasting:
            file.flush()
            os.fsync(file.fileno())
    temporary.rename(path)
    if lasting:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def plain_name(name: object, file: object, field: str) -> str:
    """`name` itself, if it is the name of a file right in a folder: no path, no control characters.

    file, field: where the name was read, for the error. Raises ValueError for anything else.
    """
    good = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\")
        and one_line(name) == name
        and len(name.encode()) <= MOST_NAME_BYTES
    )
    if not good:
        raise ValueError(
            f"{file}: {field}: got {shortened(name)}, wanted the plain name of a file in its folder: it is damaged, or "
            "not to be trusted"
        )
    return str(name)


def printable(text: object) -> str:
    """Text for a console: control characters, which a terminal obeys, are escaped, and so are bytes that are no UTF-8.

    Line breaks and tabs stay: a message may have several lines.
    """
    return "".join(_escaped(letter) for letter in str(text))


def one_line(text: object, most: int | None = None) -> str:
    """The same for a name: on one line; most: of so many characters."""
    text = str(text) if most is None else str(text)[: most + 1]
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def shortened(value: object, most: int = 80) -> str:
    """repr() of something that may be long, without control characters."""
    return one_line(_REPR.repr(value), most)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that is no UTF-8, as Python's file names have it
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if letter in _HARMLESS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
