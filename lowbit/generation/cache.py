"""The static key-value cache: allocated once, addressed by tensors, so that a step is the same kernels each time."""

import torch
from transformers import StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

_MULTIPLE = 256  # lengths are rounded up to it, so that few captured steps are made again
_GROWTH = 1.5


class WholeSlidingLayer(StaticLayer):
    """The keys and values of a layer with a sliding window, of all positions; the mask keeps to the window.

    transformers' own layer holds the window only, and counts in Python: a captured step would stay at one position,
    and what has left the window could not be had back when a conversation is taken up again further ahead.
    """

    is_sliding = True


def static_cache(model, batch: int, length: int) -> Cache:
    """transformers' static cache of a model. Raises what it does for models that have none; see `unusable`."""
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    cache.layers = [
        WholeSlidingLayer(length) if type(layer) is StaticSlidingWindowLayer else layer for layer in cache.layers
    ]
    return cache


def unusable(cache: Cache) -> str | None:
    """Why the loop cannot use a cache: each layer that holds something has to tell its length in one tensor."""
    for layer in cache.layers:
        name = type(layer).__name__
        if hasattr(layer, "update_recurrent_state") or hasattr(layer, "update_indexer"):
            return f"its cache holds more than keys and values ({name})"
        if not isinstance(layer, CacheLayerMixin):
            continue  # holds nothing
        if not layer.is_compileable or not isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            return f"its cache is not static ({name})"
        if hasattr(layer, "cumulative_length_int"):
            return f"its cache counts in Python ({name})"
    return None


def rewind(cache: Cache, length: int) -> None:
    """Forget all positions from `length` on. What they hold stays until it is overwritten, and is masked."""
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin):
            layer.cumulative_length.fill_(length)


def room(needed: int, before: int = 0) -> int:
    """Positions to allocate for so many, when `before` have proved too few."""
    wanted = max(needed, int(before * _GROWTH))
    return -(-wanted // _MULTIPLE) * _MULTIPLE
