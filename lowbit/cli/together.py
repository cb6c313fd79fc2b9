"""Commands that several processes run together, started by torchrun: one model, whose weights they share."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from lowbit.errors import UsageError

Plan = TypeVar("Plan")


def shared_plan(given: Plan | None) -> "Plan | str | None":
    """The tp_plan of `lowbit.load`: auto under torchrun, where nothing else is asked for.

    Raises UsageError for a plan where there is one process only.
    """
    if "WORLD_SIZE" not in os.environ:
        if given is not None:
            raise UsageError(
                "--tp-plan shares a model among processes: torchrun --nproc-per-node N -m lowbit ... starts them"
            )
        return None
    return given if given is not None else "auto"


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def one_voice() -> Iterator[None]:
    """What the other processes show inside goes nowhere; an error that leaves is told by each, as it may be its own."""
    if is_first():
        yield
        return
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def refuse_together(command: str) -> None:
    """Raises UsageError under torchrun with several processes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{command} runs in one process: start it without torchrun")
