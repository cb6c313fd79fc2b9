"""torch's scaled dot product attention for few queries, as attention.c computes it."""

from collections.abc import Callable
from functools import partial

import torch

from lowbit.native.abi import Attention, Strided
from lowbit.native.build import constant, library
from lowbit.native.linear import DTYPES


def replay(
    out, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Callable | None:
    """For those who repeat `scaled_dot_product_attention` on tensors that stay where they are: the call that computes
    its result `out` anew, or None where the kernel does not know how. query [B, heads, T, D], key and value [B, heads
    or fewer, keys, D]; attn_mask: bool."""
    tensors, masks = (query, key, value, out), [] if attn_mask is None else [attn_mask]
    longest = constant("LONGEST_HEAD")
    if (
        dropout_p or is_causal or query.dtype not in DTYPES or any(mask.dtype != torch.bool for mask in masks)
        or any(tensor.ndim != 4 or tensor.stride(-1) != 1 or tensor.shape[-1] > longest for tensor in tensors)
    ):  # fmt: skip
        return None
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    masks = [mask.expand(batch, heads, queries, keys) for mask in masks]
    call = Attention(
        *map(_strided, (query, key, value)), _strided(*masks) if masks else Strided(), _strided(out),
        batch, heads, heads // key.shape[1], queries, keys, head_dim, value.shape[3], constant(DTYPES[query.dtype]),
        masks[0].stride(3) if masks else 0, head_dim**-0.5 if scale is None else scale,
    )  # fmt: skip
    made = partial(library().lowbit_attention, call)
    made.keeps = *tensors, *masks
    return made


def _strided(tensor: torch.Tensor) -> Strided:
    return Strided(tensor.data_ptr(), *tensor.stride()[:3])
