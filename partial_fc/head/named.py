"""What a config names: a class by its name, its fields by theirs, with errors that give the key."""

import difflib
import importlib
import importlib.util
import types
import typing
from dataclasses import MISSING, fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar, cast

from partial_fc.files import shortened

T = TypeVar("T")


def choose(
    by_name: dict[str, type[T]],
    name: str,
    kind: str,
    key: str,
    base: type[T] | None = None,
    trust_code: bool = False,
) -> type[T]:
    """The class called `name`, or, of a name with a dot, that of another module, which is to be a subclass of `base`.

    trust_code: whether that module may be imported, which runs it; the config that names it may be somebody else's.
    Raises ValueError, for the config's `key`, naming what there is of this `kind`.
    """
    if name in by_name:
        return by_name[name]
    if base is not None and "." in name:
        if not trust_code:
            raise ValueError(
                f"{key}: {shortened(name)} is code outside of partial_fc, which training imports, and other commands "
                "only with --trust-code: give it if you trust that module"
            )
        return _imported(name, key, base)
    nearest = difflib.get_close_matches(name, by_name, n=1)
    own = "" if base is None else ", and your own as module.Class"
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(by_name)}{own}"
    raise ValueError(f"{key}: no {kind} is called {name!r}; {hint}")


def _imported(name: str, key: str, base: type[T]) -> type[T]:
    module, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), last)
    except Exception as error:  # whatever somebody's module raises
        raise ValueError(
            f"{key}: {name!r} cannot be imported ({type(error).__name__}: {error}); give module.Class, with the "
            "module's folder in PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base) and "__dataclass_fields__" in vars(found)):
        raise ValueError(
            f"{key}: {name!r} is {found!r}; wanted a subclass of {base.__name__}, below "
            "@dataclass(frozen=True, kw_only=True)"
        )
    return found


def source_of(name: str) -> Path | None:
    """The file of a name with a dot, module.Class; None for other names and where there is none. Imports nothing."""
    module = name.rpartition(".")[0]
    found, place, before = None, None, ""
    for part in module.split(".") if module else ():
        before = f"{before}.{part}" if before else part
        try:
            found = importlib.util.find_spec(part) if place is None else PathFinder.find_spec(before, place)
        except (ImportError, ValueError):
            return None
        if found is None:
            return None
        place = found.submodule_search_locations or []
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def fill(chosen: type[T], name: str, parameters: dict[str, Any], key: str) -> T:
    """The dataclass called `name` with `parameters`, which stand below the config's `key`.

    Raises ValueError for a parameter that it does not have, that is not of its type, or that it lacks.
    """
    types_of, all_fields = typing.get_type_hints(chosen), fields(cast(Any, chosen))
    known = {field.name: types_of[field.name] for field in all_fields if field.init}
    for parameter in parameters:
        if parameter not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"{key}.{parameter}: {name} has no such parameter; it has {has}")
    for field in all_fields:
        if field.init and field.name not in parameters and field.default is field.default_factory is MISSING:
            raise ValueError(f"{key}.{field.name}: {name} has no default for it; give one")
    return chosen(**{one: read(f"{key}.{one}", value, known[one]) for one, value in parameters.items()})


def read(key: str, value: Any, kind: Any) -> Any:
    """The value of a field of type `kind`: float, int, bool, one of them or None, or a number or a word of a Literal.

    Raises ValueError, for the config's `key`, where it is something else.
    """
    choices = typing.get_args(kind) or (kind,)
    words = [word for choice in choices for word in typing.get_args(choice)]  # of a Literal
    if value is None and types.NoneType in choices or isinstance(value, str) and value in words:
        return value
    if bool in choices:
        if not isinstance(value, bool):
            raise ValueError(f"{key}: got {value!r}; wanted true or false")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)  # YAML reads 3e-1 as text
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key}: got {value!r:.80}; wanted {' or '.join(['a number', *words])}") from None
    return int(number) if int in choices and number.is_integer() else number
