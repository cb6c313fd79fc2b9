"""Models whose encoding of positions depends on how long the sequence is, such as longrope and dynamic RoPE.

Their tables change when a call reaches a longer length, so that a prompt in chunks, or keys kept from a shorter prompt,
would be encoded otherwise than in `model.generate`. Which modules make such tables is seen, not known by name: modules
without parameters and parts that a forward pass calls with integers, one for each token.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# What a module may raise that cannot be called with other positions
_CALL_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)


class PositionTables:
    """The modules of a model that encode positions, once a forward pass was watched."""

    def __init__(self) -> None:
        self._calls: dict[tuple[nn.Module, str], tuple[tuple, dict]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """See which modules of `model` are called with positions in the passes that are made inside."""
        hooks = [
            module.register_forward_pre_hook(self._note, with_kwargs=True)
            for module in model.modules()
            if not [*module.children(), *module.parameters()]
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if any(map(_is_positions, (*args, *kwargs.values()))):
            # one module may make the tables of several kinds of layers, which it is told beside the positions
            settings = repr([value for value in (*args, *kwargs.values()) if not isinstance(value, torch.Tensor)])
            kept = {name: _first_token(value) for name, value in kwargs.items()}
            self._calls[module, settings] = tuple(map(_first_token, args)), kept

    def same(self, short: int, long: int) -> bool:
        """Whether the first positions are encoded alike in a call that reaches `short` tokens, 2 or more, and in one
        that reaches `long`."""
        return all(_same(module, *call, short, long) for (module, _), call in self._calls.items())


def _is_positions(value) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _first_token(value):
    """What is enough of an argument to call with it again: hidden states [B, T, H] only say their dtype and device."""
    if not isinstance(value, torch.Tensor):
        return value
    return (value[..., :1] if _is_positions(value) else value[:1, :1] if value.ndim > 1 else value[:1]).clone()


def _same(module: nn.Module, args: tuple, kwargs: dict, short: int, long: int) -> bool:
    def first_two(length: int) -> list[torch.Tensor]:
        def replaced(value):
            if not _is_positions(value):
                return value
            positions = torch.tensor([0, 1, length - 1], device=value.device, dtype=value.dtype)
            return positions.expand(*value.shape[:-1], 3)

        probe = copy.deepcopy(module)  # tables may grow when they are asked for
        with torch.no_grad():
            output = probe(*map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()})
        return [part[..., :2, :] for part in (output if isinstance(output, tuple | list) else (output,))]

    try:
        return all(map(torch.equal, first_two(short), first_two(long)))
    except _CALL_ERRORS:
        return True  # it makes no table of positions
