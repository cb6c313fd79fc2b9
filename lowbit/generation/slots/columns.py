"""The cache of slots: in a step all rows write to the same column, whatever the lengths of their sequences."""

import copy
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from lowbit.generation.request import TokenSettings
from lowbit.generation.sampling import Sampling
from lowbit.generation.steps.cache import crop
from lowbit.generation.steps.runner import MakeCache
from lowbit.generation.steps.step import Step

NO_SETTINGS = TokenSettings(Sampling(), eos=(), pad=0)  # of steps whose tokens are picked elsewhere


class Columns:
    """A static cache in which a row of n positions has them in the columns [end - n, end): as a batch lies that is
    padded on the left, for which steps are made, masked, recorded and captured already.

    length: columns that are allocated. end: the one to which the next step writes.
    """

    def __init__(self, model: PreTrainedModel, make_cache: MakeCache, rows: int, length: int):
        self.cache, self.length = make_cache(model, rows, length), length
        token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        allocating = Step(model, self.cache, rows, length, NO_SETTINGS)
        allocating.begin(token, torch.ones_like(token), seed=0)
        allocating.prefill(0, 1)  # a model alone knows what its cache holds
        self.set_end(0)

    def set_end(self, end: int) -> None:
        self.end = end
        crop(self.cache, end)

    def move(self, end: int, rows: int, longest: int) -> None:
        """Let the first `rows` rows, of at most `longest` positions, end at another column."""
        if end != self.end:
            part = slice(rows)
            copy_positions(self.cache, part, self.end - longest, self.cache, part, end - longest, longest)
        self.set_end(end)

    def first(self, rows: int) -> Cache:
        """The first rows, as a cache of their own that lies on the same memory."""
        part = copy.copy(self.cache)
        part.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in _holding(part):
            layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]
        return part

    def clear(self, row: int) -> None:
        """For what is no number: weighed with zero, where it is masked, it would be none still."""
        for tensor in _tensors(self.cache):
            tensor[row].zero_()

    @property
    def bytes_of_column(self) -> int:
        """Of all rows together."""
        return sum(tensor.nbytes for tensor in _tensors(self.cache)) // self.length


def copy_positions(
    source: Cache, rows: slice, start: int, target: Cache, to_rows: slice, to_start: int, count: int
) -> None:
    """Copy `count` positions of rows of a cache to as many rows of another one of the same kind, or of itself."""
    for old, new in zip(_tensors(source), _tensors(target), strict=True):
        part = old[rows, :, start : start + count]
        new[to_rows, :, to_start : to_start + count] = part.clone() if old is new else part


def _tensors(cache: Cache) -> list[torch.Tensor]:
    """Keys and values [B, H, L, D] of each layer that holds some."""
    return [tensor for layer in _holding(cache) for tensor in (layer.keys, layer.values)]


def _holding(cache: Cache) -> list[Any]:
    """The layers that hold keys and values by now."""
    return [layer for layer in cache.layers if getattr(layer, "is_initialized", False)]
