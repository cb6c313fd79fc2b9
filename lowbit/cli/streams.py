"""Standard input, output and error as a command finds them: closed, into a pipe that closes, onto a full disk."""

import errno
import os
import sys
from contextlib import contextmanager

from lowbit.errors import OutputError

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


@contextmanager
def dependable_streams():
    """Inside, all three streams are there, and writing to them has one meaning.

    A closed stream is an empty one: nothing comes, and what goes there is dropped. A reader of the results that goes
    away (`lowbit inspect ... | head`) has all that it wants, and ends the command with exit code 0; what cannot be
    written elsewhere is an OutputError. Notes that nobody reads any more do not disturb the work.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            setattr(sys, name, _opened(number, mode))
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Results(sys.stdout), _Notes(sys.stderr)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()  # while what goes wrong is still told in our words
        finally:
            sys.stdout, sys.stderr = before


def _opened(number: int, mode: str):
    """The null device under the number of a standard stream: else the next file that is opened would have it."""
    stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - for as long as the process runs
    try:
        os.fstat(number)
    except OSError:
        os.dup2(stream.fileno(), number)
    return stream


class _Stream:
    """A text stream whose errors of writing are those of `_failed`."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:  # a terminal that knows few letters
            return self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            return self._failed(error)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> int:
        raise NotImplementedError

    def _drop_what_follows(self) -> None:
        """What the stream holds back still, it would try to write at the end of the program."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


class _Results(_Stream):
    def _failed(self, error: OSError) -> int:
        self._drop_what_follows()
        if isinstance(error, BrokenPipeError) or error.errno == errno.EPIPE:
            raise SystemExit(0)
        raise OutputError(f"cannot write to standard output: {error.strerror}") from None


class _Notes(_Stream):
    def _failed(self, error: OSError) -> int:
        self._drop_what_follows()
        return 0
