"""What CUDA graphs are to a GPU, for CPUs: the operations of a step are recorded, and repeated on the same tensors.

Python runs for the first step only, and with it what a model does between its operations; views are made once, and
results are written where those of the first step are. As in a CUDA graph, a step may neither read a tensor on the host
nor count in Python.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import chain, groupby
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lowbit.generation.steps.graph import RepeatableStep
from lowbit.native import attention, elementwise, matmul
from lowbit.native.operators import replay, replay_experts
from lowbit.system.cores import FreeCores
from lowbit.torch_api import (
    COPY_TO,
    TorchDispatchMode,
    direct_call,
    is_composite,
    is_mutable,
    operator_name,
    out_variant,
    written_arguments,
)

_MULTIPLE = 256  # positions that a recorded step sees are rounded up to it
_READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
_LISTS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
# What is computed by one call of a kernel: operator -> (its result, its arguments) -> that call
_CALLS: dict[object, Callable[..., Callable[[], object] | None]] = {
    torch.ops.lowbit.linear_native.default: replay,
    torch.ops.lowbit.experts_native.default: replay_experts,
    torch.ops.aten.mm.default: matmul.replay,
    torch.ops.aten.scaled_dot_product_attention.default: attention.replay,
}


class Recordings:
    """Repeats a recorded step. Its tokens are there when it returns."""

    path = "recorded loop"
    lag = 0

    def capture(self, step: RepeatableStep, generator: torch.Generator) -> Callable[[], None]:
        """See `CudaGraphs`. The step has been made once when this returns. It is recorded anew when it has used up the
        positions that it sees."""
        recorded = _Recorded(step)
        recorded.record()
        return recorded

    def fetch(self, tokens: torch.Tensor) -> Callable[[], list[int]]:
        return tokens.tolist


class _Recorded:
    def __init__(self, step: RepeatableStep):
        self.step, self.sees = step, 0
        self.cores = FreeCores()
        self.calls: list[Callable[[], object]] = []

    def record(self) -> None:
        self.calls, self.sees = [], 0  # the old tensors are gone before there are new ones
        sees = min(-(-(self.step.filled + 1) // _MULTIPLE) * _MULTIPLE, self.step.length)
        self.step.set_visible(sees)
        with _NoLists(), _Recording() as recording:
            self.step()
        self.calls, self.sees = recording.calls(), sees

    def __call__(self) -> None:
        if self.step.filled >= self.sees:
            self.record()
            return
        self.step.filled += 1
        threads = torch.get_num_threads()
        free = self.cores.limit(threads)
        if free == threads:
            self._repeat()
            return
        torch.set_num_threads(free)
        try:
            self._repeat()
        finally:
            torch.set_num_threads(threads)

    def _repeat(self) -> None:
        for call in self.calls:
            call()


class _Recording(TorchDispatchMode):
    """Takes down the operations that are made under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[[], object] | _Constant | list] = []  # lists: instructions for `elementwise`
        self.changed: set[int] = set()  # memory that is written to in place

    def calls(self) -> list[Callable[[], object]]:
        """What has to be called to repeat them."""
        needed = (one for one in self.made if not isinstance(one, _Constant) or _memory(one.tensor) in self.changed)
        calls: list[Callable[[], object]] = []
        for small, run in groupby(needed, key=lambda made: isinstance(made, list)):
            made: list[Any] = [*run]
            calls += [elementwise.program([*chain.from_iterable(made)])] if small else made
        return calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator_name(func) in _READS:
            raise RuntimeError(f"the host reads a tensor in a step: {operator_name(func)}")
        if func not in _CALLS and is_composite(func):
            with self:  # the operations that it is made of
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        self.changed |= {_memory(tensor) for tensor in _written(func, args, kwargs)}
        made = _repeat(func, args, kwargs, output)
        if made is not None:
            self.made.append(made)
        return output


class _NoLists(TorchFunctionMode):
    """Refuses what hands numbers of a tensor to Python without an operation of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _LISTS:
            raise RuntimeError(f"the host reads a tensor in a step: Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Constant:
    """A tensor that Python made: its value comes back before each step."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.value = tensor, tensor.clone()

    def __call__(self) -> None:
        self.tensor.copy_(self.value)


def _repeat(func, args: tuple, kwargs: dict, output) -> Callable[[], object] | list | None:
    """The call or the instructions that write into `output` what `func` gives, None if nothing has to be done."""
    if (instructions := elementwise.instructions(func, args, kwargs, output)) is not None:
        return instructions
    if is_mutable(func):
        return partial(direct_call(func), *args, **kwargs)
    results, inputs = _tensors(output), _tensors((args, kwargs))
    made_by_python = not inputs and torch.Tag.nondeterministic_seeded not in func.tags
    if made_by_python or operator_name(func) == "aten::lift_fresh":
        return _Constant(output)
    given = {_memory(tensor) for tensor in inputs}
    if all(_memory(result) in given for result in results):
        return None  # a view
    if (made := _CALLS.get(func)) and (call := made(output, *args, **kwargs)):
        return call
    if func is COPY_TO.default:
        return partial(output.copy_, args[0])
    if (out := _out_variant(func)) is None:
        return partial(_copy, direct_call(func), args, kwargs, results)
    overload, names = out
    return partial(direct_call(overload), *args, **kwargs, **dict(zip(names, results, strict=True)))


def _copy(op, args: tuple, kwargs: dict, results: list[torch.Tensor]) -> None:
    for result, new in zip(results, _tensors(op(*args, **kwargs)), strict=True):
        result.copy_(new)


_out_variant = cache(out_variant)


def _written(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """What `func` changes in place."""
    written = (args[at] if at < len(args) else kwargs.get(name) for at, name in written_arguments(func))
    return _tensors([*written])


def _tensors(tree) -> list[torch.Tensor]:
    """The tensors of an operator's arguments or results, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
