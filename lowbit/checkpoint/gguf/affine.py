"""Blocks of GGML whose numbers are code * scale, plus a minimum: all types but the i-quants and those of floats.

The same arithmetic as that of the gguf package, in float32 and to the bit, in slices that stay in the cache: several
times as fast, since that goes through memory for every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Values that are decoded at a time: their float32 copies stay in the cache
_AT_ONCE = 2**19


@dataclass(frozen=True)
class _Slice:
    """Some blocks, taken apart.

    Attributes:
        codes: uint8 or int8 tensors, each [blocks, G, g / count], that lie one after the other in a group of their own
            each: [blocks, parts, len(codes), g] are the codes in their order.
        offset: What is subtracted from each code.
        scales, minima: float32 [blocks, groups], for as many codes each; minima: None where there are none.
    """

    codes: tuple[torch.Tensor, ...]
    offset: int
    scales: torch.Tensor
    minima: torch.Tensor | None = None


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """float32 [blocks, 1]: the float16 at a byte of each."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return stored & 0xF, stored >> 4


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """uint8 [blocks, 1, 2, 16] of 0 or 16: the highest bit of the 32 codes of a block."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = blocks[:, at : at + 4].unsqueeze(-1) >> shifts
    return ((bits & 1) << 4).view(-1, 1, 2, 16)


def _q4_0(blocks: torch.Tensor) -> _Slice:
    return _Slice(_nibbles(blocks[:, None, 2:]), 8, _half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> _Slice:
    return _Slice(_nibbles(blocks[:, None, 4:]), 0, _half(blocks, 0), _half(blocks, 2))


def _five_bits(blocks: torch.Tensor, at: int) -> tuple[torch.Tensor, ...]:
    fifth = _fifth_bits(blocks, at).unbind(2)
    return tuple(low | high for low, high in zip(_nibbles(blocks[:, None, at + 4 :]), fifth, strict=True))


def _q5_0(blocks: torch.Tensor) -> _Slice:
    return _Slice(_five_bits(blocks, 2), 16, _half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> _Slice:
    return _Slice(_five_bits(blocks, 4), 0, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> _Slice:
    return _Slice((blocks[:, None, 2:].view(torch.int8),), 0, _half(blocks, 0))


def _pairs(stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four codes of 2 bits in each byte."""
    return stored & 3, (stored >> 2) & 3, (stored >> 4) & 3, stored >> 6


def _q2_k(blocks: torch.Tensor) -> _Slice:
    scales, minima = _nibbles(blocks[:, :16])
    codes = _pairs(blocks[:, 16:80].unflatten(1, (2, 32)))
    return _Slice(codes, 0, scales.float() * _half(blocks, 80), -(minima.float() * _half(blocks, 82)))


def _q3_k(blocks: torch.Tensor) -> _Slice:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = torch.cat(_nibbles(low), 1) | torch.cat(_pairs(high), 1) << 4
    highest = blocks[:, :32]  # bit i of these: of the codes of part i; the code is 4 less where it is not set
    bits = [((highest >> i) & 1) << 2 for i in range(8)]
    above = [torch.stack([bits[i], bits[i + 4]], 1) for i in range(4)]
    codes = tuple(a | b for a, b in zip(_pairs(blocks[:, 32:96].unflatten(1, (2, 32))), above, strict=True))
    return _Slice(codes, 4, (scales.float() - 32) * _half(blocks, 108))


def _of_12_bytes(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [blocks, 8]: scales and minima of Q4_K and Q5_K, 6 bits each."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 0x3F, (third & 0xF) | (first >> 2) & 0x30], 1)
    minima = torch.cat([second & 0x3F, (third >> 4) | (second >> 2) & 0x30], 1)
    return scales.float() * _half(blocks, 0), -(minima.float() * _half(blocks, 2))


def _q4_k(blocks: torch.Tensor) -> _Slice:
    return _Slice(_nibbles(blocks[:, 16:].unflatten(1, (4, 32))), 0, *_of_12_bytes(blocks))


def _q5_k(blocks: torch.Tensor) -> _Slice:
    highest = blocks[:, 16:48]
    bits = [((highest >> i) & 1) << 4 for i in range(8)]
    above = torch.stack(bits[::2], 1), torch.stack(bits[1::2], 1)
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32)))
    return _Slice(tuple(a | b for a, b in zip(low, above, strict=True)), 0, *_of_12_bytes(blocks))


def _q6_k(blocks: torch.Tensor) -> _Slice:
    low = blocks[:, :128].unflatten(1, (2, 2, 32))
    low = torch.cat(_nibbles(low), 2).unbind(2)
    high = _pairs(blocks[:, 128:192].unflatten(1, (2, 32)))
    codes = tuple(a | b << 4 for a, b in zip(low, high, strict=True))
    return _Slice(codes, 32, blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208))


# Name of a type -> (values of a block, its bytes, what takes it apart)
TYPES: dict[str, tuple[int, int, Callable[[torch.Tensor], _Slice]]] = {
    "Q4_0": (32, 18, _q4_0), "Q4_1": (32, 20, _q4_1), "Q5_0": (32, 22, _q5_0), "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0), "Q2_K": (256, 84, _q2_k), "Q3_K": (256, 110, _q3_k), "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k), "Q6_K": (256, 210, _q6_k),
}  # fmt: skip


def decode(data: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Blocks as the numbers that they stand for.

    Args:
        data: uint8 [N, bytes of a row].
        kind: One of `TYPES`.
        dtype: What the numbers, computed in float32, are rounded to.

    Returns:
        [N, values of a row], in `dtype`.
    """
    values, size, apart = TYPES[kind]
    blocks = data.reshape(-1, size)
    made = torch.empty(len(blocks), values, dtype=dtype)
    at_once = max(1, _AT_ONCE // values)
    scratch = torch.empty(min(at_once, len(blocks)), values)
    for start in range(0, len(blocks), at_once):
        some = blocks[start : start + at_once]
        found, numbers = apart(some), scratch[: len(some)]
        parts = numbers.view(len(some), found.codes[0].shape[1], len(found.codes), -1)
        for number, codes in enumerate(found.codes):
            parts[:, :, number] = codes
        if found.offset:
            numbers -= found.offset
        groups = numbers.view(*found.scales.shape, -1)
        groups *= found.scales.unsqueeze(-1)
        if found.minima is not None:
            groups += found.minima.unsqueeze(-1)
        made[start : start + at_once] = numbers
    return made.view(len(data), -1)
