"""Static caches of transformers that keep keys and values as int8, with one scale for each head of each token.

A row of head_dim numbers becomes head_dim codes and, behind them, the two bytes of a bfloat16 scale: a row of int8 that
is two longer. Whatever a layer of a cache does with rows (place, shift, drop, reorder or clear them) it does with such
rows too. So it stays the layer it was: rows are encoded on their way in, and decoded on their way out.

Keys have channels that are large for every token, which would take the codes from all others: those are divided before,
and multiplied afterwards, by a factor that comes from the first keys of a layer.
"""

from functools import cache

import torch
from transformers import Cache, StaticCache, StaticLayer

from lowbit.transformers_api import UNREGISTERED_CACHE_LAYER

_SCALE = torch.bfloat16
_LARGEST = 127


def encode(rows: torch.Tensor) -> torch.Tensor:
    """int8 [..., D + 2] of floating [..., D], D even. A row is off by half a step at most, a step being its largest
    absolute value / 127."""
    wide = rows.float()
    scales = (wide.abs().amax(-1, keepdim=True) / _LARGEST).to(_SCALE)
    steps = wide / torch.where(scales == 0, 1, scales).float()
    codes = steps.round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return torch.cat([codes, scales.view(torch.int8)], dim=-1)


def decode(encoded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., D] in `dtype`, what `encode` made int8 [..., D + 2] of."""
    return (encoded[..., :-2] * encoded[..., -2:].view(_SCALE).float()).to(dtype)


def channel_factors(keys: torch.Tensor) -> torch.Tensor:
    """float32 [1, H, 1, D] of keys [B, H, T, D]: the root of how many times larger than the mean channel one becomes, 1
    for those below it. From a short prompt, channels look small that are not: to enlarge them would do harm."""
    if not keys.shape[2]:
        return keys.new_ones(1, keys.shape[1], 1, keys.shape[3], dtype=torch.float32)
    largest = keys.float().abs().amax((0, 2), keepdim=True)
    mean = largest.mean(-1, keepdim=True)
    return (largest / torch.where(mean == 0, 1, mean)).clamp_min(1).sqrt()


class Int8Layer(StaticLayer):
    """What the class of a static layer gains when it keeps int8.

    The factors of channels stay for as long as the layer does: what it holds was divided by them.
    """

    factors: torch.Tensor

    def lazy_initialization(self, *states, **of_a_recurrent_state):
        if states:
            self.factors = channel_factors(states[0])
        # of what is to be kept, the shape counts here
        kept = [rows.new_empty(*rows.shape[:-1], rows.shape[-1] + 2, dtype=torch.int8) for rows in states]
        super().lazy_initialization(*kept, **of_a_recurrent_state)

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = super().update(encode(key_states / self.factors), encode(value_states), *args, **kwargs)
        keys = decode(keys, torch.float32) * self.factors
        return keys.to(key_states.dtype), decode(values, value_states.dtype)


@cache
def _int8_class(layer_class: type[StaticLayer]) -> type[Int8Layer]:
    return type(f"Int8{layer_class.__name__}", (Int8Layer, layer_class), UNREGISTERED_CACHE_LAYER)


def in_int8(full: Cache) -> Cache:
    """`full`, which holds nothing yet, with its layers of keys and values keeping int8. What layers keep beside them,
    such as the state of a recurrence, they keep as it is."""
    for layer in full.layers:
        if isinstance(layer, StaticLayer):
            layer.__class__ = _int8_class(type(layer))
    return full


class Int8StaticCache(StaticCache):
    """`StaticCache`, and used as it is: `model.generate(..., past_key_values=Int8StaticCache(model.config, 4096))`."""

    def __init__(self, config, max_cache_len: int, **kwargs):
        super().__init__(config, max_cache_len, **kwargs)
        in_int8(self)
