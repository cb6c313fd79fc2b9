"""A device for captured steps: streams and graphs as torch.cuda has them, on CPU tensors and the machine.

As CUDA does, a capture runs no kernel and holds addresses: what it recorded is replayed on the very same memory, with
no Python of ours between. It refuses what makes the host wait, and notes what outlives it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from machine.driver import Session, bytes_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lowbit_kernels import launching

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# What makes the host wait for a GPU; lift_fresh copies a number that torch.tensor puts there
WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::lift_fresh",
    "aten::masked_select",
}  # fmt: skip
# The same as methods: on the CPU, where this runs, these two read memory and no operator
READS = ("tolist", "numpy")


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, number: int):
        self.cuda_stream = number

    def wait_stream(self, other: "Stream") -> None:
        """Work is done as soon as it is given here."""


class HostReads(TorchFunctionMode):
    """Refuses what reads a tensor on the host and is no operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        to_cpu = name == "cpu" or (name == "to" and any(str(a) == "cpu" for a in (*args[1:], *(kwargs or {}).values())))
        if name in READS or to_cpu:
            raise RuntimeError(f"the host waits while a step is captured: Tensor.{name}")
        return func(*args, **(kwargs or {}))


@dataclass
class Operation:
    """An operator of torch. made: what it gave while it was captured."""

    function: Callable
    args: tuple
    kwargs: dict
    made: object

    def replay(self, session: Session) -> None:
        if self.function._schema.name == "aten::empty":
            session.forget(self.made)
            return
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((self.args, self.kwargs))}
        again = self.function(*self.args, **self.kwargs)
        for old, new in zip(tensors_of(self.made), tensors_of(again), strict=True):
            if new.untyped_storage().data_ptr() not in given:  # not a view, nor written in place
                old.copy_(new)


@dataclass
class KernelLaunch:
    """A launch of a kernel of ours. written, touched: (address, end) of memory, known once it was replayed."""

    function: Callable
    args: tuple
    grid: object
    kwargs: dict
    written: set[tuple[int, int]] = field(default_factory=set)
    touched: set[tuple[int, int]] = field(default_factory=set)

    def replay(self, session: Session) -> None:
        session.run(self.function, self.args, self.grid, self.kwargs)
        executed = session.executed[-1]
        for n, tensor in enumerate(executed.tensors):
            memory = executed.launch.memory
            if len(places := memory.touched[memory.piece(n)].nonzero()[0]):
                start = tensor.data_ptr()
                self.written.add((start + int(places[0]), start + int(places[-1]) + 1))
            self.touched.add((tensor.data_ptr(), tensor.data_ptr() + len(bytes_of(tensor))))


class Capture(TorchDispatchMode):
    """Records operators, also those inside of our own, and launches. Tensors are left as they were before."""

    def __init__(self, session: Session):
        super().__init__()
        self.session, self.calls = session, []
        self.made: dict[int, torch.Tensor] = {}  # by storage
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what was written to that is older, and as it was

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in WAITS:
            raise RuntimeError(f"the host waits while a step is captured: {func._schema.name}")
        if func.namespace == "lowbit_kernels":
            with self, HostReads():
                return func.redispatch(CPU, *args, **kwargs)
        self._keep(func, args, kwargs)
        made = func(*args, **kwargs)
        for tensor in tensors_of(made):
            self.made.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        self.calls.append(Operation(func, args, kwargs, made))
        return made

    def _keep(self, func, args: tuple, kwargs: dict) -> None:
        for n, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tensors_of(args[n] if n < len(args) else kwargs.get(argument.name)):
                storage = tensor.untyped_storage().data_ptr()
                if storage not in self.made and storage not in self.kept:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self.kept[storage] = whole, whole.clone()

    def launch(self, function: Callable, args: tuple, grid: object, kwargs: dict) -> None:
        self.calls.append(KernelLaunch(function, args, grid, kwargs))

    def restore(self) -> None:
        for tensor, before in self.kept.values():
            tensor.copy_(before)


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, device: "Device"):
        self.device, self.calls, self.replays = device, [], 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        """Nothing is drawn here."""

    @property
    def launches(self) -> list[KernelLaunch]:
        return [call for call in self.calls if isinstance(call, KernelLaunch)]

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            call.replay(self.device.session)
            self.device.settle()

    def shares(self, other: "Graph") -> bool:
        """Whether kernels of one write what those of the other touch: then they could not run at the same time."""

        def meet(some: set, others: set) -> bool:
            return any(a < d and c < b for a, b in some for c, d in others)

        mine, theirs = (
            tuple(set().union(*(getattr(launch, kind) for launch in graph.launches)) for kind in ("written", "touched"))
            for graph in (self, other)
        )
        return meet(mine[0], theirs[1]) or meet(theirs[0], mine[1])


class Device:
    """Stands in for torch.cuda as far as lowbit.generation.steps.graph and the launchers know it. problems: what
    launches did that they must not do, and what captures did."""

    def __init__(self, session: Session):
        self.session = session
        self.current, self.streams = Stream(0), 0
        self.capturing_stream: Stream | None = None  # of captures that name none: torch has one for all
        self.graphs: list[Graph] = []
        self.problems: list[str] = []
        self.launches = self.instructions = 0

    def new_stream(self) -> Stream:
        self.streams += 1
        return Stream(self.streams)

    def new_graph(self) -> Graph:
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, *, stream: Stream | None = None) -> Iterator[None]:
        if stream is None:
            self.capturing_stream = stream = self.capturing_stream or self.new_stream()
        before, capture = workspaces(), Capture(self.session)
        with self.stream(stream), mock.patch.object(self.session, "run", capture.launch), capture, HostReads():
            yield
        capture.restore()
        graph.calls = capture.calls
        if workspaces() != before:
            self.problems.append("a capture allocates a workspace, which only its replays would initialise")

    def settle(self) -> None:
        """Count launches, keep what was wrong, and let go of their memory."""
        for one in self.session.executed:
            self.launches += 1
            self.problems += one.problems()
            code, threads = one.launch.compiled, one.launch.executed.items()
            self.instructions += sum(len(code.instructions(segment)) * count for segment, count in threads)
        self.session.executed.clear()
        self.problems += [
            f"counters are not zero: {[int(n) for n in counters.nonzero()[:4]]}"
            for workspace in launching._workspaces.values() for counters in workspace.counters if counters.any()
        ]  # fmt: skip

    @contextlib.contextmanager
    def installed(self) -> Iterator["Device"]:
        def refuse() -> None:
            raise RuntimeError("the host waits: torch.cuda.synchronize")

        cuda = mock.patch.multiple(
            torch.cuda, Stream=self.new_stream, CUDAGraph=self.new_graph, stream=self.stream, graph=self.graph,
            device=lambda _: contextlib.nullcontext(), current_stream=lambda *_: self.current, synchronize=refuse,
        )  # fmt: skip
        streams = mock.patch.multiple(launching, stream_of=lambda _: self.current.cuda_stream, _workspaces={})
        with cuda, streams:
            yield self


def workspaces() -> dict:
    """Addresses of all buffers, by stream."""
    return {
        key: [buffer.data_ptr() for buffer in (*workspace.partials, *workspace.counters)]
        for key, workspace in launching._workspaces.items()
    }


def tensors_of(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]
