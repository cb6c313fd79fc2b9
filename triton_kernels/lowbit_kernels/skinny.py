# SPDX-License-Identifier: Apache-2.0
"""Few rows (1 to about 32): y = x @ W^T where reading the weight is all the time there is.

    y[m, n] = sum over groups g of scale[n, g] * (sum over k in g of (code[n, k] - zero[n, g]) * x[m, k])
              + bias[n] + residual[m, n]

Codes minus zeros are small integers, exact in 16 bits; a group's sum is float32, and only then scaled.

            x^T [K, M]         BM rows of x
                               +------+
                             K |      |
                               |      |                        grid (padded_out / BN, SPLIT, row tiles)
                               +------+
          +------+------+------+                               pn: BN rows of W
    BN of | pk 0 | pk 1 | pk 2 | y^T [BN, BM]                  pk: each program walks its part of K, TILES K tiles a
     W    +------+------+------+                                   turn, a slice of 32 inputs to a dot
                   K                                           pm: BM rows of x, or a tile of an expert's

    SPLIT > 1: sums [BN, BM] of each part go to `partials`, the last program to arrive adds them (epilogue.py)

Weights are the left operand, W @ x^T: the tensor core's 16 rows are filled by output features and its 8 columns by the
few rows of x. The inputs are split over programs, so that a small weight still has enough of them to fill the GPU.

The same body serves a fused gate_up projection (SiLU(gate) * up in the epilogue, rows by `layout.interleave_gate_up`)
and experts (rows of x sorted by expert, a table says which rows belong to which expert).

Cf. Marlin (Frantar et al. 2024, arXiv:2408.11743), which stores weights in the order of fragments too; the split inputs
of gemlite's kernels for few rows; for experts the sorted tiles of vLLM's fused_moe.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lowbit_kernels import launching
from lowbit_kernels.decode import (
    AMD,
    PTX,
    as_matrix,
    dot,
    first_group,
    fragment,
    half_as_float32,
    half_of,
    load_planes,
    load_words,
    part_of_inputs,
    per_row,
    planes_of,
    slices_of,
    slices_per_group,
    tile_pointers,
    words_per_iteration,
)
from lowbit_kernels.epilogue import finish, store_part, tile_of_parts, total_of_parts
from lowbit_kernels.layout import Layout

# K tiles of an iteration, by bits: 256 inputs where that is more than one
_MOST_TILES = {8: 4, 4: 2}


@dataclass(frozen=True)
class Config(launching.Config):
    """block_n: out_features of a program, block_m: rows, split: programs that share the inputs of an output tile,
    tiles: K tiles of a loop iteration; warps, stages: of triton (four warps or more let it pick wgmma)."""

    block_n: int = launching.one_of(64, choices=(16, 32, 64, 128, 256))
    block_m: int = launching.one_of(8, choices=(8, 16, 32, 64))
    split: int = launching.at_least(1, default=1)
    tiles: int = launching.one_of(1, choices=(1, 2, 4))
    warps: int = launching.one_of(2, choices=(1, 2, 4, 8))
    stages: int = launching.at_least(1, default=3)


def default_tiles(layout: Layout) -> int:
    """K tiles of a loop iteration: 256 inputs where the K tiles allow it."""
    return launching.tiles_per_iteration(layout.tiles, most=_MOST_TILES.get(layout.bits, 1))


def long_tiles(bits: int, block_m: int, block_n: int = 64) -> int:
    """K tiles of a loop iteration of a large weight: of two bits 512 inputs, since reading them leaves the least time
    for instructions, and this saves 6 % of those; more rows, of x or of W, have no registers for it."""
    return 2 if bits == 2 and block_m <= 16 and block_n <= 64 else _MOST_TILES.get(bits, 1)


def default_config(
    layout: Layout, rows: int, programs: int = 528, capability: tuple[int, int] = launching.AMPERE
) -> Config:
    """A start: iterations of 256 inputs where the K tiles allow it, and about `programs` programs by splitting; longer
    iterations where they cost no program. capability: of the GPU, where there is one."""
    block_m = max(launching.FEWEST_ROWS, 8 if rows <= 8 else 16 if rows <= 16 else 32)
    row_tiles = -(-rows // block_m)
    if _wide_pays(layout, block_m, row_tiles, programs, capability):
        split = launching.split_of_inputs(layout.tiles, layout.padded_out // 128 * row_tiles, programs)
        return Config(block_n=128, block_m=block_m, split=split, stages=2)
    block_n, warps = 64, 2
    if layout.bits == 3 and block_m == 32 and capability == launching.HOPPER and not AMD:
        # a K tile of 64 rows and three bits takes 96 registers of each thread of two warps: ptxas spilled some of them
        block_n, warps = (64, 4) if launching.most_warps(capability) >= 4 else (32, 2)
    column_tiles = layout.padded_out // block_n * row_tiles
    tiles = launching.tiles_per_iteration(layout.tiles, most=long_tiles(layout.bits, block_m))
    if launching.split_of_inputs(layout.tiles // tiles, column_tiles, programs) < programs // column_tiles:
        tiles = default_tiles(layout)
    split = launching.split_of_inputs(layout.tiles // tiles, column_tiles, programs)
    return Config(block_n=block_n, block_m=block_m, split=split, tiles=tiles, warps=warps)


def _wide_pays(layout: Layout, block_m: int, row_tiles: int, programs: int, capability: tuple[int, int]) -> bool:
    """Whether a program takes 128 rows of W: of two bits in groups of 64, 9 to 16 rows of x, and where it costs no
    program. A Hopper GPU reads such a weight faster than 64 rows a time are decoded (by 1 to 4 %); two warps have the
    registers for twice as many there, which share each load of x. On Ampere ptxas spills some, and reading is slower.
    """
    here = (layout.bits, layout.group_size, block_m, capability) == (2, 64, 16, launching.HOPPER) and not AMD
    if not here or layout.padded_out % 128:
        return False
    column_tiles = layout.padded_out // 128 * row_tiles
    return launching.split_of_inputs(layout.tiles, column_tiles, programs) >= programs // column_tiles


@triton.jit
def _expert_tile(row_tiles, tile):
    """(expert, first row, last row + 1) of a row tile."""
    expert = tl.load(row_tiles + tile * 3).to(tl.int64)
    return expert, tl.load(row_tiles + tile * 3 + 1), tl.load(row_tiles + tile * 3 + 2)


@triton.jit
def _load_x(pointer, row_ok, k, inputs_left, S: tl.constexpr, EVEN_K: tl.constexpr):
    """Slice S of an iteration of x, [BM, 32]. inputs_left: how many of its inputs there are, if not EVEN_K."""
    mask = row_ok[:, None]
    if not EVEN_K:
        mask = mask & (k < inputs_left)[None, :]
    return tl.load(pointer + S * 32, mask=mask, other=0.0)


@triton.jit
def _integers(
    planes, word, S: tl.constexpr, PER_GROUP: tl.constexpr, BITS: tl.constexpr, SYM: tl.constexpr, NB: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Slice S of an iteration as the left operand [16 * NB, 32]: code - zero, not scaled. word: its meta words."""
    h0, h1, h2 = planes
    summand = h0 if SYM else per_row(half_of(word[S // PER_GROUP], 1, DTYPE), NB)
    return as_matrix(fragment(h0, h1, h2, summand, S % slices_of(BITS), BITS, SYM, DTYPE, PTX), NB)


@triton.jit
def _add_group(
    acc, part, word, group, S: tl.constexpr, SLICES: tl.constexpr, GROUP_SIZE: tl.constexpr, SYM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """acc + scale * part, of the group that ends with slice S of an iteration, whose first group is `group`; per
    channel, whose scale comes last, acc + part."""
    if GROUP_SIZE < 0:
        return acc + part
    else:
        PER_GROUP: tl.constexpr = slices_per_group(SLICES, GROUP_SIZE)
        PER_WORD: tl.constexpr = 2 if SYM else 1  # groups
        which = S // PER_GROUP % PER_WORD if PER_GROUP < SLICES else group % PER_WORD
        scale = half_as_float32(word[S // PER_GROUP // PER_WORD], which, DTYPE)
        return tl.fma(tl.broadcast_to(scale[:, None], acc.shape), part, acc)


@triton.jit
def _add_iteration(
    acc, wp, xp, word, row_ok, k, in_features, it, group,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYM: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """acc + the products of a loop iteration, whose weights and inputs start at wp and xp."""
    DTYPE: tl.constexpr = xp.dtype.element_ty
    PER_TILE: tl.constexpr = slices_of(BITS)
    SLICES: tl.constexpr = TILES * PER_TILE
    PER_GROUP: tl.constexpr = slices_per_group(SLICES, GROUP_SIZE)
    # a fresh accumulator per group: products of integers and x, scaled in float32 once (and it is what keeps triton 3.6
    # from overwriting the operand registers of a wgmma in flight, triton issue 9433)
    part = tl.zeros((BN, BM), dtype=tl.float32)
    for s in tl.static_range(SLICES):
        if s % PER_TILE == 0:
            planes = load_planes(wp + s // PER_TILE * (planes_of(BITS) * 512), BN // 16, BITS)
        xs = _load_x(xp, row_ok, k, in_features - (it * SLICES + s) * 32, s, EVEN_K)
        part = dot(_integers(planes, word, s, PER_GROUP, BITS, SYM, BN // 16, DTYPE, PTX), xs, part)
        if (s + 1) % PER_GROUP == 0:
            acc = _add_group(acc, part, word, group, s, SLICES, GROUP_SIZE, SYM, DTYPE)
            part = tl.zeros((BN, BM), dtype=tl.float32)
    return acc


@triton.jit(do_not_specialize=["rows"])  # one compilation for any number of them
def skinny_kernel(
    x, weight, meta, y, bias, residual, partials, counters, row_tiles, gather,
    rows, in_features, out_features, x_stride, k_tiles, padded_out, words,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SYM: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (padded_out / BN, SPLIT, row tiles). None for bias, residual, row_tiles (dense) and gather (x in order)."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    NB: tl.constexpr = BN // 16
    TILE: tl.constexpr = planes_of(BITS) * 512  # halfwords of a K tile and a row tile
    SLICES: tl.constexpr = TILES * slices_of(BITS)  # of an iteration
    WORDS: tl.constexpr = words_per_iteration(SLICES, GROUP_SIZE, SYM)
    PER_WORD: tl.constexpr = 2 if SYM else 1  # groups
    pn, pk, pm = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row, last_row = pm * BM, rows
    if row_tiles is not None:
        expert, first_row, last_row = _expert_tile(row_tiles, pm)
        weight += expert * (padded_out * k_tiles * (TILE // 16))
        meta += expert * (words * padded_out)
        if bias is not None:
            bias += expert * out_features
        if first_row >= last_row:  # the table is as long as it could ever have to be
            return
    rm = first_row + tl.arange(0, BM)
    row_ok = rm < last_row
    rn = pn * BN + tl.arange(0, BN)
    start, stop = part_of_inputs(pk, k_tiles, TILES, SPLIT)
    half_slice = tl.arange(0, 2 * NB)
    wp = tile_pointers(weight, half_slice, pn * NB, start, k_tiles, NB, BITS, TILES)
    rx = rm
    if gather is not None:
        rx = tl.load(gather + rm, mask=row_ok, other=0)
    k = tl.arange(0, 32)
    xp = x + rx.to(tl.int64)[:, None] * x_stride + (start * SLICES * 32 + k)[None, :]
    mp = meta + rn
    word = load_words(mp + first_group(start, SLICES, GROUP_SIZE) // PER_WORD * padded_out, padded_out, WORDS)

    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for it in tl.range(start, stop):
        group = first_group(it, SLICES, GROUP_SIZE)
        if GROUP_SIZE > 0:
            # loaded an iteration ahead, into registers: too narrow for asynchronous copies, they would stall the loop
            ahead = first_group(tl.minimum(it + 1, stop - 1), SLICES, GROUP_SIZE) // PER_WORD
            next_word = load_words(mp + ahead * padded_out, padded_out, WORDS)
        acc = _add_iteration(
            acc, wp, xp, word, row_ok, k, in_features, it, group, BITS, GROUP_SIZE, SYM, EVEN_K, BN, BM, TILES, PTX
        )
        if GROUP_SIZE > 0:
            word = next_word
        wp += TILES * TILE
        xp += SLICES * 32
    if GROUP_SIZE < 0:
        acc = acc * half_as_float32(word[0], 0, DTYPE)[:, None]

    if SPLIT == 1:
        finish(acc, y, bias, residual, pn, rm, row_ok, out_features, BN, BM, GATE_UP)
    else:
        tile = pm * tl.num_programs(0) + pn
        parts = tile_of_parts(partials, tile, SPLIT, BN, BM)
        if store_part(parts, acc, counters, tile, pk, SPLIT, BN * BM):
            total = total_of_parts(parts, SPLIT, BN * BM)
            finish(total, y, bias, residual, pn, rm, row_ok, out_features, BN, BM, GATE_UP)
            tl.store(counters + tile, 0)  # ready for the next launch


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
    workspace: launching.Workspace | None = None,
) -> torch.Tensor:
    """y = x @ W^T + bias + residual, or with gate_up SiLU(gate) * up + residual. Everything on one device.

    Args:
        x: layout.dtype [M, K], rows of any stride, each in one piece.
        weight: int16, layout.weight_shape.
        meta: int32, layout.meta_shape.
        layout: of the packed weight W [N, K].
        config: block_n divides layout.padded_out, tiles divides layout.tiles.
        bias: layout.dtype [N], with gate_up interleaved like the weight.
        residual: like y.
        gate_up: rows of W are those of `layout.interleave_gate_up`; N is a multiple of 16.
        out: y itself, layout.dtype or float32, contiguous.
        workspace: of partial sums, where the inputs are split; that of the current stream if None.

    Returns:
        y [M, N], with gate_up [M, N / 2], layout.dtype unless `out` is float32.

    Raises:
        ValueError: an argument does not fit `layout`.
    """
    layout.check(weight, meta)
    return _launch(x, weight, meta, layout, config, launching.Ending(bias, residual, gate_up, out), workspace)


def launch_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    layout: Layout,
    config: Config,
    row_tiles: torch.Tensor,
    *,
    gather: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gate_up: bool = False,
    out: torch.Tensor | None = None,
    workspace: launching.Workspace | None = None,
) -> torch.Tensor:
    """The same for rows sorted by expert: y[i] = x[gather[i]] @ W[expert of i]^T + bias[expert of i].

    Args:
        x: layout.dtype [M, K], rows of any stride, each in one piece.
        weight: int16 [E, *layout.weight_shape], contiguous.
        meta: int32 [E, *layout.meta_shape], contiguous.
        layout: of one expert's W [N, K].
        config: as for `launch`.
        row_tiles: int32 [T, 3] of `expert_tiles` with config.block_m.
        gather: int32 [P], the row of x for each of the P sorted rows; None where x [P, K] is sorted itself.
        bias: layout.dtype [E, N].
        gate_up: as for `launch`.
        out: y itself. Rows that are in no tile stay as they are.
        workspace: as for `launch`.

    Returns:
        y [P, N], with gate_up [P, N / 2].

    Raises:
        ValueError: an argument does not fit `layout`.
    """
    if weight.ndim != 6 or meta.ndim != 3 or weight.shape[0] != meta.shape[0]:
        raise ValueError(f"weight is {list(weight.shape)} and meta {list(meta.shape)}, expected both [experts, ...]")
    if not (weight.is_contiguous() and meta.is_contiguous()):
        raise ValueError(f"weight has strides {weight.stride()}, meta {meta.stride()}, expected contiguous tensors")
    layout.check(weight[0], meta[0])
    launching.check_tensor("row_tiles", row_tiles, torch.int32, (row_tiles.shape[0], 3), x.device)
    if gather is not None:
        launching.check_tensor("gather", gather, torch.int32, (len(gather),), x.device)
    return _launch(
        x, weight, meta, layout, config, launching.Ending(bias, None, gate_up, out), workspace, (row_tiles, gather)
    )


def expert_tiles(expert_start: torch.Tensor, rows: int, block_m: int) -> torch.Tensor:
    """int32 [T, 3] of (expert, first row, last row), tiles of at most block_m rows; unused ones are empty.

    expert_start int32 [E + 1]: expert e has the sorted rows [expert_start[e], expert_start[e + 1]). T depends on `rows`
    (their number) and E alone, and nothing waits for the GPU: a CUDA graph can hold it.
    """
    experts = expert_start.numel() - 1
    tiles = min(rows, experts + rows // block_m)
    start, end = expert_start[:-1].long(), expert_start[1:].long()
    last_tile = torch.cumsum(-((start - end) // block_m), 0)  # rounded up
    tile = torch.arange(tiles, device=expert_start.device)
    expert = torch.searchsorted(last_tile, tile, right=True).clamp(max=experts - 1)
    before = torch.where(expert > 0, last_tile[expert - 1], 0)
    first = start[expert] + (tile - before) * block_m
    return torch.stack([expert, first, torch.minimum(first + block_m, end[expert])], 1).to(torch.int32)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    layout: Layout,
    config: Config,
    ending: launching.Ending,
    workspace: launching.Workspace | None,
    sorting: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """sorting: row_tiles and gather of `launch_experts`."""
    launching.check_input(x, weight, layout)
    launching.check_blocks(layout, config.block_n, config.tiles)
    launching.check_warps(config.warps, x.device)
    row_tiles, gather = sorting or (None, None)
    rows = len(x) if gather is None else len(gather)
    experts = () if row_tiles is None else weight.shape[:1]
    out = ending.output(rows, layout, x.device, experts)
    if rows == 0:
        return out
    m_tiles = triton.cdiv(rows, config.block_m) if row_tiles is None else len(row_tiles)
    n_tiles = layout.padded_out // config.block_n
    split = min(config.split, layout.tiles // config.tiles)  # a program without inputs would be waste
    partials, counters = launching.split_buffers(
        workspace, x.device, split, n_tiles * m_tiles, config.block_n * config.block_m
    )
    with torch.cuda.device_of(x):
        skinny_kernel[(n_tiles, split, m_tiles)](
            x, weight, meta, out, ending.bias, ending.residual, partials, counters, row_tiles, gather,
            rows, layout.in_features, layout.out_features, x.stride(0), layout.tiles, layout.padded_out, layout.words,
            BITS=layout.bits, GROUP_SIZE=layout.group_size, SYM=layout.sym, GATE_UP=ending.gate_up,
            EVEN_K=layout.in_features == layout.padded_in, BN=config.block_n, BM=config.block_m, SPLIT=split,
            TILES=config.tiles, PTX=PTX,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out
