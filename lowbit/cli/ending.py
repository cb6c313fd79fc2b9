"""How a command ends: what it could not do is one line on standard error, and an exit code."""

import errno
import signal
import sys
from contextlib import contextmanager

from lowbit.errors import LowbitError, first_line
from lowbit.guards import escape

INTERRUPTED = 130  # what typer turns a KeyboardInterrupt into

# `kill`, and a terminal that is closed
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# What torch, C++ and the loader of shared libraries say where memory is short
_NO_MEMORY = (
    "allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "map segment from",
)


@contextmanager
def one_line_errors():
    """Errors inside that a user can act on become a line and an exit code: 1 could not do it, 2 wrong usage."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _end("interrupted, nothing was left half-made", 1)
    except SystemExit as exit:
        if exit.code == INTERRUPTED:
            _end("interrupted, nothing was left half-made", 1)
        raise
    except Exception as error:
        words = _words(error)
        if words is None:
            raise
        _end(f"error: {words}", getattr(error, "exit_code", 1))


def _end(words: str, code: int) -> None:
    print(escape.terminal(f"lowbit: {words}"), file=sys.stderr)
    raise SystemExit(code) from None


def _words(error: Exception) -> str | None:
    """None for what nobody has expected: its traceback is for us."""
    if isinstance(error, LowbitError):
        return str(error)
    text = str(error)
    short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if short or any(words in text for words in _NO_MEMORY):
        return f"there is not enough memory ({first_line(error)}): free some, or raise the limit of this process"
    if isinstance(error, ImportError):
        return f"a package cannot be imported: {first_line(error)}"
    return None


def end_on_signals() -> None:
    """`kill` and a closed terminal end a run as Ctrl-C does: staged folders are removed."""
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)


def ignore_signals() -> None:
    """From here on the program ends by itself."""
    for number in (*_ENDING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _terminate(signum, frame):
    """A KeyboardInterrupt only stops an answer."""
    ignore_signals()
    raise SystemExit(INTERRUPTED)


@contextmanager
def interrupted_once():
    """The first Ctrl-C ends the work inside; further ones do not disturb the cleaning up."""

    def interrupt(signum, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)
