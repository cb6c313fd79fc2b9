# SPDX-License-Identifier: Apache-2.0
"""Eight-bit rows: y = x @ W^T on the integer tensor cores, for any number of rows. W8A8 and W4A8.

    y[m, n] = x_scale[m] * (sum over groups g of scale[n, g] * (sum over k in g of code[n, k] * x_code[m, k])
                            - x_zero[m] * row_sum[n]) + bias[n],          row_sum[n] = sum over g, k of scale * code

            x_codes^T [K, M]   BM rows of x
                               +------+                  grid (padded_out / BN * rows / BM, SPLIT)
                             K |      |                  axis 0: a tile of y^T, in the order of gemm.py: GROUP_M row
                               +------+                          tiles pass over all columns before the next GROUP_M do
          +------+------+------+                         axis 1: the part of K that a program walks, TILES K tiles of
    BN of | pk 0 | pk 1 | pk 2 | y^T [BN, BM]                    128 inputs a turn; a dot takes 64 inputs of four bits,
     W    +------+------+------+                                 and of eight all of a turn or of a group
                   K
    SPLIT > 1: float32 sums [BN, BM] of each part go to `partials`, the last program to arrive adds them (epilogue.py)

Weights are the left operand, as in the other kernels. Per channel, sums are int32 over all inputs: exact. A group has
an int32 sum of its own, which its scale adds to a float32. The scale of a row of x, its zero point, which takes off the
sum of the weight's rows, and a bias come last.

Cf. QServe (Lin et al. 2024, arXiv:2405.04532) for four-bit weights times eight-bit rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lowbit_kernels import launching
from lowbit_kernels.decode import (
    AMD,
    PTX,
    first_group,
    load_words,
    part_of_inputs,
    slices_per_group,
    tile_in_order,
    words_per_iteration,
)
from lowbit_kernels.epilogue import finish, store_part, tile_of_parts, total_of_parts
from lowbit_kernels.int8.layout import Int8Layout

# Up to so many rows reading the weight takes longer than multiplying: W is split over more programs
FEW_ROWS = 64


@dataclass(frozen=True)
class Config(launching.Config):
    """block_n: out_features of a program, block_m: rows, split: programs that share the inputs of an output tile,
    tiles: K tiles of a loop iteration, group_m: row tiles that programs launched together share, so that weights are
    found in the L2 cache; warps, stages: of triton."""

    block_n: int = launching.one_of(128, choices=(32, 64, 128, 256))
    block_m: int = launching.one_of(128, choices=(8, 16, 32, 64, 128, 256))
    split: int = launching.at_least(1, default=1)
    tiles: int = launching.one_of(1, choices=(1, 2, 4))
    group_m: int = launching.at_least(1, default=8)
    warps: int = launching.one_of(8, choices=(1, 2, 4, 8))
    stages: int = launching.at_least(1, default=3)


def default_config(layout: Int8Layout, rows: int, programs: int = 528, most_warps: int = 8) -> Config:
    """A guess, not measured: few rows in narrow blocks, about `programs` of them by splitting; many in square ones,
    smaller ones for few warps, which have fewer registers."""
    stages = 2 if AMD else 3
    if rows <= FEW_ROWS:
        block_m = max(launching.FEWEST_ROWS, next(size for size in (8, 16, 32, 64) if rows <= size))
        tiles = launching.tiles_per_iteration(layout.tiles, most=2)
        split = launching.split_of_inputs(layout.tiles // tiles, layout.padded_out // 64, programs)
        return Config(64, block_m, split, tiles, warps=min(2 if block_m < 32 else 4, most_warps), stages=stages)
    if most_warps < 4:
        return Config(64, 64, warps=most_warps, stages=stages)
    block_n = 128 if layout.padded_out % 128 == 0 else 64
    return Config(block_n, 128, warps=8 if block_n == 128 else 4, stages=stages)


@triton.constexpr_function
def nibbles_ptx(p):
    """PTX of slice `p` of eight nibbles: $0 = four codes times 16, as bytes."""
    shift = "shl.b32 t, $1, 4;" if p == 0 else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {shift} lop3.b32 $0, t, 0xF0F0F0F0, 0, 0xC0; }}"


@triton.jit
def nibbles(packed, P: tl.constexpr, PTX: tl.constexpr):
    """Slice P of uint8 pairs of nibbles as int8, the code times 16."""
    if PTX:
        ASM: tl.constexpr = nibbles_ptx(P)
        return tl.inline_asm_elementwise(ASM, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return (packed << (4 - 4 * P) & 0xF0).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def fragments(packed, P: tl.constexpr, NB: tl.constexpr, PTX: tl.constexpr):
    """Slice P of a K tile uint8 [2 * NB, 512] as the matrix [16 * NB, 64] it is; no register moves."""
    codes = nibbles(tl.reshape(packed, (2, NB, 8, 4, 2, 2, 4)), P, PTX)  # half slice, nb, g, c, kh, rh, e
    return tl.reshape(tl.permute(codes, (1, 5, 2, 0, 4, 3, 6)), (NB * 16, 64))


@triton.jit(do_not_specialize=["rows"])  # one compilation for any number of them
def int8_kernel(
    x, x_scales, x_zeros, weight, scales, sums, y, bias, partials, counters,
    rows, out_features, k_tiles, padded_out,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
    SPLIT: tl.constexpr, GROUP_M: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (padded_out / BN * rows / BM, SPLIT): GROUP_M row tiles pass over all columns before the next GROUP_M do.
    None for x_zeros and sums (0), and for bias."""
    NB: tl.constexpr = BN // 16
    SLICES: tl.constexpr = 4 * TILES  # of 32 inputs, of an iteration
    PER_GROUP: tl.constexpr = slices_per_group(SLICES, GROUP_SIZE)
    WORDS: tl.constexpr = words_per_iteration(SLICES, GROUP_SIZE, False)
    STEP: tl.constexpr = PER_GROUP if BITS == 8 else 2  # slices of a dot
    pid, pk = tl.program_id(0), tl.program_id(1)
    pm, pn = tile_in_order(pid, rows, padded_out, BN, BM, GROUP_M)
    start, stop = part_of_inputs(pk, k_tiles, TILES, SPLIT)
    rn = pn * BN + tl.arange(0, BN)
    rm = pm * BM + tl.arange(0, BM)
    rx = tl.minimum(rm, rows - 1)  # rows beyond the last are that one again: their products are not stored
    k = tl.arange(0, 32 * STEP)
    xp = x + rx.to(tl.int64)[:, None] * (k_tiles * 128) + (start * (TILES * 128) + k)[None, :]
    if BITS == 8:
        wp = weight + rn.to(tl.int64)[:, None] * (k_tiles * 128) + (start * (TILES * 128) + k)[None, :]
    else:
        half_slice = tl.arange(0, 2 * NB)  # (j, row tile)
        block = ((pn * NB + half_slice % NB).to(tl.int64) * k_tiles + start * TILES) * 2 + half_slice // NB
        wp = weight + block[:, None] * 512 + tl.arange(0, 512)[None, :]
    sp = scales + rn
    scale = load_words(sp + first_group(start, SLICES, GROUP_SIZE) * padded_out, padded_out, WORDS)

    total = tl.zeros((BN, BM), dtype=tl.float32)
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for it in tl.range(start, stop):
        if GROUP_SIZE > 0:  # loaded an iteration ahead, into registers
            ahead = first_group(tl.minimum(it + 1, stop - 1), SLICES, GROUP_SIZE)
            next_scale = load_words(sp + ahead * padded_out, padded_out, WORDS)
        for s in tl.static_range(0, SLICES, STEP):
            if BITS == 8:
                w = tl.load(wp + s * 32)
            else:
                if s % 4 == 0:
                    packed = tl.load(wp + s * 256)
                w = fragments(packed, s // 2 % 2, NB, PTX)
            acc = tl.dot(w, tl.trans(tl.load(xp + s * 32)), acc, out_dtype=tl.int32)
            if GROUP_SIZE > 0 and (s + STEP) % PER_GROUP == 0:
                of_group = tl.broadcast_to(scale[s // PER_GROUP][:, None], (BN, BM))
                total = tl.fma(of_group, acc.to(tl.float32), total)
                acc = tl.zeros((BN, BM), dtype=tl.int32)
        if GROUP_SIZE > 0:
            scale = next_scale
        wp += TILES * (128 if BITS == 8 else 1024)
        xp += TILES * 128
    if GROUP_SIZE < 0:
        total = acc.to(tl.float32) * scale[0][:, None]

    if SPLIT == 1:
        finish_rows(total, x_scales, x_zeros, sums, y, bias, pn, rm, rows, out_features, BITS, BN, BM)
    else:
        tile = pm * (padded_out // BN) + pn
        parts = tile_of_parts(partials, tile, SPLIT, BN, BM)
        if store_part(parts, total, counters, tile, pk, SPLIT, BN * BM):
            total = total_of_parts(parts, SPLIT, BN * BM)
            finish_rows(total, x_scales, x_zeros, sums, y, bias, pn, rm, rows, out_features, BITS, BN, BM)
            tl.store(counters + tile, 0)  # ready for the next launch


@triton.jit
def finish_rows(
    total, x_scales, x_zeros, sums, y, bias, pn, rm, rows, out_features,
    BITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What the codes of x stand for, and the store of y. total [BN, BM]: codes of x times W, times 16 for four bits."""
    if BITS == 4:
        total = total * 0.0625
    if x_zeros is not None:
        zeros = tl.load(x_zeros + rm, mask=rm < rows, other=0).to(tl.float32)
        total = total - tl.load(sums + pn * BN + tl.arange(0, BN))[:, None] * zeros[None, :]
    total = total * tl.load(x_scales + rm, mask=rm < rows, other=0.0)[None, :]
    finish(total, y, bias, None, pn, rm, rm < rows, out_features, BN, BM, False)


def launch(
    codes: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    layout: Int8Layout,
    config: Config,
    *,
    x_zeros: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: launching.Workspace | None = None,
) -> torch.Tensor:
    """y = ((codes - x_zeros) * x_scales) @ W^T + bias. Everything on one device.

    Args:
        codes: int8 [M, layout.padded_in], 0 in the padding.
        x_scales: float32 [M].
        weight: layout.weight_dtype, layout.weight_shape.
        scales: float32, layout.scales_shape.
        layout: of the packed weight W [N, K].
        config: block_n divides layout.padded_out, tiles divides layout.tiles.
        x_zeros: int8 [M]; None for 0.
        sums: float32 [layout.padded_out] of `int8_layout.row_sums`, given together with x_zeros.
        bias: layout.dtype [N].
        out: y itself, layout.dtype or float32, contiguous.
        workspace: of partial sums, where the inputs are split; that of the current stream if None.

    Returns:
        y [M, N], layout.dtype unless `out` is float32.

    Raises:
        ValueError: an argument does not fit `layout`.
    """
    layout.check(weight, scales)
    rows, device = len(codes), codes.device
    launching.check_tensor("codes", codes, torch.int8, (rows, layout.padded_in), weight.device)
    launching.check_tensor("x_scales", x_scales, torch.float32, (rows,), device)
    if (x_zeros is None) != (sums is None):
        raise ValueError("x_zeros and sums are given together or not at all")
    if x_zeros is not None:
        launching.check_tensor("x_zeros", x_zeros, torch.int8, (rows,), device)
        launching.check_tensor("sums", sums, torch.float32, (layout.padded_out,), device)
    out = launching.Ending(bias=bias, out=out).output(rows, layout, device)
    launching.check_blocks(layout, config.block_n, config.tiles)
    launching.check_warps(config.warps, device)
    if rows == 0:
        return out
    split = min(config.split, layout.tiles // config.tiles)  # a program without inputs would be waste
    tiles = layout.padded_out // config.block_n * triton.cdiv(rows, config.block_m)
    partials, counters = launching.split_buffers(workspace, device, split, tiles, config.block_n * config.block_m)
    with torch.cuda.device_of(codes):
        int8_kernel[(tiles, split)](
            codes, x_scales, x_zeros, weight, scales, sums, out, bias, partials, counters,
            rows, layout.out_features, layout.tiles, layout.padded_out,
            BITS=layout.bits, GROUP_SIZE=layout.group_size, BN=config.block_n, BM=config.block_m, TILES=config.tiles,
            SPLIT=split, GROUP_M=config.group_m, PTX=PTX,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out
