"""Which lane holds which element of a matrix: fragments of ldmatrix, mma.sync and wgmma (PTX ISA 9.7.14, 9.7.15).

Lane 4 * g + c of a warp. Registers come as uint32 [warps, 32], lane by lane; a register holds `e` elements, two of 16
bits or four of 8.
"""

import numpy as np

from machine import arithmetic
from machine.threads import LANES, Array

KINDS = ("bf16", "f16", "s8")
LARGEST, SMALLEST = 2**31 - 1, -(2**31)


def numbers(words: Array, kind: str) -> Array:
    """uint32 [...] -> the elements of each as float64, lowest bits first, on a new last axis."""
    words = np.ascontiguousarray(words)[..., None]
    if kind == "s8":
        return words.view(np.int8).astype(np.float64)
    table = arithmetic.F64_OF_BF16 if kind == "bf16" else arithmetic.F64_OF_F16
    return table.take(words.view(np.uint16))


def left_operand(registers: Array, kind: str) -> Array:
    """4 registers, uint32 [4, warps * 32] -> A [warps, 16, k]: register 2 * kh + rh holds row 8 * rh + g, columns
    e * (4 * kh + c) and on."""
    values = numbers(registers.reshape(len(registers), -1, LANES), kind)
    _, warps, _, per_register = values.shape
    values = values.reshape(2, 2, warps, 8, 4, per_register)  # kh, rh, warp, g, c, e
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 8 * per_register)


def right_operand(registers: Array, kind: str) -> Array:
    """2 registers, uint32 [2, warps * 32] -> B [warps, k, 8]: register kh holds column g, rows e * (4 * kh + c) and
    on."""
    values = numbers(registers.reshape(len(registers), -1, LANES), kind)
    _, warps, _, per_register = values.shape
    values = values.reshape(2, warps, 8, 4, per_register)  # kh, warp, g, c, e
    return values.transpose(1, 0, 3, 4, 2).reshape(warps, 8 * per_register, 8)


def accumulator_registers(matrix: Array) -> Array:
    """D [warps, 16, n] -> [n / 2, warps * 32]: register 4 * nb + 2 * rh + e holds row 8 * rh + g, column
    8 * nb + 2 * c + e."""
    warps, _, columns = matrix.shape
    values = matrix.reshape(warps, 2, 8, columns // 8, 4, 2)  # warp, rh, g, nb, c, e
    return values.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, warps * LANES)


def accumulators(registers: Array, kind: str) -> Array:
    """uint32 -> the float32 or int32 in them, as float64."""
    return registers.view(np.int32 if kind == "s32" else np.float32).astype(np.float64)


def rounded(total: Array, kind: str, saturating: bool = False) -> Array:
    """float64 -> registers of an accumulator. Integers wrap round unless they saturate."""
    if kind == "s32":
        total = np.clip(total, SMALLEST, LARGEST) if saturating else total
        return total.astype(np.int64).astype(np.int32).view(np.uint32)
    return arithmetic.canonical(total.astype(np.float32)).view(np.uint32)


def matrices_of_rows(rows: Array) -> Array:
    """Rows of 8x8 matrices of 16-bit elements, uint16 [n, 8, 8] -> uint32 [n, 32]: lane 4 * g + c has row g, columns
    2 * c and 2 * c + 1."""
    return np.ascontiguousarray(rows).view(np.uint32).reshape(-1, LANES)


def rows_of_matrices(registers: Array) -> Array:
    """The inverse: uint32 [n, 32] -> uint16 [n, 8, 8]."""
    return np.ascontiguousarray(registers).reshape(-1, 8, 4).view(np.uint16).reshape(-1, 8, 8)
