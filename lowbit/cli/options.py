"""Options that several commands take, stated once: dataclasses whose fields typer sees as options of each command."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import get_type_hints


def grouped(function: Callable) -> Callable:
    """The command of a function whose parameters may be dataclasses of options: it has their fields as options, and
    calls the function with one of each."""
    groups = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if is_dataclass(parameter.annotation)
    }

    def command(**given):
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return function(**made, **given)

    shown = []
    for name, parameter in inspect.signature(function).parameters.items():
        shown += _fields(groups[name]) if name in groups else [parameter]
    ordered = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    command.__signature__ = inspect.Signature(ordered)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    return command


def _fields(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(kind)
    ]  # fmt: skip
