"""Where things are kept that can be made again."""

import os
from pathlib import Path

CACHE_VARIABLE = "LOWBIT_CACHE"


def cache_folder(kind: str) -> Path:
    """The folder for things of a kind, which need not exist: in LOWBIT_CACHE, else in the user's cache folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / kind
