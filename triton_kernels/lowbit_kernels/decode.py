# SPDX-License-Identifier: Apache-2.0
"""From packed halfwords to tensor core operands: the jit helpers every kernel shares.

A code becomes a float by being written into the mantissa of a fixed exponent: 0x4300 | q is the bf16 number 128 + q,
0x6400 | q the fp16 number 1024 + q. One fma then takes off that offset and the zero point, exactly: every number on the
way is one that its format can hold. A mantissa has room for several codes of two or three bits: one that lies j places
up is 128 + 2^j q, and the same fma divides by 2^j, so that not every slice needs a shift of its own. The PTX works on
two halfwords at a time and is elementwise, so it is right in whatever register layout the compiler picks.
tests/kernels/test_decode.py executes its very text.

PTX: GPUs of other makers have no such assembly, nor has triton's interpreter. They read the same fields with plain
operations on integers and float32, which give the same numbers to the last bit.
"""

import torch
import triton
import triton.language as tl

from lowbit_kernels import layout

# The interpreter multiplies bit patterns of bf16 as integers, and truncates on the way there: see `dot` and `round_to`
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
AMD = torch.version.hip is not None
PTX = not AMD and not triton.knobs.runtime.interpret  # what launchers pass

fields = triton.constexpr_function(layout.fields)
zero_offset = triton.constexpr_function(layout.zero_offset)


@triton.constexpr_function
def slices_of(bits):
    """K slices of 32 inputs in a tile: layout.SLICES as a function, since kernels read no globals."""
    return 16 if bits == 3 else 16 // bits


@triton.constexpr_function
def planes_of(bits):
    """Halfwords that hold the codes of a slice: layout.Layout.planes as a function."""
    return 3 if bits == 3 else 1


@triton.constexpr_function
def window_start(bits, plane, shift, mantissa):
    """How far to shift a halfword to the right so that the field at `shift` lies in a mantissa of so many bits.

    As few different shifts as there can be: fields that fit in a mantissa together share one. Of three bits, the last
    one is smaller by the plane: the planes' top bits, the sixteenth code, then lie side by side.
    """
    window = max(mantissa // bits, 1) * bits
    start = shift // window * window
    return start - plane if bits == 3 and start == 15 // window * window else start


@triton.constexpr_function
def fragment_ptx(bits, p, sym, dtype):
    """PTX of slice `p`: $0 = code - zero, two numbers of `dtype` ("bf16" or "fp16") in a register.

    Inputs: the planes of the halfword that `fields(bits, p)` names ($1, ...) and, unless sym, the summand
    -(zero + zero_offset) of the meta word, in both halves.
    """
    bf16 = dtype == "bf16"
    exponent, one, mantissa = (0x4300, 0x3F80, 7) if bf16 else (0x6400, 0x3C00, 10)
    sign, pair = 0x8000, 0x00010001  # times pair: a 16-bit constant for both halves
    fma = f"fma.rn.{'bf16x2' if bf16 else 'f16x2'}"  # sm_80 has no packed bf16 addition
    parts = fields(bits, p)

    lines = [".reg .b32 t, u, d, one, scale;", f"mov.b32 one, {one * pair:#010x};"]
    base = f"{exponent * pair:#010x}"
    place = 0  # the code is written times 2^place
    for i in range(len(parts)):
        plane, shift, low, width = parts[i]
        start = window_start(bits, plane, shift, mantissa)
        place = shift - start - low
        mask = ((1 << width) - 1) << (shift - start)
        lines.append(f"shr.u32 t, ${i + 1}, {start};")
        if bits == 8 and bf16:  # (128 + seven low bits) - (128 + the top bit): the stored two's complement
            lines.append(f"lop3.b32 d, t, {0x7F * pair:#010x}, {base}, 0xEA;")
            lines.append(f"lop3.b32 u, t, {0x80 * pair:#010x}, {(exponent | sign) * pair:#010x}, 0xEA;")
            lines.append(f"{fma} d, d, one, u;")
        elif bits == 8:  # the stored top bit is turned over: (t & mask) ^ constant
            lines.append(f"lop3.b32 d, t, {mask * pair:#010x}, {(exponent | 0x80) * pair:#010x}, 0x6A;")
        else:  # (t & mask) | base
            lines.append(f"lop3.b32 d, t, {mask * pair:#010x}, {base}, 0xEA;")
            base = "d"
    # d / 2^place is the code + offset / 2^place, of whatever exponent: the fma that ends the decoding divides as well
    lines.append(f"mov.b32 scale, {(one - (place << mantissa)) * pair:#010x};")
    if not sym:
        summand = f"${len(parts) + 1}"
        if place:  # for all weights of a row and group the same: + offset - offset / 2^place
            rest = exponent - (1 << (mantissa + 1 - place))
            lines += [f"mov.b32 u, {rest * pair:#010x};", f"{fma} u, {summand}, one, u;"]
            summand = "u"
        lines.append(f"{fma} d, d, scale, {summand};")
    elif not (bits == 8 and bf16):
        offset = exponent - (place << mantissa)
        lines.append(f"mov.b32 u, {(sign | offset | 1 << (bits - 1 + place)) * pair:#010x};")
        lines.append(f"{fma} d, d, scale, u;")
    lines.append("mov.b32 $0, d;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def scale_ptx(dtype):
    """PTX of $0 = $1 * $2, two numbers of `dtype` in a register, each product rounded once."""
    kind, minus_zero = ("bf16x2" if dtype == "bf16" else "f16x2"), "0x80008000"
    return f"{{ .reg .b32 z; mov.b32 z, {minus_zero}; fma.rn.{kind} $0, $1, $2, z; }}"


@triton.jit
def round_to(v, DTYPE: tl.constexpr):
    """float32 -> DTYPE, to nearest even."""
    if INTERPRETED and DTYPE.is_bf16():
        u = v.to(tl.int32, bitcast=True)
        return exactly((u + 0x7FFF + ((u >> 16) & 1)).to(tl.float32, bitcast=True), DTYPE)
    else:
        return v.to(DTYPE)


@triton.jit
def exactly(v, DTYPE: tl.constexpr):
    """float32 numbers that DTYPE can hold, as DTYPE. For bf16 their upper halves: many a GPU rounds in six steps."""
    if DTYPE.is_bf16():
        return (v.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(DTYPE)


@triton.jit
def half_of(word, half, DTYPE: tl.constexpr):
    """The 16-bit number in the low (half 0) or high (1) half of a meta word."""
    return (word >> (16 * half)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def half_as_float32(word, half, DTYPE: tl.constexpr):
    if DTYPE.is_bf16():
        return ((word >> (16 * half)) << 16).to(tl.float32, bitcast=True)
    else:
        return half_of(word, half, DTYPE).to(tl.float32)


@triton.jit
def load_words(pointer, stride, COUNT: tl.constexpr):
    """COUNT meta words of each row, `stride` apart, as a tuple."""
    words = (tl.load(pointer),)
    for i in tl.static_range(1, COUNT):
        words = words + (tl.load(pointer + i * stride),)  # noqa: RUF005 - kernels know no unpacking
    return words


@triton.constexpr_function
def slices_per_group(slices, group_size):
    """Slices of a group in a loop iteration of `slices`; a group that reaches further comes up once per iteration."""
    return slices if group_size < 0 else min(slices, group_size // 32)


@triton.constexpr_function
def words_per_iteration(slices, group_size, sym):
    """Meta words of a row that a loop iteration of `slices` reads."""
    groups = slices // slices_per_group(slices, group_size)
    return max(groups // 2, 1) if sym else groups


@triton.jit
def first_group(iteration, SLICES: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The group in which a loop iteration of SLICES starts."""
    if GROUP_SIZE < 0:
        return iteration * 0
    elif GROUP_SIZE > 32 * SLICES:
        return iteration // (GROUP_SIZE // (32 * SLICES))
    else:
        return iteration * (SLICES * 32 // GROUP_SIZE)


@triton.jit
def per_row(v, NB: tl.constexpr):
    """[16 * NB] -> the shape of a loaded tile [kb 2, NB, g 8, c 4, kh 2, rh 2, e 2]: row 16*nb + 8*rh + g."""
    v = tl.permute(tl.reshape(v, (NB, 2, 8)), (0, 2, 1))
    return tl.broadcast_to(v[None, :, :, None, None, :, None], (2, NB, 8, 4, 2, 2, 2))


@triton.jit
def as_matrix(a, NB: tl.constexpr):
    """A slice's fragments [kb, nb, g, c, kh, rh, e] as the matrix [16 * NB, 32] they are; no register moves."""
    return tl.reshape(tl.permute(a, (1, 5, 2, 0, 4, 3, 6)), (NB * 16, 32))


@triton.jit
def tile_in_order(pid, rows, padded_out, BN: tl.constexpr, BM: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, column tile) of program `pid`: GROUP_M row tiles pass over all columns before the next GROUP_M do."""
    in_group = GROUP_M * (padded_out // BN)
    first_m = pid // in_group * GROUP_M
    size = tl.minimum(tl.cdiv(rows, BM) - first_m, GROUP_M)
    return first_m + pid % in_group % size, pid % in_group // size


@triton.jit
def part_of_inputs(part, k_tiles, TILES: tl.constexpr, SPLIT: tl.constexpr):
    """The loop iterations, of TILES K tiles each, of one of SPLIT programs: (first, last + 1)."""
    iterations = k_tiles // TILES
    return iterations * part // SPLIT, iterations * (part + 1) // SPLIT


@triton.jit
def tile_pointers(
    weight, half_slice, row_tile, iteration, k_tiles, NB: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr
):
    """[2 * NB, 256] to plane 0 of the first of TILES K tiles of a loop iteration, for NB row tiles from `row_tile` on;
    planes are 512 elements apart. half_slice: tl.arange(0, 2 * NB), which counts (kb, row tile)."""
    PLANES: tl.constexpr = planes_of(BITS)
    block = ((row_tile + half_slice % NB) * k_tiles + iteration * TILES) * (2 * PLANES) + half_slice // NB
    return weight + block[:, None] * 256 + tl.arange(0, 256)[None, :]


@triton.jit
def load_planes(pointer, NB: tl.constexpr, BITS: tl.constexpr):
    """The planes of a K tile for 16 * NB rows; of less than three bits, or more, the only one thrice."""
    h0 = _load_plane(pointer, NB)
    h1 = _load_plane(pointer + 512, NB) if BITS == 3 else h0
    h2 = _load_plane(pointer + 1024, NB) if BITS == 3 else h0
    return h0, h1, h2


@triton.jit
def _load_plane(pointer, NB: tl.constexpr):
    """pointer [2 * NB, 256]: loading in three dimensions spread the warps over the half slices, and the fragments then
    went through shared memory."""
    return tl.reshape(tl.load(pointer), (2, NB, 8, 4, 2, 2, 2))


@triton.jit
def fragment(
    h0, h1, h2, summand, P: tl.constexpr, BITS: tl.constexpr, SYM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """Slice P of a tile as code - zero.

    h0, h1, h2: int16 planes (three bits; else h0 thrice). summand: -(zero + zero_offset) in DTYPE, of the same shape;
    unused if SYM.
    Returns the shape of h0 in DTYPE.
    """
    PARTS: tl.constexpr = fields(BITS, P)
    if PTX:
        ASM: tl.constexpr = fragment_ptx(BITS, P, SYM, DTYPE.name)
        if len(PARTS) == 3:
            if SYM:
                return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [h0, h1, h2], dtype=DTYPE.value, is_pure=True, pack=2)
            else:
                return tl.inline_asm_elementwise(
                    ASM, "=r,r,r,r,r", [h0, h1, h2, summand], dtype=DTYPE.value, is_pure=True, pack=2
                )
        else:
            h = _plane(h0, h1, h2, PARTS[0][0])
            if SYM:
                return tl.inline_asm_elementwise(ASM, "=r,r", [h], dtype=DTYPE.value, is_pure=True, pack=2)
            else:
                return tl.inline_asm_elementwise(ASM, "=r,r,r", [h, summand], dtype=DTYPE.value, is_pure=True, pack=2)
    else:
        code = 0
        for i in tl.static_range(len(PARTS)):
            h = _plane(h0, h1, h2, PARTS[i][0]).to(tl.int32)
            code |= (h >> (PARTS[i][1] - PARTS[i][2])) & (((1 << PARTS[i][3]) - 1) << PARTS[i][2])
        if BITS == 8:
            code ^= 128
        if SYM:
            return exactly(code.to(tl.float32) - (1 << (BITS - 1)), DTYPE)
        else:
            offset: tl.constexpr = zero_offset(BITS, DTYPE.is_fp16())
            return exactly(code.to(tl.float32) + (summand.to(tl.float32) + offset), DTYPE)


@triton.jit
def scaled(a, scale, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """a * scale in DTYPE, the scale given like a."""
    if PTX:
        return tl.inline_asm_elementwise(
            scale_ptx(DTYPE.name), "=r,r,r", [a, scale], dtype=DTYPE.value, is_pure=True, pack=2
        )
    else:
        return round_to(a.to(tl.float32) * scale.to(tl.float32), DTYPE)


@triton.jit
def dot(w, x, acc):
    """acc float32 [BN, BM] + w [BN, BK] @ x [BM, BK]^T."""
    if INTERPRETED:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(w, tl.trans(x), acc)


@triton.jit
def _plane(h0, h1, h2, WHICH: tl.constexpr):
    if WHICH == 0:
        return h0
    elif WHICH == 1:
        return h1
    else:
        return h2
