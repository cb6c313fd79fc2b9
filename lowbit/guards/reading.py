"""Files that strangers wrote: opened only where they are regular files, parsed only where what comes of it is bounded.

The limits are far above what real checkpoints hold (300,000 tensors, 50 MB of JSON) and keep a file of 100 MB from
becoming gigabytes in memory.
"""

import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import cast

from lowbit.errors import InputError, first_line

MOST_BYTES = 100_000_000
# Lists, objects and what commas part in them: each takes some 60 bytes once it is parsed
MOST_VALUES = 8_000_000


def open_regular(path: Path, buffering: int = -1) -> BufferedReader:
    """Open a file for reading bytes. A pipe would be waited for, and a device may never end.

    Raises OSError as `open` does, InputError for what is no regular file.
    """
    _check_regular(path, os.stat(path).st_mode)
    # the file may be exchanged in between: opened without waiting, and looked at again
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    # a FileIO where nothing is buffered, which has all that is used of it
    file = cast(BufferedReader, os.fdopen(os.open(path, flags), "rb", buffering=buffering))
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except InputError:
        file.close()
        raise
    return file


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a pipe, a socket or a device; expected a regular file, refusing to open it")


def check_regular_files(folder: Path) -> None:
    """Of a model folder: what lies there is opened by other packages too, by names of their own.

    Raises InputError for a pipe, a socket or a device; hidden ones are nobody's."""
    for inner in (folder, folder / "additional_chat_templates"):
        with suppress(OSError), os.scandir(inner) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a link to nowhere
                    mode = entry.stat().st_mode
                    if not entry.name.startswith(".") and not stat.S_ISDIR(mode):
                        _check_regular(Path(entry.path), mode)


def read_bytes(path: Path, missing: str | None = None, most: int = MOST_BYTES) -> bytes:
    """All of a file. missing: what to say where there is none. Raises InputError."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(missing or f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    if len(data) > most:
        raise InputError(f"{path} is longer than {most:,} bytes: refusing to read it")
    return data


def read_json(path: Path, missing: str | None = None) -> object:
    """The JSON value in a file, which may be any. missing: what to say where there is no file. Raises InputError."""
    return parse_json(read_bytes(path, missing), str(path))


def parse_json(data: bytes, what: str, most: int = MOST_VALUES, pairs_hook: Callable | None = None) -> object:
    """The JSON value that UTF-8 bytes spell. Its strings are Unicode: they can be printed, written and looked up.

    Args:
        what: The name of the bytes, for the error.
        most: How many values it may have.
        pairs_hook: Of `json.loads`, makes an object of its pairs.

    Raises:
        InputError: For what is no JSON, or has more values.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > most:
        raise InputError(f"{what} holds more than {most:,} values: refusing to read it")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs_hook)
        if b"\\ud" in data or b"\\uD" in data:  # half of a surrogate pair is no character, though JSON can spell it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not valid JSON: {first_line(error)}") from None
    return value
