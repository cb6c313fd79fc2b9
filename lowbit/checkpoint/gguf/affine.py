"""Blocks of GGML whose codes are numbers: its first types, the K-quants, and those of three values."""

import torch

from lowbit.checkpoint.encodings.blocks import looked_up
from lowbit.checkpoint.gguf.slices import BlockType, Slice, half, nibbles, spread_bits

_FIFTH_BITS = spread_bits(16)


def _q4_0(blocks: torch.Tensor) -> Slice:
    return Slice(nibbles(blocks[:, None, 2:]), half(blocks, 0), offset=8)


def _q4_1(blocks: torch.Tensor) -> Slice:
    return Slice(nibbles(blocks[:, None, 4:]), half(blocks, 0), half(blocks, 2))


def _five_bits(blocks: torch.Tensor, at: int) -> tuple[torch.Tensor, ...]:
    """The codes of Q5_0 and Q5_1: the highest bits of all 32 lie at a byte, before the others."""
    fifth = looked_up(_FIFTH_BITS, blocks[:, at : at + 4]).view(torch.uint8).view(-1, 1, 2, 16).unbind(2)
    return tuple(low | high for low, high in zip(nibbles(blocks[:, None, at + 4 :]), fifth, strict=True))


def _q5_0(blocks: torch.Tensor) -> Slice:
    return Slice(_five_bits(blocks, 2), half(blocks, 0), offset=16)


def _q5_1(blocks: torch.Tensor) -> Slice:
    return Slice(_five_bits(blocks, 4), half(blocks, 0), half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Slice:
    return Slice((blocks[:, None, 2:].view(torch.int8),), half(blocks, 0))


def _pairs(stored: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four codes of 2 bits in each byte."""
    return stored & 3, (stored >> 2) & 3, (stored >> 4) & 3, stored >> 6


def _bits(stored: torch.Tensor, place: int) -> list[torch.Tensor]:
    """Each of the eight bits of the bytes, the lowest first, at a place of its own byte."""
    stored = stored.contiguous()  # four times as fast as rows of 32 bytes in longer ones
    masked = [stored & (1 << bit) for bit in range(8)]
    return [each << place - bit if bit < place else each >> bit - place for bit, each in enumerate(masked)]


def _q2_k(blocks: torch.Tensor) -> Slice:
    scales, minima = nibbles(blocks[:, :16])
    codes = _pairs(blocks[:, 16:80].unflatten(1, (2, 32)))
    return Slice(codes, scales.float() * half(blocks, 80), -(minima.float() * half(blocks, 82)))


def _q3_k(blocks: torch.Tensor) -> Slice:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = torch.cat(nibbles(low), 1) | torch.cat(_pairs(high), 1) << 4
    bits = _bits(blocks[:, :32], 2)  # bit i: of the codes of part i; the code is 4 less where it is not set
    above = [torch.stack([bits[i], bits[i + 4]], 1) for i in range(4)]
    codes = tuple(a | b for a, b in zip(_pairs(blocks[:, 32:96].unflatten(1, (2, 32))), above, strict=True))
    return Slice(codes, (scales.float() - 32) * half(blocks, 108), offset=4)


def _of_12_bytes(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [blocks, 8]: scales and minima of Q4_K and Q5_K, 6 bits each."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 0x3F, (third & 0xF) | (first >> 2) & 0x30], 1)
    minima = torch.cat([second & 0x3F, (third >> 4) | (second >> 2) & 0x30], 1)
    return scales.float() * half(blocks, 0), -(minima.float() * half(blocks, 2))


def _q4_k(blocks: torch.Tensor) -> Slice:
    return Slice(nibbles(blocks[:, 16:].unflatten(1, (4, 32))), *_of_12_bytes(blocks))


def _q5_k(blocks: torch.Tensor) -> Slice:
    bits = _bits(blocks[:, 16:48], 4)
    above = torch.stack(bits[::2], 1), torch.stack(bits[1::2], 1)
    low = nibbles(blocks[:, 48:].unflatten(1, (4, 32)))
    return Slice(tuple(a | b for a, b in zip(low, above, strict=True)), *_of_12_bytes(blocks))


def _q6_k(blocks: torch.Tensor) -> Slice:
    low = blocks[:, :128].unflatten(1, (2, 2, 32))
    low = torch.cat(nibbles(low), 2).unbind(2)
    high = _pairs(blocks[:, 128:192].unflatten(1, (2, 32)))
    codes = tuple(a | b << 4 for a, b in zip(low, high, strict=True))
    return Slice(codes, blocks[:, 192:208].contiguous().view(torch.int8).float() * half(blocks, 208), offset=32)


def _threes(stored: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` digits to base 3 of bytes, which are fractions of 256: all first ones, all second ones, ..."""
    digits = []
    for _ in range(count):
        digits.append((stored.to(torch.int16) * 3 >> 8).to(torch.uint8))
        stored = stored * 3  # modulo 256
    return torch.cat(digits, 1)


def _tq1_0(blocks: torch.Tensor) -> Slice:
    digits = [_threes(blocks[:, :32], 5), _threes(blocks[:, 32:48], 5), _threes(blocks[:, 48:52], 4)]
    return Slice((torch.cat(digits, 1).unsqueeze(1),), half(blocks, 52), offset=1)


def _tq2_0(blocks: torch.Tensor) -> Slice:
    return Slice(_pairs(blocks[:, :64].unflatten(1, (2, 32))), half(blocks, 64), offset=1)


TYPES = {
    "Q4_0": BlockType(32, 18, _q4_0), "Q4_1": BlockType(32, 20, _q4_1), "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1), "Q8_0": BlockType(32, 34, _q8_0), "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k), "Q4_K": BlockType(256, 144, _q4_k), "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k), "TQ1_0": BlockType(256, 54, _tq1_0), "TQ2_0": BlockType(256, 66, _tq2_0),
}  # fmt: skip
