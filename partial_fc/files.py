"""Names and files that somebody else made: checked before anything is done with them, shown so that they do no harm."""

import hashlib
import reprlib
import unicodedata
from pathlib import Path

MOST_NAME_BYTES = 255  # of a file, in every file system that we know
_HARMLESS = "\n\t\u200c\u200d"  # the last two join letters in Persian, in Indian scripts, in emoji
_REPR = reprlib.Repr()  # does not write out what it then cuts
_REPR.maxstring = _REPR.maxother = 100


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


def one_line(text: object) -> str:
    """The same for a name: on one line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def shortened(value: object, most: int = 80) -> str:
    """repr() of something that may be long, without control characters."""
    text = one_line(_REPR.repr(value))
    return text if len(text) <= most else text[: most - 1] + "…"


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that is no UTF-8, as Python's file names have it
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if letter in _HARMLESS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
