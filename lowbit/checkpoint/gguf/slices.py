"""Some blocks of GGML taken apart, and put together as the numbers that they stand for: code * scale, plus a minimum.

What takes a type apart is in `affine` and `codebooks`. The same arithmetic as that of the gguf package, in float32 and
to the bit, in slices that stay in the cache: several times as fast, since that goes through memory for every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Values that are decoded at a time: their float32 copies stay in the cache
_AT_ONCE = 2**19


@dataclass(frozen=True)
class Slice:
    """Some blocks, taken apart.

    Attributes:
        codes: uint8, int8 or float32 tensors, each [blocks, G, g / count], that lie one after the other in a group of
            their own each: [blocks, parts, len(codes), g] are the codes in their order.
        scales, minima: float32 [blocks, groups], for as many codes each; minima: None where there are none.
        offset: What is subtracted from each code.
    """

    codes: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    minima: torch.Tensor | None = None
    offset: int = 0


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        values: How many values are in a block.
        size: How many bytes.
        apart: What takes blocks apart, uint8 [blocks, size].
    """

    values: int
    size: int
    apart: Callable[[torch.Tensor], Slice]


def decode(data: torch.Tensor, kind: BlockType, dtype: torch.dtype) -> torch.Tensor:
    """Blocks as the numbers that they stand for.

    Args:
        data: uint8 [N, bytes of a row].
        kind: Their type.
        dtype: What the numbers, computed in float32, are rounded to.

    Returns:
        [N, values of a row], in `dtype`.
    """
    blocks = data.reshape(-1, kind.size)
    made = torch.empty(len(blocks), kind.values, dtype=dtype)
    at_once = max(1, _AT_ONCE // kind.values)
    scratch = torch.empty(min(at_once, len(blocks)), kind.values)
    for start in range(0, len(blocks), at_once):
        some = blocks[start : start + at_once]
        found, numbers = kind.apart(some), scratch[: len(some)]
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


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """float32 [blocks, 1]: the float16 at a byte of each."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def nibbles(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two codes of 4 bits in each byte."""
    return stored & 0xF, stored >> 4


def spread_bits(value: int) -> torch.Tensor:
    """int64 [256]: for each byte the eight bytes that are `value` where its bits are set, the lowest bit first."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (bits * value).to(torch.uint8).view(torch.int64).view(-1)
