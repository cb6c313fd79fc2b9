"""Blocks of GGML whose codes are places in a book: the i-quants, and floating point of four bits.

An entry of the book of an i-quant is four or eight weights at once: bytes, looked up as one integer. These books are
those of the gguf package.
"""

from functools import cache
from importlib.metadata import version

import torch

from lowbit.checkpoint.encodings.blocks import looked_up
from lowbit.checkpoint.gguf.slices import BlockType, Slice, half, nibbles, spread_bits
from lowbit.errors import UsageError
from lowbit.formats.gguf import import_gguf

# For each byte eight bytes of ones where its bits are set: weights that are negative
_NEGATIVE = spread_bits(0xFF)
# The same for its lower 7 bits, where the highest is not stored: the number of negative weights is even
_EVEN = _NEGATIVE[[byte | byte.bit_count() % 2 << 7 for byte in range(128)]]


def _of_two(values: tuple[int, ...]) -> torch.Tensor:
    """int16 [256]: what the two codes of four bits in a byte stand for, that of the lower one in the lower byte."""
    table = torch.tensor(values, dtype=torch.int8)
    return torch.stack([table.repeat(16), table.repeat_interleave(16)], 1).view(torch.int16).view(-1)


_IQ4 = _of_two((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_E2M1 = _of_two((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))  # twice its numbers


def _half_ue4m3() -> torch.Tensor:
    """float32 [256]: half of what a scale of NVFP4 stands for, 3 bits below 4 of an exponent."""
    codes = torch.arange(256)
    exponents, rest = codes >> 3 & 0xF, codes & 7
    values = torch.ldexp(rest + 8.0 * (exponents > 0), exponents.clamp(min=1) - 11)
    return values.masked_fill(codes == 0x7F, 0)


_HALF_UE4M3 = _half_ue4m3()


@cache
def _book(kind: str, factor: int = 1, plus: int = 0) -> torch.Tensor:
    """The entries of the book of a type, factor * weight + plus: int32 for four weights each, int64 for eight."""
    try:
        known = getattr(import_gguf().quants, kind)
        known.init_grid()
        weights = torch.from_numpy(known.grid).view(known.grid_shape)
    except AttributeError as error:
        raise UsageError(
            f"gguf {version('gguf')} does not have the code book of {kind} where 0.19 has it ({error}): install 0.19"
        ) from None
    entries = (weights * factor + plus).to(torch.int8)
    return entries.view(torch.int32 if entries.shape[1] == 4 else torch.int64).view(-1)


def _with_signs(entries: torch.Tensor, negative: torch.Tensor) -> tuple[torch.Tensor]:
    """int8 [blocks, 1, 256]: the weights of int64 entries, negated where eight bytes of `negative` are ones."""
    flipped = (entries ^ negative).view(torch.int8)
    return (flipped.sub_(negative.view(torch.int8)).view(len(entries), 1, -1),)


def _words(blocks: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [start, stop) of each block as integers of more."""
    return blocks[:, start:stop].contiguous().view(dtype)


def _high_bits(stored: torch.Tensor, bits: int, step: int, count: int) -> torch.Tensor:
    """int32 [blocks, n * count]: `count` times `bits` bits of each number of [blocks, n], the lowest first and `step`
    bits from one to the next; as the bits of a place from bit 8 on."""
    parts = torch.arange(0, count * step, step, dtype=torch.int32)
    return ((stored.int().unsqueeze(-1) >> parts & 2**bits - 1) << 8).flatten(1)


def _halves(blocks: torch.Tensor, at: int, stop: int) -> torch.Tensor:
    """float32 [blocks, 2 n]: the scales in the nibbles of bytes [at, stop), before what they are multiplied by."""
    return torch.stack(nibbles(blocks[:, at:stop]), -1).flatten(1).float()


def _iq2_xxs(blocks: torch.Tensor) -> Slice:
    places, packed = blocks[:, 2:].unflatten(1, (8, 2, 4)).unbind(2)
    packed = packed.contiguous().view(torch.int32)
    signs = packed >> torch.arange(0, 28, 7, dtype=torch.int32) & 0x7F
    codes = _with_signs(looked_up(_book("IQ2_XXS"), places), looked_up(_EVEN, signs))
    scales = half(blocks, 0) * (0.5 + (packed.squeeze(-1) >> 28 & 0xF)) * 0.25
    return Slice(codes, scales)


def _iq2_xs(blocks: torch.Tensor) -> Slice:
    stored = _words(blocks, 2, 66, torch.int16).int()
    codes = _with_signs(looked_up(_book("IQ2_XS"), stored & 511), looked_up(_EVEN, stored >> 9 & 0x7F))
    return Slice(codes, half(blocks, 0) * (0.5 + _halves(blocks, 66, 74)) * 0.25)


def _iq2_s(blocks: torch.Tensor) -> Slice:
    places = blocks[:, 2:34].int() | _high_bits(blocks[:, 66:74], 2, 2, 4)
    codes = _with_signs(looked_up(_book("IQ2_S"), places), looked_up(_NEGATIVE, blocks[:, 34:66]))
    return Slice(codes, half(blocks, 0) * (0.5 + _halves(blocks, 74, 82)) * 0.25)


def _iq3_xxs(blocks: torch.Tensor) -> Slice:
    packed = _words(blocks, 66, 98, torch.int32)
    signs = packed.unsqueeze(-1) >> torch.arange(0, 28, 7, dtype=torch.int32) & 0x7F
    entries = looked_up(_book("IQ3_XXS"), blocks[:, 2:66]).view(torch.int64)
    codes = _with_signs(entries, looked_up(_EVEN, signs.flatten(1)))
    return Slice(codes, half(blocks, 0) * (0.5 + (packed >> 28 & 0xF)) * 0.5)


def _iq3_s(blocks: torch.Tensor) -> Slice:
    places = blocks[:, 2:66].int() | _high_bits(blocks[:, 66:74], 1, 1, 8)
    entries = looked_up(_book("IQ3_S"), places).view(torch.int64)
    codes = _with_signs(entries, looked_up(_NEGATIVE, blocks[:, 74:106]))
    return Slice(codes, half(blocks, 0) * (1 + 2 * _halves(blocks, 106, 110)))


def _of_ones(places: torch.Tensor, is_lower: torch.Tensor) -> tuple[torch.Tensor]:
    """int8 [blocks, 1, 256]: eight times the weights of IQ1, which are -1, 0 and 1, and an eighth more or, where
    `is_lower` (0 or 1 for each entry) says so, less."""
    both = torch.cat([_book("IQ1_S", 8, 1), _book("IQ1_S", 8, -1)])
    return (looked_up(both, places + is_lower * (len(both) // 2)).view(torch.int8).view(len(places), 1, -1),)


def _iq1_s(blocks: torch.Tensor) -> Slice:
    packed = _words(blocks, 34, 50, torch.int16).int()
    places = blocks[:, 2:34].int() | _high_bits(packed, 3, 3, 4)
    lower = (packed >> 15 & 1).repeat_interleave(4, 1)
    return Slice(_of_ones(places, lower), half(blocks, 0) * (2 * (packed >> 12 & 7) + 1) * 0.125)


def _iq1_m(blocks: torch.Tensor) -> Slice:
    high, packed = blocks[:, 32:48], _words(blocks, 48, 56, torch.int16).int()
    places = blocks[:, :32].int() | _high_bits(high, 3, 4, 2)
    lower = (torch.stack(nibbles(high), -1).flatten(1) >> 3).int()
    # the bytes of the scale lie in four nibbles
    scale = ((packed >> 12 & 0xF) << torch.arange(0, 16, 4, dtype=torch.int32)).sum(1, dtype=torch.int32)
    scale = scale.to(torch.int16).view(torch.float16).float().unsqueeze(1)
    each = (packed.unsqueeze(-1) >> torch.arange(0, 12, 3, dtype=torch.int32) & 7).flatten(1)
    return Slice(_of_ones(places, lower), scale * (2 * each + 1) * 0.125)


def _of_nibbles(table: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8: what the lower and the higher code of each byte stand for. table: see `_of_two`."""
    both = looked_up(table, stored)
    return both.to(torch.int8), (both >> 8).to(torch.int8)


def _iq4_nl(blocks: torch.Tensor) -> Slice:
    return Slice(_of_nibbles(_IQ4, blocks[:, None, 2:]), half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> Slice:
    low = torch.stack(nibbles(blocks[:, 4:8]), -1).flatten(1)
    high = _high_bits(_words(blocks, 2, 4, torch.int16), 2, 2, 8) >> 4
    codes = _of_nibbles(_IQ4, blocks[:, 8:].unflatten(1, (8, 16)))
    return Slice(codes, half(blocks, 0) * ((low | high) - 32))


def _mxfp4(blocks: torch.Tensor) -> Slice:
    bits = blocks[:, :1].int()  # half of a power of two: for the two least ones a subnormal number
    scales = torch.where(bits < 2, 0x00200000 << bits, bits - 1 << 23).view(torch.float32)
    return Slice(_of_nibbles(_E2M1, blocks[:, None, 1:]), scales)


def _nvfp4(blocks: torch.Tensor) -> Slice:
    # eight codes at a time: to part fewer of them than sixteen is slow
    eights = [codes.view(torch.int64) for codes in _of_nibbles(_E2M1, blocks[:, 4:].unflatten(1, (4, 8)))]
    return Slice((torch.cat(eights, -1).view(torch.int8),), looked_up(_HALF_UE4M3, blocks[:, :4]))


TYPES = {
    "IQ2_XXS": BlockType(256, 66, _iq2_xxs), "IQ2_XS": BlockType(256, 74, _iq2_xs), "IQ2_S": BlockType(256, 82, _iq2_s),
    "IQ3_XXS": BlockType(256, 98, _iq3_xxs), "IQ3_S": BlockType(256, 110, _iq3_s), "IQ1_S": BlockType(256, 50, _iq1_s),
    "IQ1_M": BlockType(256, 56, _iq1_m), "IQ4_NL": BlockType(32, 18, _iq4_nl), "IQ4_XS": BlockType(256, 136, _iq4_xs),
    "MXFP4": BlockType(32, 17, _mxfp4), "NVFP4": BlockType(64, 36, _nvfp4),
}  # fmt: skip
