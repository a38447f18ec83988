"""YAML 1.2's core schema, without what surprises or harms: the only speaker of PyYAML.

PyYAML reads YAML 1.1, where 1e-4 is text, 1:30 is 90 and 2026-11-30 is a date. Here 1e-4 is a number, the others are
text. 28_000 is a number too, though YAML 1.2 does not have it.

These are errors:
    010                 8 in YAML 1.1, 10 in 1.2
    yes, no, on, off    truth values in YAML 1.1, text in 1.2; as a key they are text
    two equal keys      the second would replace the first, and with it a whole section
    anchors, aliases    781 bytes of them stand for more values than a machine has memory for
    tags                they ask for other types
    too much            of text, of nesting, of digits in an integer
"""

import re
from typing import Any

import yaml

BYTES = 1 << 18  # of a file: PyYAML reads 90 kB a second
DEPTH = 32  # of sections and lists in each other; a config has 5
INTEGERS = 1 << 63  # from -INTEGERS to INTEGERS - 1

_INTEGER = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
_OCTAL_ONCE = re.compile(r"[-+]?0[0-9_]+")
_TRUTH_ONCE = {**dict.fromkeys(("yes", "on"), "true"), **dict.fromkeys(("no", "off"), "false")}
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + name: float(sign + "inf") for sign in ("", "+", "-") for name in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def parse(text: str, name: object) -> Any:
    """The values in `text`; None where it is empty. Raises ValueError, which says `name`, line and what is wrong."""
    if len(text) > BYTES:
        raise ValueError(f"{name} has {len(text):,} characters, wanted at most {BYTES:,}: is it the right file?")
    loader = None
    try:
        loader = _Loader(text)  # it looks for characters that YAML does not have
        node = loader.get_single_node()
        return None if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{name}{where} is no YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())}") from None
    except _Wrong as error:
        node, problem = error.args
        raise ValueError(f"{name}, line {node.start_mark.line + 1}: {problem}") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(values: Any, **options: Any) -> str:
    """`values` as YAML that `parse`, and any reader of YAML 1.1, reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, **options)


class _Wrong(Exception):
    """A node, and what is wrong with it."""


class _Loader(yaml.BaseLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise _Wrong(event, f"{sign}{event.anchor[:60]}: anchors and aliases are not read: write the value out")
        if event.tag is not None:
            raise _Wrong(event, f"the tag {event.tag[:60]!r} is not read: leave it out, and quote what is text")
        if self.depth == DEPTH:
            raise _Wrong(event, f"more than {DEPTH} sections or lists in each other")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(one) for one in node.value]
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and (truth := _TRUTH_ONCE.get(node.value.lower())):
            raise _Wrong(node, f"{node.value} is {truth} in YAML 1.1, text in 1.2: write {truth}, or quote it")
        return _scalar(node)
    values: dict[Any, Any] = {}
    lines: dict[Any, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Wrong(key_node, "a list or a section stands where a key was wanted")
        key = _scalar(key_node)
        if key in lines:
            raise _Wrong(key_node, f"the key {key_node.value[:60]!r} is on line {lines[key]} too: make them one")
        lines[key] = key_node.start_mark.line + 1
        values[key] = _value(value_node)
    return values


def _scalar(node: yaml.Node) -> Any:
    text: str = node.value
    if node.style is not None:  # quoted, or a block of text
        return text
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _OCTAL_ONCE.fullmatch(text):
        raise _Wrong(
            node, f"{text[:30]} is octal in YAML 1.1, decimal in 1.2: leave the 0 out, or write 0o, or quote it"
        )
    if _INTEGER.fullmatch(text):
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) < 64 else INTEGERS
        if not -INTEGERS <= number < INTEGERS:
            raise _Wrong(node, f"{text[:30]} is no integer of 64 bits: quote it if it is text")
        return number
    return float(text) if _FLOAT.fullmatch(text) else text


class _Dumper(yaml.SafeDumper):
    """Quotes texts that are numbers in YAML 1.2 alone, and writes a value out wherever it occurs."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Any text that looks a number to `_scalar`; of what it looks like to YAML 1.1 PyYAML knows itself.
_Dumper.add_implicit_resolver("number of YAML 1.2", re.compile(f"(?:{_INTEGER.pattern}|{_FLOAT.pattern})$"), None)
