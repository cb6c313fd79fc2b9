"""What a report says of the machine it was made on, and what of that leaves the machine: names, never the folders they
are in. And its command, which someone will copy into a shell."""

import re
import shlex
from pathlib import PureWindowsPath

from lowbit.guards.lenient import mapping

_PROGRAMS = ("lowbit", "torchrun")
# Options whose value is a pattern or a word: a slash in it is no folder
_PATTERNS = ("--override", "--ignore", "--redo", "--option", "--scale-search")


def recorded_command(text) -> list[str] | None:
    """The words of the command in a report; None for what is no command of lowbit, whoever wrote it there."""
    try:
        words = shlex.split(text) if isinstance(text, str) else []
    except ValueError:  # a quote that is not closed
        return None
    return words if words[:1] and words[0] in _PROGRAMS and ("lowbit" in words[:6]) else None


def public_command(text, known: set[str]) -> list[str] | None:
    """The same without folders. known: what looks like a path in it and is a name on the Hub."""
    words, option = recorded_command(text), ""
    if words is None:
        return None
    shown = []
    for word in words:
        name, separator, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if (name or option).replace("_", "-") not in _PATTERNS:
            value = without_folders(value, known)
        shown.append(name + separator + value)
        option = word if word.startswith("-") else ""
    return shown


def without_folders(text: str, known: set[str] = frozenset()) -> str:
    """The last part of a path; a name on the Hub stays, also with its `:config` or `, split`."""
    if re.split("[:,]", text)[0] in known or not ("/" in text or "\\" in text):
        return text
    return PureWindowsPath(text).name  # which knows both kinds of slashes


def public_report(report: dict, known: set[str]) -> dict:
    """A copy of `lowbit_report.json` that names no folders."""
    public = dict(report)
    if isinstance(source := report.get("source"), str):
        public["source"] = without_folders(source, known)
    if report.get("command"):
        words = public_command(report["command"], known)
        public["command"] = None if words is None else shlex.join(words)
    for key, fields in {"calibration": ("source",), "quality": ("dataset", "reference")}.items():
        if found := mapping(report.get(key)):
            names = {name: found[name] for name in fields if isinstance(found.get(name), str)}
            public[key] = found | {name: without_folders(value, known) for name, value in names.items()}
    return public
