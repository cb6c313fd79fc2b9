"""JSON that strangers wrote, as typed objects: whatever it holds, it fits the dataclass, or an error says why not.

A dataclass says by its annotations what an object may hold: `str`, `int`, `float`, `bool`, `object` (anything), lists,
tuples and dicts of those, other dataclasses, and unions. Keys that it does not name are passed over.
"""

import math
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lowbit.errors import InputError

T = TypeVar("T")
_SHOWN = 200  # characters of what was found
_NAMES = {
    str: ("a string", "strings"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    dict: ("an object", "objects"),
    list: ("a list", "lists"),
    tuple: ("a list", "lists"),
    type(None): ("null", "null"),
    object: ("any value", "any values"),
}


class _Mismatch(Exception):
    """The value at `path` is not what was expected."""

    def __init__(self, path: str, found: object, expected: str):
        super().__init__(path)
        self.path, self.found, self.expected = path, found, expected


def record(kind: type[T], value: object, where: str) -> T:
    """A JSON value as a `kind`, which is a dataclass or what its fields are annotated with.

    Args:
        where: The file, or the part of it, that the value comes from: the error begins with it.

    Raises:
        InputError: In one line, naming the path to the first value that does not fit, what was expected and found.
    """
    try:
        return _as(kind, value, "")
    except _Mismatch as error:
        place = error.path.removeprefix(".") or "it"
        raise InputError(f"{where}: {place} is {shown(error.found)}; expected {error.expected}") from None


def shown(value: object) -> str:
    """A JSON value in few characters, all of them ASCII: none of them moves a cursor or ends a line."""
    if value is MISSING:
        return "missing"
    try:
        text = ascii(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _as(kind: Any, value: Any, path: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return _one_of(kind, value, path)
    base: Any = get_origin(kind) or kind
    if not _is(base, value):
        raise _Mismatch(path, value, _described(kind))
    if is_dataclass(base):
        return _object(base, value, path)
    arguments = get_args(kind)
    if base in (list, tuple) and arguments:
        return base(_as(arguments[0], item, f"{path}[{number}]") for number, item in enumerate(value))
    if base is dict and arguments:
        return {key: _as(arguments[1], item, f"{path}.{_key(key)}") for key, item in value.items()}
    return value


def _object(kind: Any, value: dict, path: str) -> Any:
    known = ((name, rest) for name, rest in _fields(kind).items() if _has(rest, value))
    return kind(**{name: _field(*rest, value=value, path=path) for name, rest in known})


def _is(base, value) -> bool:
    if base is object:
        return True
    if is_dataclass(base):
        return isinstance(value, dict)
    if base is tuple:
        return isinstance(value, list)
    if base is int:  # beyond it nothing that is counted makes sense, and torch and C count in it
        return type(value) is int and -(2**63) <= value < 2**63
    if base is float:
        return _is(int, value) or (type(value) is float and math.isfinite(value))
    return isinstance(value, base)


def _one_of(kind, value, path: str):
    """The first alternative that fits; of those that do not, the one that got furthest says why."""
    deepest = None
    for alternative in get_args(kind):
        try:
            return _as(alternative, value, path)
        except _Mismatch as error:
            if error.path != path and (deepest is None or len(error.path) > len(deepest.path)):
                deepest = error
    raise deepest or _Mismatch(path, value, _described(kind))


@cache
def _fields(kind: Any) -> dict[str, tuple[str, Any, bool]]:
    """Name of a field -> (key in JSON, annotation, whether it has to be there)."""
    hints = get_type_hints(kind)
    return {
        field.name: (
            field.metadata.get("key", field.name),
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
        if field.init
    }


def _has(entry: tuple[str, Any, bool], value: dict) -> bool:
    key, _, required = entry
    return required or key in value


def _field(key: str, kind, required: bool, value: dict, path: str):
    return _as(kind, value.get(key, MISSING), f"{path}.{key}")


def _key(key: str) -> str:
    return key if key.isidentifier() else shown(key)


def _described(kind, many: bool = False) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_described(alternative, many) for alternative in get_args(kind))
    base, arguments = get_origin(kind) or kind, get_args(kind)
    name = _NAMES[dict if is_dataclass(base) else base][many]
    if arguments and arguments[-1 if base is dict else 0] is not object:
        return f"{name} of {_described(arguments[-1 if base is dict else 0], many=True)}"
    return name
