# SPDX-License-Identifier: Apache-2.0
"""Few rows (1 to about 32): y = x @ W^T where reading the weight is all the time there is.

Weights are the left operand, W @ x^T: the tensor core's 16 rows are filled by output features and its 8 columns by the
few rows of x. The inputs are split over programs, so that a small weight still has enough of them to fill the GPU.

The same body serves a fused gate_up projection (SiLU(gate) * up in the epilogue, rows by `layout.interleave_gate_up`)
and experts (rows of x sorted by expert, a table says which rows belong to which expert).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lowbit_kernels.decode import (
    AMD,
    PTX,
    as_matrix,
    dot,
    first_group,
    fragment,
    half_as_float32,
    half_of,
    load_plane,
    load_words,
    per_row,
    round_to,
    slices_of,
    slices_per_group,
    words_per_iteration,
)
from lowbit_kernels.layout import Layout

# Rows of x that a matrix instruction takes at least: fewer would be multiplied without one, far slower
FEWEST_ROWS = 16 if AMD else 8


def check_config(config, **expected: tuple[int, ...] | int) -> None:
    """Raise ValueError unless each field named is one of a tuple, or at least a number."""
    for name, wanted in expected.items():
        value = getattr(config, name)
        if isinstance(wanted, int) and value < wanted:
            raise ValueError(f"{name} is {value}, expected at least {wanted}")
        if isinstance(wanted, tuple) and value not in wanted:
            raise ValueError(f"{name} is {value}, expected one of {wanted}")


@dataclass(frozen=True)
class Config:
    """block_n: out_features of a program, block_m: rows, split: programs that share the inputs of an output tile,
    tiles: K tiles of a loop iteration; warps, stages: of triton (four warps or more let it pick wgmma)."""

    block_n: int = 64
    block_m: int = 8
    split: int = 1
    tiles: int = 1
    warps: int = 2
    stages: int = 3

    def __post_init__(self):
        check_config(self, block_n=(16, 32, 64, 128, 256), block_m=(8, 16, 32, 64), split=1, stages=1)
        check_config(self, tiles=(1, 2, 4), warps=(1, 2, 4, 8))


def default_config(layout: Layout, rows: int, programs: int = 528) -> Config:
    """A start: iterations of 256 inputs where the K tiles allow it, and about `programs` programs by splitting."""
    most = {8: 4, 4: 2}.get(layout.bits, 1)
    tiles = next(t for t in (4, 2, 1) if t <= most and layout.tiles % t == 0)
    block_m = max(FEWEST_ROWS, 8 if rows <= 8 else 16 if rows <= 16 else 32)
    column_tiles = layout.padded_out // 64 * -(-rows // block_m)
    split = max(1, min(layout.tiles // tiles // 2, programs // column_tiles, 16))
    return Config(block_m=block_m, split=split, tiles=tiles)


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
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    PER_TILE: tl.constexpr = slices_of(BITS)
    SLICES: tl.constexpr = TILES * PER_TILE  # of an iteration
    PER_GROUP: tl.constexpr = slices_per_group(SLICES, GROUP_SIZE)
    WORDS: tl.constexpr = words_per_iteration(SLICES, GROUP_SIZE, SYM)
    PER_WORD: tl.constexpr = 2 if SYM else 1  # groups
    pn = tl.program_id(0)
    pk = tl.program_id(1)
    pm = tl.program_id(2)

    first_row = pm * BM
    last_row = rows
    if row_tiles is not None:  # experts: (expert, first row, last row) of this tile
        expert = tl.load(row_tiles + pm * 3).to(tl.int64)
        first_row = tl.load(row_tiles + pm * 3 + 1)
        last_row = tl.load(row_tiles + pm * 3 + 2)
        weight += expert * (padded_out * k_tiles * (PLANES * 32))
        meta += expert * (words * padded_out)
        if bias is not None:
            bias += expert * out_features
        if first_row >= last_row:  # the table is as long as it could ever have to be
            return
    rm = first_row + tl.arange(0, BM)
    row_ok = rm < last_row
    rn = pn * BN + tl.arange(0, BN)

    iterations = k_tiles // TILES
    start = iterations * pk // SPLIT
    stop = iterations * (pk + 1) // SPLIT
    half_slice = tl.arange(0, 2 * NB)  # (kb, row tile)
    block = ((pn * NB + half_slice % NB) * k_tiles + start * TILES) * (2 * PLANES) + half_slice // NB
    wp = weight + block[:, None] * 256 + tl.arange(0, 256)[None, :]
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
        # a fresh accumulator per group: products of integers and x, scaled in float32 once (and it is what keeps
        # triton 3.6 from overwriting the operand registers of a wgmma in flight, triton issue 9433)
        part = tl.zeros((BN, BM), dtype=tl.float32)
        for s in tl.static_range(SLICES):
            if s % PER_TILE == 0:
                plane = wp + s // PER_TILE * (PLANES * 512)
                h0 = load_plane(plane, NB)
                h1 = load_plane(plane + 512, NB) if PLANES == 3 else h0
                h2 = load_plane(plane + 1024, NB) if PLANES == 3 else h0
            mask = row_ok[:, None]
            if not EVEN_K:
                mask = mask & (k < in_features - (it * SLICES + s) * 32)[None, :]
            xs = tl.load(xp + s * 32, mask=mask, other=0.0)
            summand = h0 if SYM else per_row(half_of(word[s // PER_GROUP], 1, DTYPE), NB)
            a = fragment(h0, h1, h2, summand, s % PER_TILE, BITS, SYM, DTYPE, PTX)
            part = dot(as_matrix(a, NB), xs, part)
            if (s + 1) % PER_GROUP == 0:
                if GROUP_SIZE < 0:
                    acc += part
                else:
                    which = s // PER_GROUP % PER_WORD if PER_GROUP < SLICES else group % PER_WORD
                    scale = half_as_float32(word[s // PER_GROUP // PER_WORD], which, DTYPE)
                    acc = tl.fma(tl.broadcast_to(scale[:, None], (BN, BM)), part, acc)
                part = tl.zeros((BN, BM), dtype=tl.float32)
        if GROUP_SIZE > 0:
            word = next_word
        wp += TILES * PLANES * 512
        xp += SLICES * 32
    if GROUP_SIZE < 0:
        acc = acc * half_as_float32(word[0], 0, DTYPE)[:, None]

    if SPLIT == 1:
        finish(acc, y, bias, residual, pn, rm, row_ok, out_features, BN, BM, GATE_UP)
    else:
        tile = pm * tl.num_programs(0) + pn
        pp = (
            partials
            + tile.to(tl.int64) * (SPLIT * BN * BM)
            + tl.arange(0, BN)[:, None] * BM
            + tl.arange(0, BM)[None, :]
        )
        tl.store(pp + pk * (BN * BM), acc)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:  # the last program adds all partial sums, always in the same order
            total = tl.load(pp, cache_modifier=".cg")
            for i in tl.static_range(1, SPLIT):
                total += tl.load(pp + i * (BN * BM), cache_modifier=".cg")
            finish(total, y, bias, residual, pn, rm, row_ok, out_features, BN, BM, GATE_UP)
            tl.store(counters + tile, 0)  # ready for the next launch


@triton.jit
def finish(
    acc, y, bias, residual, pn, rm, row_ok, out_features,
    BN: tl.constexpr, BM: tl.constexpr, GATE_UP: tl.constexpr,
):  # fmt: skip
    """Bias, SiLU(gate) * up and residual in float32, one rounding, and the store of y [rows, features]."""
    if bias is not None:
        rn = pn * BN + tl.arange(0, BN)
        acc += tl.load(bias + rn, mask=rn < out_features, other=0.0).to(tl.float32)[:, None]
    WIDTH: tl.constexpr = BN // 2 if GATE_UP else BN
    features = out_features
    if GATE_UP:  # rows g and g + 8 of a fragment are in one thread
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
        acc = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (WIDTH, BM))
        features = out_features // 2
    ro = pn * WIDTH + tl.arange(0, WIDTH)
    offset = rm.to(tl.int64)[None, :] * features + ro[:, None]
    mask = row_ok[None, :] & (ro < features)[:, None]
    if residual is not None:
        acc += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offset, round_to(acc, y.dtype.element_ty), mask=mask)


class Workspace:
    """Partial sums and counters of split launches on one stream; the counters are zero between launches.

    Buffers only grow and are never freed: a CUDA graph may have captured the address of an old one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.partials: list[torch.Tensor] = []
        self.counters: list[torch.Tensor] = []

    def get(self, elements: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [>= elements], not initialised, and int32 [>= tiles], zero."""
        if not self.partials or self.partials[-1].numel() < elements:
            size = max(elements, 2 * self.partials[-1].numel() if self.partials else 1 << 20)
            self.partials.append(torch.empty(size, dtype=torch.float32, device=self.device))
        if not self.counters or self.counters[-1].numel() < tiles:
            size = max(tiles, 2 * self.counters[-1].numel() if self.counters else 1 << 12)
            self.counters.append(torch.zeros(size, dtype=torch.int32, device=self.device))
        return self.partials[-1], self.counters[-1]


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def workspace_of(device: torch.device) -> Workspace:
    """The workspace of the current stream: launches on one stream follow each other, those on two must not share."""
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _workspaces:
        _workspaces[key] = Workspace(device)
    return _workspaces[key]


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
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """y [M, N] = x @ W^T + bias + residual; with gate_up y [M, N/2] = SiLU(gate) * up + residual.

    x layout.dtype [M, K], rows of any stride; weight, meta as `layout` says; bias [N] (interleaved like the weight for
    gate_up); residual like y, which is x.dtype or the dtype of `out` (float32 too). Everything on one device.
    """
    layout.check(weight, meta)
    return _launch(x, weight, meta, layout, config, bias, residual, gate_up, out, workspace, None, None, len(x))


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
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """The same for rows sorted by expert: y[i] = x[gather[i]] @ W[expert of i]^T + bias[expert of i].

    weight int16 [E, ...], meta int32 [E, ...]: `layout` of one expert, stacked. row_tiles: of `expert_tiles` with
    config.block_m. gather int32 [P]: row of x for each of the P sorted rows, None when x [P, K] is sorted itself.
    """
    if weight.ndim != 6 or meta.ndim != 3 or weight.shape[0] != meta.shape[0]:
        raise ValueError(f"weight is {list(weight.shape)} and meta {list(meta.shape)}, expected both [experts, ...]")
    if not (weight.is_contiguous() and meta.is_contiguous()):
        raise ValueError(f"weight has strides {weight.stride()}, meta {meta.stride()}, expected contiguous tensors")
    layout.check(weight[0], meta[0])
    check_tensor("row_tiles", row_tiles, torch.int32, (row_tiles.shape[0], 3), x.device)
    rows = len(x) if gather is None else len(gather)
    if gather is not None:
        check_tensor("gather", gather, torch.int32, (rows,), x.device)
    return _launch(x, weight, meta, layout, config, bias, None, gate_up, out, workspace, row_tiles, gather, rows)


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


def check_tensor(name, tensor, dtype, shape, device):
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != tuple(shape) or tensor.device != device:
        kinds = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
            f"expected {kinds} {list(shape)} on {device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")


def check_launch(x, weight, layout, block_n, bias, residual, gate_up, out, rows, experts=()) -> torch.Tensor:
    """Raise ValueError on arguments that do not fit `layout`; returns `out`, allocated if it is None."""
    if x.dtype != layout.dtype or x.ndim != 2 or x.shape[1] != layout.in_features or x.stride(1) != 1:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}, "
            f"expected {layout.dtype} [M, {layout.in_features}] with rows in one piece"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}, expected one device")
    if layout.padded_out % block_n:
        raise ValueError(f"block_n {block_n} does not divide the {layout.padded_out} padded out_features")
    if gate_up and layout.out_features % 16:
        raise ValueError(f"gate_up has {layout.out_features} out_features, expected a multiple of 16, interleaved")
    features = layout.out_features // 2 if gate_up else layout.out_features
    if out is None:
        out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    check_tensor("out", out, (x.dtype, torch.float32), (rows, features), x.device)
    if residual is not None:
        check_tensor("residual", residual, out.dtype, out.shape, x.device)
    if bias is not None:
        check_tensor("bias", bias, x.dtype, (*experts, layout.out_features), x.device)
    return out


def _launch(x, weight, meta, layout, config, bias, residual, gate_up, out, workspace, row_tiles, gather, rows):
    experts = () if row_tiles is None else weight.shape[:1]
    out = check_launch(x, weight, layout, config.block_n, bias, residual, gate_up, out, rows, experts)
    if layout.tiles % config.tiles:
        raise ValueError(f"tiles {config.tiles} does not divide the {layout.tiles} K tiles of the weight")
    if rows == 0:
        return out
    m_tiles = triton.cdiv(rows, config.block_m) if row_tiles is None else len(row_tiles)
    n_tiles = layout.padded_out // config.block_n
    split = min(config.split, layout.tiles // config.tiles)  # a program without inputs would be waste
    partials = counters = None
    if split > 1:
        workspace = workspace or workspace_of(x.device)
        tiles = n_tiles * m_tiles
        partials, counters = workspace.get(tiles * split * config.block_n * config.block_m, tiles)
    with torch.cuda.device_of(x):
        skinny_kernel[(n_tiles, split, m_tiles)](
            x, weight, meta, out, bias, residual, partials, counters, row_tiles, gather,
            rows, layout.in_features, layout.out_features, x.stride(0), layout.tiles, layout.padded_out, layout.words,
            BITS=layout.bits, GROUP_SIZE=layout.group_size, SYM=layout.sym, GATE_UP=gate_up,
            EVEN_K=layout.in_features == layout.padded_in, BN=config.block_n, BM=config.block_m, SPLIT=split,
            TILES=config.tiles, PTX=PTX,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out
