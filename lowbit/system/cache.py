"""Where lowbit keeps what it has made once and can make again."""

import os
from pathlib import Path

CACHE_VARIABLE = "LOWBIT_CACHE"


def cache_root() -> Path:
    """The folder that LOWBIT_CACHE names, or that of the user."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
