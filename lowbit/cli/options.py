"""Options of commands: the fields of dataclasses, which typer sees as flags of each command that takes one."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from lowbit.options.keywords import option_groups


def grouped(function: Callable) -> Callable:
    """The command of a function whose parameters may be dataclasses of options: it has their fields as flags, and calls
    the function with one of each."""
    groups = option_groups(function)

    def command(**given):
        made = {name: _read(kind, given) for name, kind in groups.items()}
        return function(**made, **given)

    shown = []
    for name, parameter in inspect.signature(function).parameters.items():
        shown += _parameters(groups[name]) if name in groups else [parameter]
    ordered = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    command.__signature__ = inspect.Signature(ordered)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    return command


def flag(kind: type, name: str) -> Any:
    """The type that makes a parameter of a command the flag of a field."""
    return _annotation(next(each for each in fields(kind) if each.name == name))


def spelled(each: Field) -> str:
    """The flag of a field."""
    flags = each.metadata["shown"].flags
    return flags[0].partition("/")[0] if flags else f"--{each.name.replace('_', '-')}"


def _in_commands(kind: type) -> list[Field]:
    return [each for each in fields(kind) if each.metadata["shown"].command]


def _read(kind: type, given: dict[str, Any]) -> Any:
    """One of the dataclass, of what typer gives for its flags, which is taken out."""
    values = {}
    for each in _in_commands(kind):
        value, read = given.pop(each.name), each.metadata["shown"].read
        if read is None:
            values[each.name] = value
        elif value:
            values[each.name] = read(value)
    return kind(**values)


def _parameters(kind: type) -> list[inspect.Parameter]:
    only = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(each.name, only, default=_default(each), annotation=_annotation(each))
        for each in _in_commands(kind)
    ]


def _default(each: Field) -> Any:
    """typer has None for what may be repeated and was not given."""
    return None if each.default == () else each.default


def _annotation(each: Field) -> Any:
    shown = each.metadata["shown"]
    kind = shown.typed or each.type
    flags = shown.flags or ((spelled(each),) if kind is bool else ())
    option = typer.Option(
        *flags,
        help=f"{shown.help} {shown.spelled}".rstrip(),
        min=shown.least,
        max=shown.most,
        metavar=shown.metavar,
        show_default=each.default not in (None, ()),
    )
    return Annotated[kind, option]
