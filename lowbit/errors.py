"""Errors a user can act on. Each message says what was found, what was expected and what to do, in one line."""


def first_line(error: BaseException) -> str:
    """What an error of another package says, in one line; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


class LowbitError(Exception):
    """Base of every error lowbit raises on purpose; the CLI prints it as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(LowbitError, ValueError):
    """An option or argument that can never work, whatever the input."""

    exit_code = 2


class InputError(LowbitError):
    """The model, checkpoint or text that was given cannot be used."""


class OutputError(LowbitError):
    """The result cannot be written."""


class BackendError(LowbitError):
    """No backend can run a layer, or a backend that was asked for by name refuses it."""
