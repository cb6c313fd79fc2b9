"""Regular expressions that a checkpoint names modules by: whatever stands in them, matching ends.

A pattern is one of Python's `re`, compiled by it first. It is matched by the `regex` package, a backtracking engine
like `re` that stops when its time is up; that is counted in time of the processor, so that the load of a machine does
not matter. What is an exact name, as lowbit writes them, is compared and not matched.
"""

import re
import time
import warnings
from collections.abc import Iterable

import regex

from lowbit.errors import InputError
from lowbit.guards.records import shown

# A real pattern takes some microseconds
MATCH_SECONDS = 0.5
# All matches of one set of patterns together: 100,000 modules and a hundred real patterns take less
TOTAL_SECONDS = 20.0
_LONGEST = 20_000  # characters


class Patterns:
    """Regexes in the order in which they are tried, each matched from the start of a name.

    Raises InputError, beginning with `where`, for what is no regular expression.
    """

    def __init__(self, patterns: Iterable[str], where: str):
        self._where, self._spent = where, 0.0
        self._exact: dict[str, int] = {}
        self._regexes: list[tuple[int, str, regex.Pattern]] = []
        for place, pattern in enumerate(patterns):
            name = _exact_name(pattern)
            if name is None:
                self._regexes.append((place, pattern, self._compiled(pattern)))
            else:
                self._exact.setdefault(name, place)

    def first(self, names: Iterable[str]) -> int | None:
        """The place of the first pattern that matches any of `names`.

        Raises InputError, naming the pattern, where that takes too long."""
        names = list(names)
        exact = min((self._exact[name] for name in names if name in self._exact), default=None)
        for place, pattern, compiled in self._regexes:
            if exact is not None and exact < place:
                break
            if any(self._matches(pattern, compiled, name) for name in names):
                return place
        return exact

    def _matches(self, pattern: str, compiled: regex.Pattern, name: str) -> bool:
        started = time.thread_time()
        try:
            return compiled.match(name, timeout=max(min(MATCH_SECONDS, TOTAL_SECONDS - self._spent), 1e-9)) is not None
        except (TimeoutError, MemoryError):
            raise InputError(
                f"{self._where}: {shown(pattern)} takes too long to match {shown(name)}: simplify the pattern"
            ) from None
        finally:
            self._spent += time.thread_time() - started

    def _compiled(self, pattern: str) -> regex.Pattern:
        reason = f"it has {len(pattern):,} characters, at most {_LONGEST:,} are read" * (len(pattern) > _LONGEST)
        try:
            if not reason:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of sets that a later Python may read otherwise
                    re.compile(pattern)
                    return regex.compile(pattern)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            reason = str(error)
        raise InputError(f"{self._where}: {shown(pattern)} is not a regular expression: {reason}") from None


def _exact_name(pattern: str) -> str | None:
    """The one name that a pattern of the form ^name$ matches, None if it may match others."""
    if not pattern.startswith("^") or not pattern.endswith("$"):
        return None
    escaped = pattern[1:-1]
    name = re.sub(r"\\([^A-Za-z0-9])", r"\1", escaped)
    return name if re.escape(name) == escaped else None
