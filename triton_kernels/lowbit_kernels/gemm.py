# SPDX-License-Identifier: Apache-2.0
"""Many rows: y = x @ W^T where the tensor cores are the limit, in plain triton, and the packed weight made dense.

    y[m, n] = sum over k of w[n, k] * x[m, k] + bias[n] + residual[m, n],
    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], rounded to 16 bits; per channel y is scaled instead of w

               x^T [K, M]   | BM rows |                     grid (padded_out / BN * rows / BM,): a program owns a tile
                            +---------+                     of y^T and walks all of K: a K tile of W a turn, decoded in
                          K |         |                     registers, JOINED slices of 32 inputs to a dot
                            +---------+
               +---+---+---+---------+
      BN of W  |   |   |   | y^T tile |                     order of programs, GROUP_M = 2 row tiles:
               +---+---+---+---------+                          column tile   0  1  2  3
                     K                                          row tile 0    0  2  4  6      tiles of W stay in the L2
                                                                row tile 1    1  3  5  7      cache for GROUP_M programs
                                                                row tile 2    8 10 12 14
                                                                row tile 3    9 11 13 15

    dequantize: grid (rows / 64, K tiles), a program writes w[64 rows, one K tile] and multiplies nothing

Like the decode kernel, with weights as the left operand, decoded in registers. The scale goes on the weights, rounded
to 16 bits, not on the accumulator, which is too large here to be touched once per group. Per channel no weight is
rounded.

Cf. Triton's tutorial of matrix multiplication for the order of programs; Marlin (arXiv:2408.11743) for decoding while
the tensor core works.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lowbit_kernels import launching
from lowbit_kernels.decode import (
    AMD,
    INTERPRETED,
    PTX,
    as_matrix,
    dot,
    first_group,
    fragment,
    half_as_float32,
    half_of,
    load_planes,
    load_words,
    per_row,
    planes_of,
    scaled,
    slices_of,
    slices_per_group,
    tile_in_order,
    tile_pointers,
    words_per_iteration,
)
from lowbit_kernels.epilogue import finish
from lowbit_kernels.layout import ROWS, SLICES, Layout


@dataclass(frozen=True)
class Config(launching.Config):
    """block_n: out_features of a program, block_m: rows; warps, stages: of triton. group_m: row tiles that programs
    launched together share, so that weights are found in the L2 cache. joined: slices of one dot, at most those of a
    K tile; joining lets wgmmas overlap with decoding, see launching.JOINABLE.
    """

    block_n: int = launching.one_of(128, choices=(16, 32, 64, 128, 256))
    block_m: int = launching.one_of(128, choices=(16, 32, 64, 128, 256))
    joined: int = launching.one_of(1, choices=(1, 2, 4))
    group_m: int = launching.at_least(1, default=8)
    warps: int = launching.one_of(8, choices=(1, 2, 4, 8))
    stages: int = launching.at_least(1, default=3)


def default_config(layout: Layout, rows: int, most_warps: int = 8) -> Config:
    """A start: square blocks, smaller ones where they would stand mostly empty or, of the long K tiles of two and three
    bits, not fit into shared memory, which is smallest on AMD. Few warps have registers for small ones only."""
    block_n = 128 if layout.padded_out % 128 == 0 and most_warps >= 4 else 64
    block_m = 64 if rows <= 64 or layout.bits == 3 or most_warps < 4 else 128
    if AMD:
        block_m = min(block_m, 128 * 128 // layout.tile)
    warps = min(8 if block_n * block_m > 64 * 128 else 4, most_warps)
    return Config(block_n=block_n, block_m=block_m, warps=warps, stages=2 if AMD or layout.tile > 128 else 3)


@triton.jit
def decoded(
    planes, word, group, S: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYM: tl.constexpr,
    NB: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Slice S of a K tile in the shape of its planes: (code - zero) * scale, or per channel code - zero.

    word: the meta words of the tile; group: the first of its groups.
    """
    PER_GROUP: tl.constexpr = slices_per_group(slices_of(BITS), GROUP_SIZE)
    PER_WORD: tl.constexpr = 2 if SYM else 1  # groups
    h0, h1, h2 = planes
    summand = h0 if SYM else per_row(half_of(word[S // PER_GROUP], 1, DTYPE), NB)
    a = fragment(h0, h1, h2, summand, S, BITS, SYM, DTYPE, PTX)
    if GROUP_SIZE > 0:
        which = S // PER_GROUP % PER_WORD if slices_of(BITS) > PER_GROUP else group % PER_WORD
        scale = half_of(word[S // PER_GROUP // PER_WORD], which, DTYPE)
        a = scaled(a, per_row(scale, NB), DTYPE, PTX)
    return a


@triton.jit
def _joined(
    planes, word, group, S: tl.constexpr, JOINED: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    SYM: tl.constexpr, NB: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Slices S to S + JOINED of a K tile as a matrix [16 * NB, 32 * JOINED]."""
    a = decoded(planes, word, group, S, BITS, GROUP_SIZE, SYM, NB, DTYPE, PTX)
    if JOINED == 1:
        return as_matrix(a, NB)
    else:  # not left out: triton compiles what follows an `if`, even after a return
        b = decoded(planes, word, group, S + 1, BITS, GROUP_SIZE, SYM, NB, DTYPE, PTX)
        if JOINED == 2:  # from kb, nb, g, c, kh, rh, e, slice
            return tl.reshape(tl.permute(tl.join(a, b), (1, 5, 2, 7, 0, 4, 3, 6)), (NB * 16, 64))
        else:
            c = decoded(planes, word, group, S + 2, BITS, GROUP_SIZE, SYM, NB, DTYPE, PTX)
            d = decoded(planes, word, group, S + 3, BITS, GROUP_SIZE, SYM, NB, DTYPE, PTX)
            abcd = tl.join(tl.join(a, c), tl.join(b, d))  # ..., upper bit of the slice, lower bit
            return tl.reshape(tl.permute(abcd, (1, 5, 2, 7, 8, 0, 4, 3, 6)), (NB * 16, 128))


@triton.jit(do_not_specialize=["rows"])  # one compilation for any number of them
def gemm_kernel(
    x, weight, meta, y, bias, residual,
    rows, in_features, out_features, x_stride, k_tiles, padded_out,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYM: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, GROUP_M: tl.constexpr, JOINED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid [padded_out / BN * rows / BM]: GROUP_M row tiles pass over all columns before the next GROUP_M do."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    NB: tl.constexpr = BN // 16
    SLICES_PER_TILE: tl.constexpr = slices_of(BITS)
    WORDS: tl.constexpr = words_per_iteration(SLICES_PER_TILE, GROUP_SIZE, SYM)
    PER_WORD: tl.constexpr = 2 if SYM else 1  # groups
    pm, pn = tile_in_order(tl.program_id(0), rows, padded_out, BN, BM, GROUP_M)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    half_slice = tl.arange(0, 2 * NB)
    wp = tile_pointers(weight, half_slice, pn * NB, 0, k_tiles, NB, BITS, 1)
    # rows beyond the last are some row again: their products are not stored, and need no mask here
    k = tl.arange(0, 32 * JOINED)
    xp = x + tl.minimum(rm, rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    mp = meta + rn
    word = load_words(mp, padded_out, WORDS)

    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for kt in tl.range(0, k_tiles):
        group = first_group(kt, SLICES_PER_TILE, GROUP_SIZE)
        if GROUP_SIZE > 0:  # an iteration ahead, as in the decode kernel
            ahead = first_group(tl.minimum(kt + 1, k_tiles - 1), SLICES_PER_TILE, GROUP_SIZE) // PER_WORD
            next_word = load_words(mp + ahead * padded_out, padded_out, WORDS)
        planes = load_planes(wp, NB, BITS)
        for s in tl.static_range(0, SLICES_PER_TILE, JOINED):
            if EVEN_K:
                xs = tl.load(xp + s * 32)
            else:
                xs = tl.load(xp + s * 32, mask=(k < in_features - (kt * SLICES_PER_TILE + s) * 32)[None, :], other=0.0)
            a = _joined(planes, word, group, s, JOINED, BITS, GROUP_SIZE, SYM, NB, DTYPE, PTX)
            acc = dot(a, xs, acc)
        if GROUP_SIZE > 0:
            word = next_word
        wp += planes_of(BITS) * 512
        xp += SLICES_PER_TILE * 32
    if GROUP_SIZE < 0:
        acc = acc * half_as_float32(word[0], 0, DTYPE)[:, None]
    finish(acc, y, bias, residual, pn, rm, rm < rows, out_features, BN, BM, GATE_UP)


@triton.jit
def dequantize_kernel(
    weight, meta, out, first_row, last_row, in_features, k_tiles, padded_out,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYM: tl.constexpr, BN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (rows / BN, k_tiles): one K tile of BN rows from first_row on."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    NB: tl.constexpr = BN // 16
    SLICES_PER_TILE: tl.constexpr = slices_of(BITS)
    WORDS: tl.constexpr = words_per_iteration(SLICES_PER_TILE, GROUP_SIZE, SYM)
    PER_WORD: tl.constexpr = 2 if SYM else 1  # groups
    start = first_row + tl.program_id(0) * BN
    kt = tl.program_id(1)
    rn = start + tl.arange(0, BN)
    half_slice = tl.arange(0, 2 * NB)
    planes = load_planes(tile_pointers(weight, half_slice, start // 16, kt, k_tiles, NB, BITS, 1), NB, BITS)
    group = first_group(kt, SLICES_PER_TILE, GROUP_SIZE)
    word = load_words(meta + group // PER_WORD * padded_out + rn, padded_out, WORDS)
    k = kt * (SLICES_PER_TILE * 32) + tl.arange(0, 32)
    op = out + (rn - first_row).to(tl.int64)[:, None] * in_features + k[None, :]
    for s in tl.static_range(SLICES_PER_TILE):
        a = decoded(planes, word, group, s, BITS, GROUP_SIZE, SYM, NB, DTYPE, PTX)
        if GROUP_SIZE < 0:
            a = scaled(a, per_row(half_of(word[0], 0, DTYPE), NB), DTYPE, PTX)
        mask = (rn < last_row)[:, None] & (k < in_features - s * 32)[None, :]
        tl.store(op + s * 32, as_matrix(a, NB), mask=mask)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    layout: Layout,
    config: Config,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate_up: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x @ W^T + bias + residual, or with gate_up SiLU(gate) * up + residual. Everything on one device.

    Args:
        x: layout.dtype [M, K], rows of any stride, each in one piece.
        weight: int16, layout.weight_shape.
        meta: int32, layout.meta_shape.
        layout: of the packed weight W [N, K].
        config: block_n divides layout.padded_out; joined is 1 unless launching.JOINABLE.
        bias: layout.dtype [N], with gate_up interleaved like the weight.
        residual: like y.
        gate_up: rows of W are those of `layout.interleave_gate_up`; N is a multiple of 16.
        out: y itself, layout.dtype or float32, contiguous.

    Returns:
        y [M, N], with gate_up [M, N / 2], layout.dtype unless `out` is float32.

    Raises:
        ValueError: an argument does not fit `layout`, or this triton miscompiles the configuration.
    """
    layout.check(weight, meta)
    if config.joined > SLICES[layout.bits]:
        raise ValueError(f"joined is {config.joined}, expected at most {SLICES[layout.bits]} for {layout.bits} bits")
    if config.joined > 1 and not (launching.JOINABLE or INTERPRETED):
        raise ValueError(
            f"joined is {config.joined}, expected 1: triton {triton.__version__} miscompiles joined slices"
        )
    launching.check_input(x, weight, layout)
    launching.check_blocks(layout, config.block_n)
    launching.check_warps(config.warps, x.device)
    rows = len(x)
    out = launching.Ending(bias, residual, gate_up, out).output(rows, layout, x.device)
    if rows == 0:
        return out
    with torch.cuda.device_of(x):
        gemm_kernel[(layout.padded_out // config.block_n * triton.cdiv(rows, config.block_m),)](
            x, weight, meta, out, bias, residual,
            rows, layout.in_features, layout.out_features, x.stride(0), layout.tiles, layout.padded_out,
            BITS=layout.bits, GROUP_SIZE=layout.group_size, SYM=layout.sym, GATE_UP=gate_up,
            EVEN_K=layout.in_features == layout.padded_in, BN=config.block_n, BM=config.block_m,
            GROUP_M=config.group_m, JOINED=config.joined, PTX=PTX,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def dequantize(
    weight: torch.Tensor,
    meta: torch.Tensor,
    layout: Layout,
    *,
    start: int = 0,
    rows: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The packed weight made dense: (codes - zeros) * scales, rounded once.

    Args:
        weight: int16, layout.weight_shape.
        meta: int32, layout.meta_shape.
        layout: of the packed weight W [N, K].
        start: the first out_feature, a multiple of 64.
        rows: how many out_features; all from `start` on if None.
        out: the result itself, contiguous.

    Returns:
        layout.dtype [rows, K].

    Raises:
        ValueError: an argument does not fit `layout`.
    """
    layout.check(weight, meta)
    rows = layout.out_features - start if rows is None else rows
    if start % ROWS or start < 0 or rows < 1 or start + rows > layout.out_features:
        raise ValueError(
            f"start is {start} and rows {rows}, expected a multiple of {ROWS} and rows within {layout.out_features}"
        )
    if out is None:
        out = torch.empty(rows, layout.in_features, dtype=layout.dtype, device=weight.device)
    launching.check_tensor("out", out, layout.dtype, (rows, layout.in_features), weight.device)
    with torch.cuda.device_of(weight):
        dequantize_kernel[(triton.cdiv(rows, ROWS), layout.tiles)](
            weight, meta, out, start, start + rows, layout.in_features, layout.tiles, layout.padded_out,
            BITS=layout.bits, GROUP_SIZE=layout.group_size, SYM=layout.sym, BN=ROWS, PTX=PTX,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
