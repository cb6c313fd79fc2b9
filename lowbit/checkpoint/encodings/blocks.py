"""The arithmetic that all encodings share: codes of floating point, and scales for blocks of them.

A weight is codes * scales, each scale for a block of rows and columns, computed in float32 and rounded once to the
dtype of the model. That is bit for bit what the loaders of transformers and compressed-tensors give: the product of a
code of at most 4 significant bits and a scale is computed by them in float32 too, or is exact in what they use.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from lowbit.checkpoint.encodings import EncodedWeight
from lowbit.checkpoint.layout import TensorInfo
from lowbit.errors import InputError
from lowbit.numerics.finite import not_finite

FLOAT8 = {torch.float8_e4m3fn: "FP8 E4M3", torch.float8_e5m2: "FP8 E5M2"}
# E2M1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# E8M0: a power of two with a bias of 127; this byte is NaN (the same, section 5.4.1)
_E8M0_BIAS, _E8M0_NAN = 127, 255
# Elements that are decoded at a time: their float32 copies stay in the cache
_AT_ONCE = 2**19


def float4(packed: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 codes [..., n], the first of a pair in the low four bits -> their values, float32 [..., 2 n]."""
    return of_pairs(packed, packed.new_tensor(E2M1, dtype=torch.float32)).flatten(-2)


def of_pairs(packed: torch.Tensor, values: torch.Tensor, first_is_high: bool = False) -> torch.Tensor:
    """What the two codes of four bits in each byte stand for: one look-up for both.

    Args:
        packed: Bytes [...].
        values: float32 [16], what each code stands for.
        first_is_high: Whether the first of a pair is in the high four bits.

    Returns:
        float32 [..., 2].
    """
    second, first = torch.arange(256) >> 4, torch.arange(256) & 0xF
    order = (second, first) if first_is_high else (first, second)
    table = torch.stack([values[codes] for codes in order], 1)
    # as integers of 64 bits: of rows of two numbers a look-up takes five times as long
    return looked_up(table.view(torch.int64).view(-1), packed).view(torch.float32).view(*packed.shape, 2)


def looked_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """table[codes], three times as fast. codes: integers, or numbers of eight bits, which count as bytes."""
    places = codes.view(torch.uint8) if codes.dtype.itemsize == 1 else codes
    return table.index_select(0, places.reshape(-1).int()).view(codes.shape)


def float8(codes: torch.Tensor) -> torch.Tensor:
    """float32: codes of eight bits as numbers."""
    if codes.dtype != torch.float8_e4m3fn:
        return codes.float()
    # five times as fast as torch has it
    return looked_up(torch.arange(256, dtype=torch.uint8).view(codes.dtype).float(), codes)


def scale_values(scales: torch.Tensor, name: str) -> torch.Tensor:
    """Scales of any dtype as float32; bytes are E8M0. Raises InputError, naming them, where one is NaN."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scales.view(torch.uint8)
        values = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - _E8M0_BIAS)
        damaged = int((exponents == _E8M0_NAN).sum())
    else:
        values = float8(scales) if scales.dtype in FLOAT8 else scales.float()
        damaged = not_finite(values)
    if damaged:
        raise InputError(
            f"{name} holds {damaged:,} NaN or infinite scales: the checkpoint is damaged, download it again"
        )
    return values


def block_of(
    codes: TensorInfo, shape: tuple[int, ...], scales: TensorInfo, blocks: Iterable[tuple[int, int]] = ()
) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Args:
        codes: The stored codes.
        shape: The shape of the weight, [..., rows, columns].
        scales: [..., rows / block rows, columns / block columns], rounded up, or one scale.
        blocks: Blocks that the config speaks of: the last block of rows or columns may be cut, which shapes alone do
            not tell.

    Raises:
        InputError: The scales are not a grid over the weight.
    """
    rows, columns = shape[-2:]
    if scales.numel == 1:
        return rows, columns
    if len(scales.shape) != len(shape) or scales.shape[:-2] != shape[:-2]:
        raise _misfit(codes, shape, scales)
    grid = scales.shape[-2:]
    for block in blocks:
        if min(block) > 0 and (-(-rows // block[0]), -(-columns // block[1])) == grid:
            return min(block[0], rows), min(block[1], columns)
    if 0 in grid or rows % grid[0] or columns % grid[1]:
        raise _misfit(codes, shape, scales)
    return rows // grid[0], columns // grid[1]


def _misfit(codes: TensorInfo, shape: tuple[int, ...], scales: TensorInfo) -> InputError:
    return InputError(
        f"{scales.name} of shape {list(scales.shape)} is no grid of blocks over {codes.name}, a weight of "
        f"{list(shape)}: the checkpoint is damaged, or not what its config says"
    )


def block_scaled(
    name: str,
    codes: TensorInfo,
    scales: TensorInfo,
    *,
    blocks: Iterable[tuple[int, int]] = (),
    global_scale: TensorInfo | None = None,
    is_divisor: bool = False,
    transposed: bool = False,
    unused: Iterable[str] = (),
) -> EncodedWeight:
    """A weight of codes with a scale for each block.

    Args:
        name: The name of the parameter.
        codes: float8 [..., rows, columns], or bytes of two E2M1 codes [..., rows, columns / 2].
        scales: See `block_of`; where they have other numbers of dimensions, one a row.
        blocks: See `block_of`.
        global_scale: One number that multiplies all scales; with `is_divisor`, that divides them.
        transposed: The parameter of each expert is [columns, rows].
        unused: See `EncodedWeight`; those that the checkpoint does not have do no harm.

    Raises:
        InputError: The tensors do not fit each other.
    """
    packed = codes.dtype not in FLOAT8
    shape = (*codes.shape[:-1], codes.shape[-1] * (2 if packed else 1))
    if len(shape) not in (2, 3):
        raise InputError(f"{codes.name} has shape {list(codes.shape)}, expected a matrix, or one for each expert")
    grid = scales if len(scales.shape) == len(shape) else replace(scales, shape=_per_row(shape, scales))
    block = block_of(codes, shape, grid, blocks)
    parts = {"codes": codes, "scales": scales} | ({} if global_scale is None else {"global": global_scale})
    if global_scale is not None and global_scale.numel != 1:
        raise InputError(f"{global_scale.name} has shape {list(global_scale.shape)}, expected one number")

    def decode(read: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        values = scale_values(read["scales"], scales.name).view(grid.shape)
        if global_scale is not None:
            factor = scale_values(read["global"], global_scale.name).reshape(())
            values = values / factor if is_divisor else values * factor
        stored = read["codes"].view(codes.shape)
        if not transposed:
            return scaled(stored, values, block, packed, dtype)
        made = torch.empty(parameter, dtype=dtype)
        for expert in range(len(made)):  # a second copy of all of them would double the memory
            made[expert] = scaled(stored[expert], values[expert], block, packed, dtype).T
        return made

    parameter = (shape[0], shape[2], shape[1]) if transposed else shape
    return EncodedWeight(name, parameter, parts, decode, tuple(unused), FLOAT8.get(codes.dtype, "FP4 E2M1"))


def _per_row(shape: tuple[int, ...], scales: TensorInfo) -> tuple[int, ...]:
    """The grid of scales that have as many numbers as the weight has rows, in whatever dimensions."""
    return (*shape[:-1], 1) if scales.numel == math.prod(shape[:-1]) else scales.shape


def scaled(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], packed: bool, dtype: torch.dtype
) -> torch.Tensor:
    """codes * scales, in slices of rows: their float32 copies are what it takes beside the result.

    Args:
        codes: float8 [..., rows, columns], or where `packed` bytes of two E2M1 codes [..., rows, columns / 2].
        scales: float32, one, or one for each block of the last two dimensions.
        block: Rows and columns of a block.
        dtype: What the result is rounded to.
    """
    columns = codes.shape[-1] * (2 if packed else 1)
    made = torch.empty(*codes.shape[:-1], columns, dtype=dtype)
    if codes.ndim > 2:
        for expert, matrix in enumerate(codes):
            made[expert] = scaled(matrix, scales if scales.numel() == 1 else scales[expert], block, packed, dtype)
        return made
    grid = scales.reshape(1, 1) if scales.numel() == 1 else scales
    at_once = max(1, _AT_ONCE // max(1, columns))  # rows
    for start in range(0, len(codes), at_once):
        rows = codes[start : start + at_once]
        values = float4(rows) if packed else float8(rows)
        of_rows = grid[torch.arange(start, start + len(rows)) // block[0]]
        if of_rows.shape[1] * block[1] == columns:
            values.view(*of_rows.shape, block[1]).mul_(of_rows.unsqueeze(-1))
        else:  # one for all columns, or the last block is cut
            values.mul_(of_rows if of_rows.shape[1] == 1 else of_rows.repeat_interleave(block[1], 1)[:, :columns])
        made[start : start + at_once] = values
    return made


def require_dtype(info: TensorInfo, *dtypes: torch.dtype) -> None:
    """Raise InputError for a part of another dtype than one of these."""
    if info.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{info.name} is {str(info.dtype).removeprefix('torch.')}, expected {expected}")


def companion(tensors: Mapping[str, TensorInfo], of: TensorInfo, *names: str) -> TensorInfo:
    """The first of these tensors that is there. Raises InputError if none is."""
    for name in names:
        if name in tensors:
            return tensors[name]
    raise InputError(f"{of.name} is stored as {str(of.dtype).removeprefix('torch.')}, and {names[0]}, its scales, is "
                     "not in the checkpoint: it is incomplete")  # fmt: skip
