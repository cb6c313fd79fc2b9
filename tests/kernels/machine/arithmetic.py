"""Arithmetic of PTX on numpy arrays, an element per thread, exact to the bit (PTX ISA 9.7.1 to 9.7.9).

Approximate functions (`ex2.approx`, `rsqrt.approx`, `div.full`) are correctly rounded here, or nearly. A NaN that float
arithmetic makes is the canonical one; conversions to a wider float keep its payload.
"""

import functools
import itertools

import numpy as np
from numpy.typing import NDArray

U8, U16, U32, U64, I32, I64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
Array = NDArray
NAN_F32 = U32(0x7FFFFFFF).view(F32)
NAN_16 = U16(0x7FFF)
INFINITY_BITS, MAGNITUDE = U32(0x7F800000), U32(0x7FFFFFFF)


# Integers and bits ---------------------------------------------------------------------------------------------------


def shl(a: Array, count: Array) -> Array:
    """Counts beyond the width leave zeros."""
    width = 8 * a.dtype.itemsize
    return np.where(count >= width, a.dtype.type(0), a << np.minimum(count, width - 1).astype(a.dtype))


def shr(a: Array, count: Array) -> Array:
    """Counts beyond the width leave zeros or, of signed numbers, copies of the sign."""
    width = 8 * a.dtype.itemsize
    if np.issubdtype(a.dtype, np.signedinteger):
        return a >> np.minimum(count, width - 1).astype(a.dtype)
    return np.where(count >= width, a.dtype.type(0), a >> np.minimum(count, width - 1).astype(a.dtype))


def shf_l_wrap(low: Array, high: Array, count: Array) -> Array:
    """The upper word of high:low shifted left by count modulo 32."""
    both = (np.asarray(high, U64) << U64(32)) | np.asarray(low, U64)
    return ((both << (np.asarray(count, U64) & U64(31))) >> U64(32)).astype(U32)


def bfe(a: Array, position: Array, length: Array) -> Array:
    """The field of `length` bits from `position` on. Signed: copies of its top bit above it, and of the top bit of `a`
    where the field reaches beyond it."""
    position, length = (np.asarray(v, I64) & 255 for v in (position, length))
    ones = U64(2**64 - 1)
    above = shl(np.broadcast_to(ones, np.shape(length)), length)  # the bits from `length` on
    if a.dtype == U32:
        return (shr(a.astype(U64), position) & ~above).astype(U32)
    wide = a.astype(I64)
    top = (wide >> np.clip(position + length - 1, 0, 31)) & 1 & (length > 0)
    field = (wide >> np.minimum(position, 63)).view(U64) & ~above
    return np.where(top == 1, field | above, field).astype(U32).view(I32)


@functools.cache
def lop3() -> dict[int, str]:
    """Table -> a shortest expression of the integers {a}, {b} and {c} that has bit 4 * a + 2 * b + c of the table, for
    each of their bits. All 256 are found by joining shorter ones."""
    levels = [{0xF0: "{a}", 0xCC: "{b}", 0xAA: "{c}"}]  # by the number of operations
    found = dict(levels[0])
    while len(found) < 256:
        level = {table ^ 255: f"~{text}" for table, text in levels[-1].items()}
        for shorter, longer in zip(levels, reversed(levels), strict=True):
            for (f, left), (g, right) in itertools.product(shorter.items(), longer.items()):
                for table, sign in ((f & g, "&"), (f | g, "|"), (f ^ g, "^")):
                    level.setdefault(table, f"({left} {sign} {right})")
        levels.append({table: text for table, text in level.items() if table not in found})
        found |= levels[-1]
    return found


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of b:a by the nibbles of the selector; the top bit of one spreads the sign of that byte."""
    both = (np.asarray(b, U64) << U64(32)) | np.asarray(a, U64)
    selector, out = np.asarray(selector, U64), U32(0)
    for i in range(4):
        nibble = selector >> U64(4 * i)
        byte = (both >> ((nibble & U64(7)) * U64(8))) & U64(255)
        byte = np.where(nibble & U64(8), U64(255) * (byte >> U64(7)), byte)
        out = out | (byte.astype(U32) << U32(8 * i))
    return out


def multiply_high(a: Array, b: Array) -> Array:
    wide = U64 if a.dtype == U32 else I64
    return (np.multiply(a, b, dtype=wide) >> wide(32)).astype(a.dtype)


def divide(a: Array, b: Array) -> Array:
    """Towards zero. By zero: all bits, which the ISA leaves open."""
    wide, narrow = np.broadcast_arrays(np.asarray(a, I64), np.asarray(b, I64)), np.asarray(a).dtype
    a, b = wide
    safe = np.where(b == 0, 1, b)
    quotient = np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))
    return np.where(b == 0, -1, quotient).astype(narrow)


def remainder(a: Array, b: Array) -> Array:
    """With the sign of a."""
    wide = np.asarray(a, I64) - np.asarray(b, I64) * np.asarray(divide(a, b), I64)
    return wide.astype(np.asarray(a).dtype)


def saturate(value: Array, dtype: type) -> Array:
    """An integer of any width, limited to what dtype holds."""
    limits = np.iinfo(dtype)
    return np.clip(np.asarray(value, I64), limits.min, limits.max).astype(dtype)


# Floats --------------------------------------------------------------------------------------------------------------


def canonical(v: Array) -> Array:
    """float32 with every NaN the canonical one."""
    nan = np.isnan(v)
    return np.where(nan, NAN_F32, v) if np.any(nan) else v


def flush(v: Array) -> Array:
    """.ftz: subnormal float32 are zeros of their sign."""
    bits = np.asarray(v, F32).view(U32)
    return np.where(bits & INFINITY_BITS, bits, bits & U32(0x80000000)).view(F32)


def limited(v: Array) -> Array:
    """.sat of float32: from 0 to 1, NaN is 0."""
    return np.where(np.isnan(v), F32(0), np.clip(v, F32(0), F32(1)) + F32(0))


def round_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 or narrower as a float64 that rounds to any of those as the exact value does."""
    product = np.multiply(a, b, dtype=F64)  # exact
    c = np.asarray(c, F64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)  # Knuth's two-sum
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    if not np.any(inexact):
        return total
    total, error = np.array(total, ndmin=1), np.array(error, ndmin=1)
    bits = total.view(I64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact & (bits & 1 == 0), bits + step, bits).view(F64)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    return canonical(round_to_odd(a, b, c).astype(F32))


def fma_bf16x2(a: Array, b: Array, c: Array) -> Array:
    a, b, c = (F64_OF_BF16.take(parts(v)) for v in (a, b, c))
    product = a * b
    total = product + c
    single = total.astype(F32)
    if not exact(total, product, c, single):
        return joined(bf16_of_f64(round_to_odd(a, b, c)))
    bits = single.view(U32)
    return joined((bits + ((bits >> U32(16) & U32(1)) + U32(0x7FFF))).view(U16)[..., 1::2])


def fma_f16x2(a: Array, b: Array, c: Array) -> Array:
    a, b, c = (F64_OF_F16.take(parts(v)) for v in (a, b, c))
    product = a * b
    total = product + c
    if not exact(total, product, c, total):
        total = round_to_odd(a, b, c)
    return joined(f16_of(total))


def exact(total: Array, product: Array, c: Array, rounded: Array) -> bool:
    """Are all sums `total` of float64, and all `rounded`, what product and c have without rounding, and finite? The
    difference of the larger summand is exact, so that it tells; which one is larger need not be known."""
    return bool(((total - product == c) & (total - c == product) & (rounded == total)).all())


def minimum(a: Array, b: Array) -> Array:
    """min.f32: of a number and a NaN the number, of zeros the negative one."""
    below = (a < b) | ((a == b) & np.signbit(a)) | np.isnan(b)
    return canonical(np.where(below, a, b))


def maximum(a: Array, b: Array) -> Array:
    """max.f32: of a number and a NaN the number, of zeros the positive one."""
    above = (a > b) | ((a == b) & ~np.signbit(a)) | np.isnan(b)
    return canonical(np.where(above, a, b))


def minimum_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), NAN_F32, minimum(a, b))


def maximum_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), NAN_F32, maximum(a, b))


def exponential(v: Array) -> Array:
    return canonical(np.exp2(np.asarray(v, F64)).astype(F32))


def logarithm(v: Array) -> Array:
    return canonical(np.log2(np.asarray(v, F64)).astype(F32))


def reciprocal_root(v: Array) -> Array:
    return canonical((1 / np.sqrt(np.asarray(v, F64))).astype(F32))


# Conversions ---------------------------------------------------------------------------------------------------------


def bf16_of_f64(v: Array) -> Array:
    """float64, exact or rounded to odd -> the pattern of the nearest bf16, ties to even."""
    single = np.asarray(v).astype(F32)
    bits = single.view(U32)
    # the detour must not round to the middle of two bf16: what float32 cannot hold is rounded to odd there too
    exact = single.astype(F64)
    inexact = (exact != v) & np.isfinite(v) & (bits & U32(1) == 0)
    if np.any(inexact):
        step = np.where(np.abs(v) > np.abs(exact), 1, -1).astype(I32)
        bits = np.where(inexact, (bits.view(I32) + step).view(U32), bits)
    return bf16_of_bits(bits)


def bf16_of_bits(bits: Array) -> Array:
    """Pattern of float32 -> pattern of the nearest bf16, ties to even."""
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where((bits & MAGNITUDE) > INFINITY_BITS, NAN_16, rounded)


def bf16_of(v: Array) -> Array:
    return bf16_of_bits(np.asarray(v, F32).view(U32))


def f16_of(v: Array) -> Array:
    """float32, or float64 rounded to odd -> the pattern of the nearest fp16, ties to even."""
    return np.where(np.isnan(v), NAN_16, np.asarray(v).astype(F16).view(U16))


def f32_of_bf16(pattern: Array) -> Array:
    return (np.asarray(pattern).astype(U32) << U32(16)).view(F32)


def f32_of_f16(pattern: Array) -> Array:
    return np.asarray(pattern).view(F16).astype(F32)


def integer_of(v: Array, dtype: type) -> Array:
    """A rounded float -> an integer, limited to what dtype holds; NaN is 0."""
    limits = np.iinfo(dtype)
    inside = np.nan_to_num(np.asarray(v, F64), nan=0.0, posinf=limits.max, neginf=limits.min)
    return np.clip(inside, limits.min, limits.max).astype(dtype)


# All of them, by their patterns
with np.errstate(invalid="ignore"):  # of signalling NaN
    F64_OF_BF16, F64_OF_F16 = (of(np.arange(2**16, dtype=U16)).astype(F64) for of in (f32_of_bf16, f32_of_f16))


def pair(high: Array, low: Array) -> Array:
    """Two 16-bit patterns in a register."""
    return (high.astype(U32) << U32(16)) | low.astype(U32)


def parts(word: Array) -> Array:
    """uint32 [...] -> its lower and upper 16 bits, uint16 [..., 2]."""
    return np.ascontiguousarray(word)[..., None].view(U16) if np.ndim(word) else np.array([word], U32).view(U16)


def joined(halves: Array) -> Array:
    """The inverse of parts."""
    return np.ascontiguousarray(halves).view(U32)[..., 0]


def add_16x2(a: Array, b: Array) -> Array:
    return joined(parts(a) + parts(b))
