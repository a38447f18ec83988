"""InsightFace's verification sets, lfw.bin and its like: a pickle of (images, same), read without unpickling.

The two images of a pair follow each other in `images`, encoded bytes each; `same` has one truth value a pair.
Unpickling a file calls whatever it names. Here its instructions are read one by one, and only lists, tuples, bytes,
strings and numbers come of them; a call that it asks for is written down, not made, which is enough to find the bytes
in an array of NumPy's.
"""

import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

AGAIN = "if it was cut short or damaged, copy it again"
_MARK = object()
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_STRINGS = {"BINSTRING", "SHORT_BINSTRING"}  # Python 2's: bytes, which pickletools gives as latin-1
_PLAIN = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "INT"}
_OF_LENGTH = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False)
class _Call:
    """A call that the file asks for, and the state that it sets in its result."""

    name: Any
    arguments: Any
    state: Any = None


def read_bin(path: Path) -> tuple[list[bytes], list[bool]]:
    """The encoded images, two for each pair, and whether a pair is of one identity. All of it is in memory.

    Written by Python 2 or 3, protocol 2 or later; images as bytes or as arrays of them. Raises ValueError for another
    or a damaged file.
    """
    with path.open("rb") as file:
        try:
            images, same = _value(file)
            images, same = [_bytes(image) for image in images], _truths(same)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no verification set as InsightFace's lfw.bin, a pickle of (images, same): {error}; {AGAIN}"
            ) from error
    if len(images) != 2 * len(same):
        raise ValueError(f"{path} has {len(images)} images for {len(same)} pairs, wanted two for each")
    return images, same


def _value(file: BinaryIO) -> Any:
    """What the pickle holds, calls as _Call."""
    stack: list = []
    memo: dict[int, Any] = {}
    for opcode, argument, place in pickletools.genops(file):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        elif name == "STOP":
            break
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _BYTES:
            stack.append(bytes(argument))
        elif name in _STRINGS:
            stack.append(argument.encode("latin-1"))
        elif name in _PLAIN:
            stack.append(argument)
        elif name in ("NEWTRUE", "NEWFALSE", "NONE"):
            stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "APPENDS":
            values = _since_mark(stack)
            stack[-1].extend(values)
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in _OF_LENGTH:
            start = len(stack) - _OF_LENGTH[name]
            stack[start:] = [tuple(stack[start:])]
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(argument.split(" ")[-1])
        elif name == "STACK_GLOBAL":
            stack[-2:] = stack[-1:]
        elif name == "REDUCE":
            stack[-2:] = [_Call(*stack[-2:])]
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        else:
            raise ValueError(f"it has {name} at byte {place}, which no list of images needs")
    (value,) = stack
    return value


def _since_mark(stack: list) -> list:
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _bytes(value: Any) -> bytes:
    """The bytes of a value that holds some: bytes, or an array or a number of NumPy's."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, _Call):
        if value.state is not None:  # _reconstruct, then version, shape, dtype, order, data
            return _bytes(value.state[-1])
        if value.name == "_frombuffer":  # data, dtype, shape, order
            return _bytes(value.arguments[0])
        if value.name == "scalar":  # dtype, data
            return _bytes(value.arguments[1])
        if value.name == "encode":  # of protocol 2 by Python 3: bytes as a string, latin1
            return value.arguments[0].encode("latin-1")
    raise ValueError(f"got {type(value).__name__} where bytes were wanted")


def _truths(same: Any) -> list[bool]:
    """From a list of truth values, of Python's or NumPy's, or an array of bytes."""
    if not isinstance(same, list):
        return [byte != 0 for byte in _bytes(same)]
    return [bool(one) if isinstance(one, int) else _bytes(one) != b"\0" for one in same]
