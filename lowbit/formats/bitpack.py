"""Dense little-endian bit streams: the one layout underneath compressed-tensors, GPTQ and AWQ.

Code i of a row occupies bits [i*b, (i+1)*b) of the row's stream, least significant bit first; a code may straddle two
words; the row is padded with zero bits to whole int32 words.
"""

import math

import torch


def _period(bits: int) -> tuple[int, int]:
    """The shortest run of codes that fills whole bytes: (codes, bytes)."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


# Codes that `unpack` takes apart at a time: what that needs beside the result stays in a cache
_SLICE_CODES = 2**20
# Codes of a run -> the integers with as many bytes
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_width(length: int, bits: int) -> int:
    """int32 words of a packed row of `length` codes."""
    return math.ceil(length * bits / 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [R, C] with values below 2^bits -> int32 [R, ceil(C*bits/32)]. Works on meta tensors."""
    rows, columns = codes.shape
    width = packed_width(columns, bits)
    if codes.device.type == "meta":
        return torch.empty(rows, width, dtype=torch.int32, device="meta")
    run, run_bytes = _period(bits)
    runs = math.ceil(columns / run)
    if columns != runs * run:
        codes = torch.nn.functional.pad(codes, (0, runs * run - columns))
    codes = codes.view(rows, runs, run)
    stream = torch.zeros(rows, width * 4, dtype=torch.uint8, device=codes.device)
    # the last run may reach past the row's last word; what lies there is padding, which is zero
    whole = stream if runs * run_bytes <= width * 4 else stream.new_zeros(rows, runs * run_bytes)
    for byte in range(run_bytes):
        target = whole[:, byte : runs * run_bytes : run_bytes]
        for position in range(run):
            shift = position * bits - byte * 8
            if -bits < shift < 8:
                part = codes[:, :, position]
                target |= part << shift if shift >= 0 else part >> -shift
    if whole is not stream:
        stream.copy_(whole[:, : width * 4])
    return stream.view(torch.int32)


def unpack(packed: torch.Tensor, bits: int, columns: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """int32 [R, W] -> uint8 [R, columns], the inverse of `pack`. out: where to put it, contiguous."""
    rows = packed.shape[0]
    if packed.device.type == "meta":
        return torch.empty(rows, columns, dtype=torch.uint8, device="meta")
    run, _ = _period(bits)
    if out is not None and columns % run == 0:
        words = out.view(_WORDS[run])
    else:
        words = torch.empty(rows, math.ceil(columns / run), dtype=_WORDS[run], device=packed.device)
    step = max(1, _SLICE_CODES // max(1, columns))
    for source, target in zip(packed.split(step), words.split(step), strict=True):
        _unpack_slice(source, target, bits)
    codes = words.view(torch.uint8)[:, :columns]
    if out is None:
        return codes.contiguous()
    return out if columns % run == 0 else out.copy_(codes)


def _unpack_slice(packed: torch.Tensor, words: torch.Tensor, bits: int) -> None:
    """Fill `words` [R, runs]: a run in each, which has a byte for each of its codes."""
    run, run_bytes = _period(bits)
    width = words.shape[1] * run_bytes
    if packed.stride(1) != 1:  # what a view of another width refuses; .contiguous() keeps it on a dimension of length 1
        packed = torch.empty_like(packed, memory_format=torch.contiguous_format).copy_(packed)
    stream = packed.view(torch.uint8)
    if stream.shape[1] < width:
        stream = torch.nn.functional.pad(stream, (0, width - stream.shape[1]))
    words.copy_(stream[:, :width:run_bytes])
    for byte in range(1, run_bytes):
        words |= stream[:, byte:width:run_bytes].to(words.dtype) << 8 * byte
    # the codes lie close together and are parted by halves
    half = run // 2
    while half:
        upper = sum((2 ** (half * bits) - 1) << half * bits + 8 * first for first in range(0, run, 2 * half))
        words.add_(words & upper, alpha=2 ** (half * (8 - bits)) - 1)
        half //= 2
