"""Where a step runs: called each time, or captured once in a CUDA graph and replayed; and how its tokens come back."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

_WARMUPS = 2  # kernels are compiled and workspaces allocated by then


class RepeatableStep(Protocol):
    """What is repeated: `filled` counts the positions of its cache of `length`, of which `set_visible` says how many
    the steps to come are to see."""

    filled: int
    length: int

    def __call__(self) -> None: ...

    def set_visible(self, visible: int) -> None: ...


class Graphs(Protocol):
    """How a step is repeated.

    path: how the statistics call it. lag: steps that are made before the tokens of one are read.
    """

    path: str
    lag: int

    def capture(self, step: RepeatableStep, generator: torch.Generator) -> Callable[[], None]: ...

    def fetch(self, tokens: torch.Tensor) -> Callable[[], list[int]]: ...


class Eager:
    """Calls the step, and waits for its tokens."""

    path = "static loop"
    lag = 0  # steps that are made before a token is read

    def capture(self, step: RepeatableStep, generator: torch.Generator) -> Callable[[], None]:
        return step

    def fetch(self, tokens: torch.Tensor) -> Callable[[], list[int]]:
        return tokens.tolist


class CudaGraphs:
    """Replays a captured step. Tokens are copied to pinned memory while the step after them runs."""

    path = "cuda graph"
    lag = 1

    def __init__(self, device: torch.device):
        self.device = device

    def capture(self, step: RepeatableStep, generator: torch.Generator) -> Callable[[], None]:
        """What a replay does the step has to do: `step` may neither read a tensor on the host nor change anything in
        Python. Raises RuntimeError where it does. The step has been made a few times when this returns."""
        with torch.cuda.device(self.device):
            # one stream, of this graph alone, for both: what kernels keep for a stream (the workspace of split inputs)
            # is there before the capture, and no two graphs write to it
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUPS):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=side):
                step()
        return graph.replay

    def fetch(self, tokens: torch.Tensor) -> Callable[[], list[int]]:
        pinned = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        pinned.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))

        def wait() -> list[int]:
            copied.synchronize()
            return pinned.tolist()

        return wait


class Pipeline:
    """Tokens on their way to the host, in order; a step's are read when `lag` further steps have been started."""

    def __init__(self, graphs: Graphs):
        self.graphs = graphs
        self.waiting: deque[Callable[[], list[int]]] = deque()

    def send(self, tokens: torch.Tensor) -> None:
        self.waiting.append(self.graphs.fetch(tokens))

    def receive(self, last: bool = False) -> Iterator[list[int]]:
        """Yield what is due, everything if no further step is to come: a list of B tokens for each step."""
        while len(self.waiting) > (0 if last else self.graphs.lag):
            yield self.waiting.popleft()()
