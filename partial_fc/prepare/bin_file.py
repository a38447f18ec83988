"""InsightFace's verification sets, lfw.bin and its like: a pickle of (images, same), read without unpickling.

The two images of a pair follow each other in `images`, encoded bytes each; `same` has one truth value a pair.
Unpickling a file calls whatever it names. Here its instructions are read one by one, and only lists, tuples, bytes,
strings and numbers come of them; a call that it asks for is written down, not made, which is enough to find the bytes
in an array of NumPy's. Time and memory are proportional to the file's size, whatever is in it.
"""

import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_STRINGS = {"BINSTRING", "SHORT_BINSTRING"}  # Python 2's: bytes, which pickletools gives as latin-1
_PLAIN = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "INT"}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
_NUMBER = 8  # bytes that a number of NumPy's has at most
_OF_LENGTH = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False)
class _Call:
    """A call that the file asks for, and the state that it sets in its result."""

    name: Any
    arguments: Any
    state: Any = None
    found: bytes | None = None  # what `_bytes` found in it: a call may be named many times


def read_bin(file: Path, called: object = None) -> tuple[list[bytes], list[bool]]:
    """The encoded images, two for each pair, and whether a pair is of one identity. All of it is in memory.

    Written by Python 2 or 3, protocol 2 or later; images as bytes or as arrays of them. Raises ValueError for another
    or a damaged file, which they call `called`.
    """
    path = file if called is None else called
    try:
        value = _value(file.read_bytes())
        if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], list)):
            raise ValueError("it does not hold a list of images and one of truth values")
        images = [_bytes(image) for image in value[0]]
        same = _truths(value[1], len(images) // 2)
    except ValueError as error:
        why = str(error)
    except (TypeError, LookupError, AttributeError, RecursionError):
        why = "its instructions do not fit together"
    else:
        if len(images) != 2 * len(same):
            raise ValueError(f"{path} has {len(images)} images for {len(same)} pairs, wanted two for each")
        return images, same
    raise ValueError(
        f"{path} is no verification set as InsightFace's lfw.bin: {why}. Wanted a pickle of (images, same), of "
        "protocol 2 or later: bytes, two a pair, and true or false; if it was cut short or damaged, copy it again"
    )


def _value(data: bytes) -> Any:
    """What the pickle holds, calls as _Call."""
    stack: list = []
    marks: list[int] = []  # lengths of the stack
    memo: dict[int, Any] = {}
    room = len(data)  # for what calls make of strings: each may be named many times
    for opcode, argument, place in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        elif name == "STOP":
            break
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _BYTES:
            stack.append(bytes(argument))
        elif name in _STRINGS:
            stack.append(argument.encode("latin-1"))
        elif name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name in ("APPENDS", "TUPLE"):
            start = marks.pop()
            values = stack[start:]
            del stack[start:]
            if name == "APPENDS":
                stack[-1].extend(values)
            else:
                stack.append(tuple(values))
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
            call = _Call(*stack[-2:])
            if call.name == "encode":  # of protocol 2 by Python 3: bytes as a string, latin1
                room -= len(call.arguments[0])
                if room < 0:
                    raise ValueError("it makes more bytes than it has")
                call = call.arguments[0].encode("latin-1")
            stack[-2:] = [call]
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        else:
            raise ValueError(f"it has {name} at byte {place}, which no list of images of protocol 2 or later needs")
    (value,) = stack
    return value


def _bytes(value: Any) -> bytes:
    """The bytes of a value that holds some: bytes, or an array or a number of NumPy's."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, _Call):
        if value.found is None and value.state is not None:  # _reconstruct, then version, shape, dtype, order, data
            value.found = _bytes(value.state[-1])
        elif value.found is None and value.name == "_frombuffer":  # data, dtype, shape, order
            value.found = _bytes(value.arguments[0])
        elif value.found is None and value.name == "scalar":  # dtype, data
            value.found = _bytes(value.arguments[1])
        if value.found is not None:
            return value.found
    raise ValueError(f"it has {'a call' if isinstance(value, _Call) else type(value).__name__} where bytes were wanted")


def _truths(same: Any, count: int) -> list[bool]:
    """From a list of truth values or whole numbers, of Python's or NumPy's, or an array of `count`."""
    if isinstance(same, list):
        return [_truth(one if isinstance(one, int) else _number(_bytes(one))) for one in same]
    data = _bytes(same)
    size = len(data) // max(count, 1)  # of a number
    if not size or size * count != len(data) or size > _NUMBER:
        raise ValueError(f"it has {count} pairs of images and an array of {len(data)} bytes for them")
    return [_truth(_number(data[start : start + size])) for start in range(0, len(data), size)]


def _number(data: bytes) -> int:
    if len(data) > _NUMBER:
        raise ValueError(f"it has {len(data)} bytes where a number was wanted")
    return int.from_bytes(data, "little")


def _truth(number: int) -> bool:
    if number not in (0, 1):
        raise ValueError(f"it has {number} where true or false was wanted")
    return number == 1
