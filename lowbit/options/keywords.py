"""Options as fields of dataclasses: their default and their help, and functions that take them as keywords."""

import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

from lowbit.errors import UsageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Shown:
    """What is shown of an option, beside its name and default.

    help: a line or two, for Python and the command line. spelled: what else the command line says of its values.
    flags: its flags there, where they are not --its-name. typed: its type there, where that is another; read: what
    turns a value of that type into one of the field, which may raise UsageError. least, most: the bounds of numbers.
    metavar: what stands for the value. command: whether commands have it.
    """

    help: str
    spelled: str = ""
    flags: tuple[str, ...] = ()
    typed: Any = None
    read: Callable[[Any], Any] | None = None
    least: float | None = None
    most: float | None = None
    metavar: str | None = None
    command: bool = True


def option(default: Any, help: str, **shown: Any) -> Any:
    """A field of a dataclass of options. shown: the fields of `Shown`."""
    return field(default=default, metadata={"shown": Shown(help, **shown)})


def like(kind: type, name: str, default: Any = MISSING, **shown: Any) -> Any:
    """A field that is as that of another dataclass, but for its default or for what is `shown`."""
    origin = next(each for each in fields(kind) if each.name == name)
    return field(
        default=origin.default if default is MISSING else default,
        metadata={"shown": replace(origin.metadata["shown"], **shown)},
    )


def keywords(*groups: Any) -> dict[str, Any]:
    """The options of several dataclasses by name."""
    return {each.name: getattr(group, each.name) for group in groups for each in fields(group)}


def changed(*groups: Any) -> list[Field]:
    """The fields that are not what they are by default."""
    return [each for group in groups for each in fields(group) if not _is(getattr(group, each.name), each.default)]


def _is(value: Any, default: Any) -> bool:
    # 128.0 and True are something else, and tensors are not to be compared
    return value is default or (type(value) is type(default) and value == default)


def option_groups(function: Callable) -> dict[str, type]:
    """The parameters of a function that are dataclasses of options."""
    parameters = inspect.signature(function).parameters
    annotations = {name: each.annotation for name, each in parameters.items()}
    return {name: kind for name, kind in annotations.items() if isinstance(kind, type) and is_dataclass(kind)}


def takes_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function take the fields of its parameters that are dataclasses of options as keywords of its own. Its
    signature and the `Args:` of its docstring show them.

    A keyword that it does not have raises UsageError, unless it takes any.
    """
    groups, signature = option_groups(function), _spread(function)
    name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    known = [keyword for keyword in signature.parameters if keyword != "self"]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())

    @wraps(function)
    def taking(*args, **given):
        unknown = [keyword for keyword in given if keyword not in known]
        if unknown and not takes_any:
            raise UsageError(f"{name} has no option {unknown[0]!r}{_nearest(unknown[0], known)}")
        try:
            bound = signature.bind(*args, **given)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        bound.apply_defaults()
        for group, kind in groups.items():
            values = {each.name: bound.arguments.pop(each.name) for each in fields(kind)}
            bound.arguments[group] = kind(**values)
        return _called(function, bound.arguments)

    taking.__signature__ = signature  # type: ignore[attr-defined]
    taking.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    if function.__doc__:
        taking.__doc__ = documented(inspect.getdoc(function) or "", groups.values())
    return taking


def shows_options(kind: type[Result]) -> type[Result]:
    """Let the docstring of a class show the options that its `__init__` takes."""
    if kind.__doc__:  # python -OO takes it away
        groups = option_groups(inspect.unwrap(kind.__init__))
        kind.__doc__ = documented(inspect.getdoc(kind) or "", groups.values())
    return kind


def _called(function: Callable, values: dict[str, Any]) -> Any:
    """Call a function with its parameters by name, and what its **keywords are among them."""
    parameters = inspect.signature(function).parameters.values()
    others: dict[str, Any] = next((values.pop(each.name) for each in parameters if each.kind is each.VAR_KEYWORD), {})
    return function(**values, **others)


def _nearest(name: str, known: list[str]) -> str:
    found = get_close_matches(name, known, 1)
    return f": did you mean {found[0]!r}?" if found else f"; it has {', '.join(known)}"


def _spread(function: Callable) -> inspect.Signature:
    """The signature of a function, with the fields of each dataclass of options in its place."""
    groups, shown = option_groups(function), []
    for name, parameter in inspect.signature(function).parameters.items():
        shown += _parameters(groups[name], parameter.kind) if name in groups else [parameter]
    return inspect.signature(function).replace(parameters=sorted(shown, key=lambda each: each.kind))


def _parameters(kind: type, passed: Any) -> list[inspect.Parameter]:
    return [inspect.Parameter(f.name, passed, default=f.default, annotation=f.type) for f in fields(kind)]


def documented(doc: str, groups: Iterable[type]) -> str:
    """A docstring with the help of all fields in its `Args:`, behind those that are there, but before **keywords."""
    lines = doc.splitlines()
    if "Args:" not in lines:
        raise ValueError(f"no Args: in {doc!r}")
    start = lines.index("Args:")
    end = next((n for n in range(start, len(lines)) if not lines[n] or lines[n].startswith("    **")), len(lines))
    added = []
    for each in (each for group in groups for each in fields(group)):
        text = f"{each.name}: {each.metadata['shown'].help}"
        added += textwrap.wrap(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    return "\n".join([*lines[:end], *added, *lines[end:]])
