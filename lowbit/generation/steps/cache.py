"""Key-value caches that are allocated once. A captured step (CUDA graph) addresses them through tensors and always
reads the whole cache; an eager step reads the filled positions, a recorded step those of a fixed window."""

import torch
from transformers import (  # type: ignore[attr-defined]
    Cache,
    CacheLayerMixin,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from lowbit.transformers_api import counts_in_python, length_tensor

_MULTIPLE = 256  # lengths are rounded up to it, so that few captured steps are made again
_GROWTH = 1.5


class WholeSlidingLayer(StaticLayer):
    """The keys and values of a layer with a sliding window, of all positions; the mask keeps to the window.

    transformers' own layer holds the window only, and counts in Python: a captured step would stay at one position,
    and what has left the window could not be had back when a conversation is taken up again further ahead.
    """

    is_sliding = True


class FilledLayer(StaticLayer):
    """Gives only the positions that are filled, and of those only what the window still reaches: attention has no more
    to read, and nothing to mask where there is no padding. `length` counts them, in Python.

    A step that is recorded cannot count so: while it is, `visible` says how many positions it is given, filled or not,
    the mask tells which are, and `count`, one tensor for all layers of a cache, where its keys and values
    go (see `set_visible` and `commit`).
    """

    keys: torch.Tensor  # type: ignore[assignment]
    values: torch.Tensor  # type: ignore[assignment]

    def __init__(self, max_cache_len: int, count: torch.Tensor, window: int | None = None):
        super().__init__(max_cache_len)
        self.count = count
        self.is_sliding, self.window, self.length = window is not None, window or max_cache_len, 0
        self.visible: int | None = None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """transformers always makes a mask where this is true."""
        return self.visible is not None

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.visible is not None:
            position = self.count.view(1)
            self.keys.index_copy_(2, position, key_states)
            self.values.index_copy_(2, position, value_states)
            return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, start, end = self._first(), self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        self.count.fill_(end)
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        return self.length if self.visible is None else self.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.visible is not None:
            return self.visible, 0
        return self.length + query_length - self._first(), self._first()

    def _first(self) -> int:
        """The first position that the next query reaches."""
        return max(self.length - self.window + 1, 0)


def static_cache(model, batch: int, length: int) -> Cache:
    """transformers' static cache of a model, for steps that are captured or compiled. Raises what transformers does for
    models that have none."""
    return _static(model, length, {StaticSlidingWindowLayer: lambda layer: WholeSlidingLayer(length)})


def filled_cache(model, batch: int, length: int) -> Cache:
    """The same, for steps that are called or recorded."""
    count = torch.tensor(0)
    return _static(
        model,
        length,
        {
            StaticLayer: lambda layer: FilledLayer(length, count),
            StaticSlidingWindowLayer: lambda layer: FilledLayer(length, count, window=layer.max_cache_len),
        },
    )


def _static(model, length: int, replacements: dict) -> Cache:
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    cache.layers = [replacements.get(type(layer), lambda layer: layer)(layer) for layer in cache.layers]
    return cache


def grows(cache: Cache) -> bool:
    """Whether attention sees the filled positions only."""
    return any(isinstance(layer, FilledLayer) for layer in cache.layers)


def unusable(cache: Cache) -> str | None:
    """Why the loop cannot use a cache: each layer that holds something has to be static, and to keep its
    length in one tensor."""
    for layer in cache.layers:
        name = type(layer).__name__
        if hasattr(layer, "update_recurrent_state") or hasattr(layer, "update_indexer"):
            return f"its cache holds more than keys and values ({name})"
        if not isinstance(layer, CacheLayerMixin) or isinstance(layer, FilledLayer):
            continue
        if not layer.is_compileable or length_tensor(layer) is None:
            return f"its cache is not static ({name})"
        if counts_in_python(layer):
            return f"its cache counts in Python ({name})"
    return None


def has_sliding_window(cache: Cache) -> bool:
    return any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def crop(cache: Cache, length: int) -> None:
    """Forget all positions from `length` on. What they hold stays until it is overwritten, and is not seen."""
    for layer in cache.layers:
        if isinstance(layer, FilledLayer):
            layer.length, layer.visible = length, None
            layer.count.fill_(length)
        elif (count := length_tensor(layer)) is not None:
            count.fill_(length)


def set_visible(cache: Cache, visible: int) -> None:
    """Attention sees so many positions in every step of one token to come, until the cache is cropped."""
    for layer in cache.layers:
        if isinstance(layer, FilledLayer):
            layer.visible = visible


def commit(cache: Cache) -> None:
    """What a step that sees `visible` positions ends with."""
    filled = (layer for layer in cache.layers if isinstance(layer, FilledLayer))
    if (layer := next(filled, None)) is not None:
        layer.count.add_(1)


def room(needed: int, before: int = 0) -> int:
    """Positions to allocate for so many, when `before` have proved too few."""
    wanted = max(needed, int(before * _GROWTH))
    return -(-wanted // _MULTIPLE) * _MULTIPLE
