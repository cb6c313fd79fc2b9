"""How much memory a calibrated run takes: measured, and predicted from shapes before it begins."""

import resource
import sys
from pathlib import Path

import torch

from lowbit.quantization.plan import Step

# float32 matrices the size of the weight that a solver holds at a time, and float64 matrices the size of its Hessian
_WEIGHTS_AT_A_TIME, _HESSIANS_AT_A_TIME = 6, 5


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


def expected_peak(steps: list[list[Step]], streams: int, itemsize: int, hessians: bool) -> int:
    """Bytes: what is held now, the largest layer as each stream has it and its stored form, and a solver at work on its
    largest matrix; without what `held_between_stages` says. itemsize: of the dtype that layers compute in. hessians:
    whether the solver has them."""

    def layer(group: list[Step]) -> int:
        weights = sum(step.source.numel for step in group)
        inputs = max((step.site.in_features for step in group), default=0)
        largest = max((step.site.in_features * step.site.out_features for step in group), default=0)
        solver = 4 * _WEIGHTS_AT_A_TIME * largest + 8 * _HESSIANS_AT_A_TIME * inputs**2 * hessians
        return (streams * itemsize + 2) * weights + solver

    return peak_memory() + max(map(layer, steps), default=0)


def held_between_stages(steps: list[list[Step]], tokens: int, streams: int, itemsize: int, hidden_size: int) -> int:
    """Bytes that the open walks of all streams hold at the widest point of a layer: its input, the residual, and what
    the widest linear is called with."""
    widest = max((step.site.in_features for group in steps for step in group), default=0)
    return streams * tokens * (widest + 2 * hidden_size) * itemsize
