"""Reading the weights of a model before they are asked for."""

import os
from functools import cache
from pathlib import Path
from threading import Thread

_CHUNK = 2**20  # stays in the processor's cache: what is copied there is not looked at


@cache
def read_ahead(folder: Path) -> None:
    """Have a thread bring the weights of a folder into the system's cache, once in a process, while others import,
    build the model and lay out what is there already. Says nothing of a folder or a file that cannot be read: who needs
    it will."""
    Thread(target=_read, name="lowbit-read-ahead", args=(folder,), daemon=True).start()


def _read(folder: Path) -> None:
    buffer = bytearray(_CHUNK)
    try:
        files = sorted(folder.glob("*.safetensors"))
        if sum(file.stat().st_size for file in files) > _room():
            return  # they would push each other out again
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
    except OSError:
        return


def _room() -> int:
    """Bytes of files that a cache can hold: half of the memory, none where the system does not say how much it has."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
