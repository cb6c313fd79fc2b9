# SPDX-License-Identifier: Apache-2.0
"""How long kernels take, measured so that caches do not flatter: every call reads another copy of the weight.

On a GPU the calls are one CUDA graph: launching from Python takes longer than many of these kernels run.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_REPLAYS = 7
# The weights that are read in turn are together at least so many times the L2 cache
_TIMES_L2 = 4


def copies_for(weight_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many copies of a weight it takes, for the cache to hold nothing of one when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, -(-_TIMES_L2 * cache // weight_bytes)))


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> tuple[float, float]:
    """(median, spread) of the time of one call; spread is (slowest - fastest) / median over replays."""
    for call in calls[:2]:
        call()  # compiles, allocates
    if device.type == "cuda":
        times = _graph_replays(calls, device)
    else:
        times = [_wall(calls)]
    median = statistics.median(times)
    return median / len(calls) * 1e6, (max(times) - min(times)) / median


def _wall(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def _graph_replays(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each replay of a graph of all calls."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()  # what a stream keeps for itself exists before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return times
