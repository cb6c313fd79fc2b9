"""CUDA graphs without CUDA: a step's operations are recorded once and replayed on the same tensors, with no Python.

As in a capture, the host may not wait for the device, and whatever Python would have changed stays as it was.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# What makes the host wait for the device, lift_fresh as the copy of a number that `torch.tensor` puts there
_WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::lift_fresh"
}  # fmt: skip


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in _WAITS:
            raise RuntimeError(f"the host waits while a step is captured: {func._schema.name}")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, recorded in self.calls:
                inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
                for old, new in zip(_tensors(recorded), _tensors(func(*args, **kwargs)), strict=True):
                    if new.untyped_storage().data_ptr() not in inputs:  # not a view, nor written in place
                        old.copy_(new)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class Tapes:
    """Stands in for `lowbit.generation.steps.graph.CudaGraphs`. log: the replays ("step"), and the reads of the tokens
    of a step by its number ("read 0", ...), in order."""

    path, lag = "tape", 1

    def __init__(self):
        self.log, self.captures, self.sent, self.generators = [], 0, 0, []

    def capture(self, step, generator):
        step()  # to warm up
        self.captures += 1
        self.generators.append(generator)
        with Tape() as tape:
            step()

        def replay():
            self.log.append("step")
            tape.replay()

        return replay

    def fetch(self, tokens):
        number, copy = self.sent, tokens.clone()
        self.sent += 1

        def wait():
            self.log.append(f"read {number}")
            return copy.tolist()

        return wait
