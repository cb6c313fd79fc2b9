"""Prefetch of a model's weights into the page cache."""

import os
from functools import cache
from pathlib import Path
from threading import Thread

_CHUNK = 2**20  # stays in the processor's cache: the copied bytes are not used


@cache
def read_ahead(folder: Path) -> None:
    """Start a thread that reads the weights of a folder into the page cache, once per process, while the main thread
    imports, builds the model and packs weights. Errors are ignored: the reader that needs the file reports them."""
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
