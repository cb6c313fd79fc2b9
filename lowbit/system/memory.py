"""Memory of the process."""

import ctypes
import sys


def return_freed() -> None:
    """Give freed memory back to the system. glibc keeps a heap for every thread that ever allocated, full of holes:
    after the walks of a layer these hold gigabytes that nobody uses, and after a model is laid out for a backend more
    than the model, because the buffers that stay lie between tensors that did not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
