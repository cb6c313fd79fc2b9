"""Memory of the process."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch


def return_freed() -> None:
    """Give freed memory back to the system. glibc keeps a heap for every thread that ever allocated, full of holes:
    after the walks of a layer these hold gigabytes that nobody uses, and after a model is laid out for a backend more
    than the model, because the buffers that stay lie between tensors that did not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def kept_by_heaps(threads: int, largest: int) -> int:
    """Bytes that an allocator may keep of what so many threads have freed, where their largest tensors have `largest`.

    glibc gives a thread a heap of its own, up to eight for a core, and leaves at the end of each what is below its
    threshold: twice the largest block that was ever given back, of 32 MiB at most. Others keep nothing that counts."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return 0
    return min(threads, 8 * (os.cpu_count() or 1)) * 2 * min(largest, 2**25)


def peak_memory() -> int:
    """Bytes: the most that this process ever held in memory (on a GPU: there)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes that can still be taken without swapping; what the container may take counts, where there is a limit."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = [int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used)]
        except (OSError, ValueError):
            continue
        free = min(free, left[0] - left[1])
    return free
