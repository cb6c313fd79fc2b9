# SPDX-License-Identifier: Apache-2.0
"""33 rows of x and more on Hopper, in Gluon: y^T = W x^T with the packed weight as the tensor core's left operand,
straight from global memory into registers.

    y[m, n] = sum over k of w[n, k] * x[m, k] + bias[n],   w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] in 16 bits

    producer, 1 warp         copies tiles of x [BM, 128] into a ring in shared memory (TMA)
    consumers, 2 x 4 warps   own 64 rows of W each: while the tensor core works on one tile of 128 inputs, they decode
                             the next from registers and load the one after it

                 ring in shared memory, STAGES x [BM, 128]
    producer --> | x turn t | x turn t+1 | x turn t+2 | ...      ready[stage]: TMA has written; free: both have read
                      |           |
    consumer 0   W[64, 128] @ x^T  -> y^T [ 0 .. 63, BM]         program (block, part): block % ceil(M / BM) is the tile
    consumer 1   W[64, 128] @ x^T  -> y^T [64 .. 127, BM]        of rows of x, the quotient that of 128 rows of W; it
                                                                 walks `part_turns` turns of 128 inputs

    time, of a consumer:   wgmma a(t)          wgmma b(t+1)        wgmma a(t+2)
                           decode b(t+1)       decode a(t+2)       ...
                           load t+2            load t+3

    SPLIT > 1: each consumer stores its sums [64, BM] to `partials`; the last to arrive adds them (epilogue.py)

A weight never touches shared memory: frag32 hands every lane the codes of its own operand registers, and the change
of layout to the operand is asserted to be a renaming of registers (`assert_trivial`), so that compiling proves it. The
loop does two tiles at a time, which saves moving the second operand to the registers of the first.

The two groups of consumers meet nowhere in the loop. Each tells the producer by itself that it is through with a tile,
so that one keeps the tensor core busy while the other waits or decodes.

No GPU has run it. Its PTX is executed by the machine in tests/kernels/machine, with no race and no hazard, and
scripts/kernel_report.py reads what ptxas makes of it: no spills, no register of a wgmma touched that may still run.
lowbit's backend compares its results on the GPU before the rule takes it.

Cf. Machete (vLLM), whose packed weight is the left operand from registers too; CUTLASS's warp-specialised kernels.
"""

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lowbit_kernels import launching
from lowbit_kernels.decode import fragment, half_of, scaled
from lowbit_kernels.epilogue import store_part
from lowbit_kernels.layout import PER_CHANNEL, Layout

STEP = gl.constexpr(128)  # inputs of a turn: one K tile of four bits, two of eight
ROWS = gl.constexpr(64)  # of W, what the four warps of a wgmma hold
CONSUMERS = gl.constexpr(2)
# Sums of 64 x 256 and two operands fill the consumers' registers; of the producer only one thread does anything
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
ONE_GROUP = 2**30  # PER_CHANNEL as a group size
SHARED_MEMORY = 226 * 1024  # of a program, less some for barriers

# Renamed between Triton 3.6 and 3.9
tma_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)


@dataclass(frozen=True)
class Config(launching.Config):
    """block_m: rows of a program, stages: tiles of x in shared memory, split: programs that share the inputs of an
    output tile."""

    block_m: int = launching.one_of(128, choices=(64, 128, 256))
    stages: int = launching.at_least(2, default=4)
    split: int = launching.at_least(1, default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages * self.block_m * STEP.value * 2 > SHARED_MEMORY:
            raise ValueError(f"stages is {self.stages}, too many for block_m {self.block_m} in shared memory")
        if self.block_m == 256 and self.split > 1:
            raise ValueError(f"split is {self.split}, expected 1 for block_m 256: adding parts would spill registers")


def default_config(layout: Layout, rows: int, programs: int) -> Config:
    """A start: 64 or 128 rows, and the inputs split until there are about `programs` programs."""
    block_m = 64 if rows <= 64 else 128
    tiles = -(-layout.padded_out // (CONSUMERS.value * ROWS.value)) * -(-rows // block_m)
    most = launching.split_of_inputs(layout.padded_in // STEP.value, tiles, programs)
    return Config(block_m, split=max(split for split in (1, 2, 4) if split <= most))


def layout_refusal(layout: Layout, config: Config) -> str | None:
    """Why this kernel cannot multiply with a weight of this layout, or None."""
    if layout.bits not in (4, 8):
        return f"bits is {layout.bits}, expected 4 or 8"
    if layout.padded_in % STEP.value:
        return f"in_features are padded to {layout.padded_in}, expected a multiple of {STEP.value}"
    if layout.bits == 8 and layout.group_size in (32, 64):
        return f"group_size is {layout.group_size}, expected at least {STEP.value} for 8 bits"
    if config.block_m == 256 and (layout.bits == 8 or layout.group_size in (32, 64)):
        return f"block_m is 256, expected at most 128 for 8 bits or groups under {STEP.value}: registers would spill"
    return None


def refusal(layout: Layout, config: Config, x: torch.Tensor) -> str | None:
    """Why this kernel cannot multiply x with a weight of this layout, or None."""
    if reason := layout_refusal(layout, config):
        return reason
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        return f"x is on {x.device}, expected a GPU of compute capability 9.0"
    if x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        return f"rows of x are {x.stride(0)} elements apart at {x.data_ptr():#x}, expected multiples of 16 bytes"
    return None


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    layout: Layout,
    config: Config,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: launching.Workspace | None = None,
) -> torch.Tensor:
    """y = x @ W^T + bias: weights rounded once more when they are scaled, sums in float32, one rounding at the end.

    The result depends on config, not on which program finishes first. Everything on one Hopper GPU.

    Args:
        x: layout.dtype [M, K], rows a multiple of 16 bytes apart, the first aligned to 16 bytes.
        weight: int16, layout.weight_shape, of 4 or 8 bits.
        meta: int32, layout.meta_shape.
        layout: of the packed weight W [N, K].
        config: see `refusal`.
        bias: layout.dtype [N].
        out: y itself, layout.dtype, contiguous.
        workspace: of partial sums, where the inputs are split; that of the current stream if None.

    Returns:
        y [M, N], layout.dtype.

    Raises:
        ValueError: an argument does not fit `layout`, or `refusal` has a reason.
    """
    layout.check(weight, meta)
    rows = len(x)
    launching.check_input(x, weight, layout)
    launching.check_blocks(layout, ROWS.value)
    out = launching.Ending(bias=bias, out=out).output(rows, layout, x.device)
    if out.dtype != x.dtype:
        raise ValueError(f"out is {out.dtype}, expected {x.dtype}")
    if why := refusal(layout, config, x):
        raise ValueError(why)
    if rows == 0:
        return out

    turns = layout.padded_in // STEP.value
    # an even number for each part: one that ended in the middle of a loop's two turns would run on into the next
    part = triton.cdiv(turns, 2 * config.split) * 2
    split = triton.cdiv(turns, part)  # a program without inputs would be waste
    blocks = triton.cdiv(rows, config.block_m) * triton.cdiv(layout.padded_out, ROWS.value * CONSUMERS.value)
    partials, counters = launching.split_buffers(
        workspace, x.device, split, blocks * CONSUMERS.value, ROWS.value * config.block_m
    )
    tiles = TensorDescriptor.from_tensor(x, [config.block_m, STEP.value], x_layout())
    with torch.cuda.device_of(x):
        hopper_kernel[blocks, split](
            tiles, weight, meta, out, bias, partials, counters,
            rows, layout.out_features, layout.padded_out, turns, part,
            BITS=layout.bits, GROUP=ONE_GROUP if layout.group_size == PER_CHANNEL else layout.group_size,
            SYM=layout.sym, BM=config.block_m, STAGES=config.stages, SPLIT=split,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def x_layout() -> gl.NVMMASharedLayout:
    """How TMA puts tiles of x into shared memory, for wgmma to read."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@triton.constexpr_function
def _words_of_turn(group, sym):
    return STEP.value // group // (2 if sym else 1) or 1


@gluon.jit
def _load(at, turn, last, SIZE: gl.constexpr):
    """Codes of a turn; past the end those of the last, whose x is 0."""
    return gl.load(at + gl.minimum(turn, last) * SIZE)


@gluon.jit
def _load_words(at, turn, last, stride, GROUP: gl.constexpr, SYM: gl.constexpr):
    """Meta words of a turn, as a tuple. A word that serves whole turns has the scale in its low half."""
    turn = gl.minimum(turn, last)
    if GROUP < STEP:
        COUNT: gl.constexpr = _words_of_turn(GROUP, SYM)
        words = (gl.load(at + turn * COUNT * stride),)
        for i in gl.static_range(1, COUNT):
            words = words + (gl.load(at + (turn * COUNT + i) * stride),)  # noqa: RUF005 - kernels know no unpacking
    else:
        group = turn // (GROUP // STEP)
        if SYM:
            words = (gl.load(at + (group // 2) * stride) >> (16 * (group % 2)),)
        else:
            words = (gl.load(at + group * stride),)
    return words


@gluon.jit
def _spread(v, SHAPE: gl.constexpr):
    """[row tile, g, rh] -> SHAPE, that of the codes: a row's number for each of them."""
    return v[None, None, :, :, None, None, :, None].broadcast_to(SHAPE)


@gluon.jit
def _slice(
    codes, words, P: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, SYM: gl.constexpr, DTYPE: gl.constexpr
):
    """Slice `P` of a K tile, decoded and scaled."""
    NUMBER: gl.constexpr = P * 32 // GROUP
    if SYM:
        scale = _spread(half_of(words[NUMBER // 2], NUMBER % 2, DTYPE), codes.shape)
        summand = scale
    else:
        scale = _spread(half_of(words[NUMBER], 0, DTYPE), codes.shape)
        summand = _spread(half_of(words[NUMBER], 1, DTYPE), codes.shape)
    return scaled(fragment(codes, codes, codes, summand, P, BITS, SYM, DTYPE, True), scale, DTYPE, True)


@gluon.jit
def _operand(
    codes, words, BITS: gl.constexpr, GROUP: gl.constexpr, SYM: gl.constexpr, DTYPE: gl.constexpr,
    CODES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The left operand [ROWS, STEP] of a turn. codes: [K tile, half slice kb, row tile nt 4] x [g, c, kh, rh, e]."""
    codes = gl.convert_layout(gl.reshape(codes, (BITS // 4, 2, 4, 8, 4, 2, 2, 2)), CODES, assert_trivial=True)
    value = gl.join(_slice(codes, words, 0, BITS, GROUP, SYM, DTYPE), _slice(codes, words, 1, BITS, GROUP, SYM, DTYPE))
    # rows nt, rh, g; inputs K tile, slice, kb, kh, c, e
    if BITS == 4:
        more = gl.join(
            _slice(codes, words, 2, BITS, GROUP, SYM, DTYPE), _slice(codes, words, 3, BITS, GROUP, SYM, DTYPE)
        )
        value = gl.permute(gl.join(value, more), (2, 6, 3, 0, 9, 8, 1, 5, 4, 7))
    else:
        value = gl.permute(value, (2, 6, 3, 0, 8, 1, 5, 4, 7))
    return gl.convert_layout(gl.reshape(value, (ROWS, STEP)), LAYOUT, assert_trivial=True)


@gluon.jit
def _produce(x, ring, ready, free, row, first, turns, BM: gl.constexpr, STAGES: gl.constexpr):
    """Tiles of x in order. Rows and columns outside of x arrive as zeros."""
    for turn in range(turns):
        stage = turn % STAGES
        mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), BM * STEP * 2)
        tma_load(x, [row, (first + turn) * STEP], ready.index(stage), ring.index(stage))


@gluon.jit
def _start(a, acc, ring, ready, turn, STAGES: gl.constexpr):
    """Start acc + a x^T of a turn once its x is there."""
    stage = turn % STAGES
    mbarrier.wait(ready.index(stage), (turn // STAGES) & 1)
    return warpgroup_mma(a, ring.index(stage).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _store(acc, tile, y, bias, row, column, rows, out_features, BM: gl.constexpr):
    """acc [ROWS, BM] to y [BM, ROWS]: turned round in shared memory, for neighbouring lanes to write neighbours."""
    SUMS: gl.constexpr = acc.type.layout
    n = column + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    if bias is not None:
        acc += gl.load(bias + n, mask=n < out_features, other=0.0).to(gl.float32)[:, None]
    tile.permute((1, 0)).store(acc.to(y.dtype.element_ty))
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    value = tile.load(LINES)
    m = row + gl.arange(0, BM, layout=gl.SliceLayout(1, LINES))
    n = column + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LINES))
    at = y + m.to(gl.int64)[:, None] * out_features + n[None, :]
    gl.store(at, value, mask=(m < rows)[:, None] & (n < out_features)[None, :])


@gluon.jit
def _store_of_last(
    acc, partials, counters, consumer, tile, y, bias, row, column, rows, out_features,
    BM: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """acc to the partial sums; the last program to arrive stores all parts, added in the order of the inputs."""
    SUMS: gl.constexpr = acc.type.layout
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, SUMS))
    at = partials + consumer.to(gl.int64) * (SPLIT * ROWS * BM) + (n[:, None] * BM + m[None, :])
    if store_part(at, acc, counters, consumer, gl.program_id(1), SPLIT, ROWS * BM):
        total = gl.load(at, cache_modifier=".cg")
        for i in range(1, SPLIT):
            total += gl.load(at + i * (ROWS * BM), cache_modifier=".cg")
        _store(total, tile, y, bias, row, column, rows, out_features, BM)
        gl.store(counters + consumer, 0)


@gluon.jit
def _words_at(meta, column, padded_out, CODES: gl.constexpr):
    """Where a consumer's meta words lie, [row tile, g, rh]: a lane loads one for each row of its codes, which are laid
    out as CODES, not one for each code."""
    HALVES: gl.constexpr = gl.SliceLayout(4, gl.SliceLayout(5, gl.SliceLayout(7, CODES)))  # K tile, kb, nt, g, rh
    GRID: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, HALVES))  # nt, g, rh
    nt = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, GRID)))
    g = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, GRID)))
    rh = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, GRID)))
    first_of_tile = gl.minimum(column // 16 + nt, padded_out // 16 - 1) * 16
    return meta + (first_of_tile[:, None, None] + g[None, :, None] + 8 * rh[None, None, :])


@gluon.jit
def _consume(
    weight, meta, y, bias, partials, counters, ring, ready, free, done, row, column, rows, out_features, padded_out,
    all_turns, first, turns, PART: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    SYM: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Rows `PART` * 64 and on of the program's 128."""
    TILES: gl.constexpr = BITS // 4
    SIZE: gl.constexpr = TILES * 512
    DTYPE: gl.constexpr = y.dtype.element_ty
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    # a warp holds 16 rows of the operand: row tile `warp`, for both half slices, 16 bytes a lane
    PACKED: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    piece = gl.arange(0, 8 * TILES, layout=gl.SliceLayout(1, PACKED))  # (K tile, kb, row tile)
    halfword = gl.arange(0, 256, layout=gl.SliceLayout(0, PACKED))
    column += PART * ROWS
    # an odd number of 64 rows: the last consumer reads rows that exist, and stores nothing
    tile = gl.minimum(column // 16 + piece % 4, padded_out // 16 - 1)
    codes_at = (weight + tile.to(gl.int64) * (all_turns * SIZE) + piece // 4 * 256)[:, None] + halfword[None, :]
    # the same in dimensions (K tile, kb, row tile, g, c, kh, rh, e): lane 4g + c, halfword 4kh + 2rh + e
    CODES: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 8, 4, 1, 1, 1], [1, 1, 4, 1, 1, 1, 1, 1], [7, 6, 5, 4, 3, 2, 1, 0]
    )
    words_at = _words_at(meta, column, padded_out, CODES)

    last = all_turns - 1
    acc = gl.zeros((ROWS, BM), gl.float32, SUMS)
    codes = _load(codes_at, first, last, SIZE)
    words = _load_words(words_at, first, last, padded_out, GROUP, SYM)
    a = _operand(codes, words, BITS, GROUP, SYM, DTYPE, CODES, LEFT)
    codes = _load(codes_at, first + 1, last, SIZE)
    words = _load_words(words_at, first + 1, last, padded_out, GROUP, SYM)
    for turn in range(0, turns, 2):
        running = _start(a, acc, ring, ready, turn, STAGES)
        b = _operand(codes, words, BITS, GROUP, SYM, DTYPE, CODES, LEFT)
        codes = _load(codes_at, first + turn + 2, last, SIZE)
        words = _load_words(words_at, first + turn + 2, last, padded_out, GROUP, SYM)
        acc = warpgroup_mma_wait(0, deps=[running])
        mbarrier.arrive(free.index(turn % STAGES))

        running = _start(b, acc, ring, ready, turn + 1, STAGES)
        a = _operand(codes, words, BITS, GROUP, SYM, DTYPE, CODES, LEFT)
        codes = _load(codes_at, first + turn + 3, last, SIZE)
        words = _load_words(words_at, first + turn + 3, last, padded_out, GROUP, SYM)
        acc = warpgroup_mma_wait(0, deps=[running])
        mbarrier.arrive(free.index((turn + 1) % STAGES))

    # each consumer turns its sums round in a tile of x, which the other must have read
    mbarrier.arrive(done.index(0))
    mbarrier.wait(done.index(0), 0)
    space = ring.index(PART).slice(0, ROWS, dim=1)
    if SPLIT == 1:
        _store(acc, space, y, bias, row, column, rows, out_features, BM)
    else:
        consumer = gl.program_id(0) * CONSUMERS + PART
        _store_of_last(acc, partials, counters, consumer, space, y, bias, row, column, rows, out_features, BM, SPLIT)


@gluon.jit
def hopper_kernel(
    x, weight, meta, y, bias, partials, counters, rows, out_features, padded_out, all_turns, part_turns,
    BITS: gl.constexpr, GROUP: gl.constexpr, SYM: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    # programs that run at the same time share rows of W, which are larger than x
    blocks_down = gl.cdiv(rows, BM)
    row = gl.program_id(0) % blocks_down * BM
    column = gl.program_id(0) // blocks_down * (CONSUMERS * ROWS)
    first = gl.program_id(1) * part_turns
    turns = gl.minimum(part_turns, (all_turns - first + 1) // 2 * 2)

    ring = gl.allocate_shared_memory(x.dtype, [STAGES, BM, STEP], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    mbarrier.init(done.index(0), count=CONSUMERS)
    fence_async_shared()  # TMA must see the barriers ready
    gl.warp_specialize(
        [
            (_consume, (
                weight, meta, y, bias, partials, counters, ring, ready, free, done, row, column, rows,
                out_features, padded_out, all_turns, first, turns, 0, BITS, GROUP, SYM, BM, STAGES, SPLIT,
            )),
            (_consume, (
                weight, meta, y, bias, partials, counters, ring, ready, free, done, row, column, rows,
                out_features, padded_out, all_turns, first, turns, 1, BITS, GROUP, SYM, BM, STAGES, SPLIT,
            )),
            (_produce, (x, ring, ready, free, row, first, turns, BM, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
