# SPDX-License-Identifier: Apache-2.0
"""GPTQ inside of a group: its columns run in registers, one launch instead of several per column.

Two loops of `lowbit.quantizers.gptq_loops` go from column to column, each column correcting those after it:

    columns   error feedback: quantize the columns of a group on each of some grids, keep the cheapest grid of each row
    descend   coordinate descent: move each code to its best value while all others stay

Rows are independent. A program owns a few rows and holds what errors so far feed into each column, [g, rows], in the
registers of one warp: it waits for no other, and leaves nothing in memory but results. That tile is cut into blocks of
columns, so that picking one column, which costs a pass over the registers it may be in, looks at one block only:

    for each block: copy it; for each column in it: pick it from the copy, quantize it, add to the copy and the tile

                     rows of W, N                          grid (N / ROWS,), one warp a program
               | p 0 | p 1 | p 2 | ...
    column 0   +-----+-----+-----+                         a program walks down its columns, k = 0, 1, ... g - 1:
    block 0    |     |  |  |     |    BLOCK columns        fed[j, rows] += feedback[k, j] * error[rows] for all j > k
    block 1    |     |  v  |     |
    ...        |     |     |     |    fed [g, ROWS] stays in registers; codes [g, N] are written as they come
    column g-1 +-----+-----+-----+

Everything is [columns, rows]: a column lies in consecutive memory, neighbouring lanes hold neighbouring rows.

Cf. GPTQ (Frantar et al. 2022, arXiv:2210.17323) for error feedback, QuantEase (arXiv:2309.01885) for the descent; their
formulas are those of `columns` and `descend`.

Exactness. Results equal, bit for bit, this in float32 with one rounding per operation (no fused multiply-add, division
rounded to nearest, ties to even), on every GPU and in Triton's interpreter: the feedback of columns 0, 1, ... k - 1 is
added up from zero in this order, then added to what column k started as; the cost of a row sums (costs[k] * off) * off
in the order of columns. Plain torch adds in other orders (matrix products). It may differ where a value lies within
rounding errors of the middle between two codes, in that code and in what follows from it; and where grids cost the same
up to rounding errors.
"""

import torch
import triton
import triton.language as tl

# Columns of a block
_BLOCK = 16
# Registers: at most 1024 / 32 elements of the tile per lane, for the longest groups four times as many
_TILE, _FEWEST_ROWS, _MOST_ROWS = 1024, 8, 64
LONGEST = 512

# Adding, then subtracting this rounds a float32 up to 2^22 in size to an integer, ties to even
_ROUNDER = tl.constexpr(1.5 * 2**23)


def columns(
    target: torch.Tensor,
    feedback: torch.Tensor,
    costs: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the columns of a group one after the other on C grids, and keep the cheapest grid of each row:

        t_k = target_k + sum over j < k of feedback[j, k] (target_j - q_j),     q_k = scale * step_k,
        step_k = t_k / scale, rounded, within [-zero, levels - 1 - zero],       cost = sum of costs_k (t_k - q_k)^2.

    All float32, finite, on one device; rows of a matrix may be any number of elements apart.

    Args:
        target: [g, N], g <= LONGEST.
        feedback: [g, g], of which what is above the diagonal is read.
        costs: [g].
        scales: [C, N], never zero.
        zeros: [C, N], whole numbers in [0, levels - 1].
        levels: 2 to 256.

    Returns:
        codes step + zero [g, N]; scales, zeros and cost [N] of the grid chosen, the first of the cheapest. Float32.

    Raises:
        ValueError: a tensor has another shape, dtype or device.
    """
    length, rows = _sizes("target", target)
    if scales.ndim != 2 or not len(scales):
        raise ValueError(f"scales: got {tuple(scales.shape)}, expected [C, {rows}] with C >= 1")
    tried = len(scales)
    _check("feedback", feedback, (length, length), target)
    _check("costs", costs, (length,), target)
    for name, grid in (("scales", scales), ("zeros", zeros)):
        _check(name, grid, (tried, rows), target)
    _check_levels(levels)
    codes = torch.empty(length, rows, dtype=torch.float32, device=target.device)
    chosen = torch.empty(3, rows, dtype=torch.float32, device=target.device)
    if rows:
        with torch.cuda.device_of(target):
            _columns_kernel[_grid](
                target, feedback, costs, scales, zeros, codes, chosen, rows, tried,
                target.stride(0), feedback.stride(0), scales.stride(0), zeros.stride(0),
                TOP=levels - 1, **_shape(length),
            )  # fmt: skip
    return codes, *chosen


def descend(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    descent: torch.Tensor,
    inner: torch.Tensor,
    levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass of coordinate descent over the columns of a group, or a part of it. With q = (code - zero) * scale:

        f = pull_k - sum over j < k of inner[j, k] moved_j,      new q_k = the value nearest to q_k + f / inner[k, k],
        moved_k = new q_k - q_k,                                 gain = sum of moved_k (2 f - inner[k, k] moved_k).

    All float32, finite, on one device; rows of a matrix may be any number of elements apart.

    Args:
        codes: [g, N], whole numbers in [0, levels - 1], g <= LONGEST.
        scales: [N], never zero.
        zeros: [N], whole numbers in [0, levels - 1].
        descent: [g, N], half the negative gradient.
        inner: [g, g], of which what is on and above the diagonal is read; positive on it.
        levels: 2 to 256.

    Returns:
        codes [g, N]; moved [g, N]; gain [N], what the pass takes off the error of each row. Float32.

    Raises:
        ValueError: a tensor has another shape, dtype or device.
    """
    length, rows = _sizes("codes", codes)
    _check("descent", descent, (length, rows), codes)
    for name, grid in (("scales", scales), ("zeros", zeros)):
        _check(name, grid, (rows,), codes)
    _check("inner", inner, (length, length), codes)
    _check_levels(levels)
    found, moves = torch.empty(2, length, rows, dtype=torch.float32, device=codes.device)
    gain = torch.empty(rows, dtype=torch.float32, device=codes.device)
    if rows:
        with torch.cuda.device_of(codes):
            _descend_kernel[_grid](
                codes, scales, zeros, descent, inner, found, moves, gain, rows,
                codes.stride(0), descent.stride(0), inner.stride(0),
                TOP=levels - 1, **_shape(length),
            )  # fmt: skip
    return found, moves, gain


def _shape(length: int) -> dict[str, int]:
    """What a launch for groups of `length` columns is compiled for."""
    blocks = triton.next_power_of_2(triton.cdiv(length, _BLOCK))
    rows = min(max(_TILE // (blocks * _BLOCK), _FEWEST_ROWS), _MOST_ROWS)
    sizes = {"LENGTH": length, "BLOCKS": blocks, "BLOCK": _BLOCK, "ROWS": rows}
    return sizes | {"num_warps": 1, "enable_fp_fusion": False}


def _grid(launch: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(launch["n"], launch["ROWS"]),)


def _sizes(name: str, matrix: torch.Tensor) -> tuple[int, int]:
    """(columns, rows) of the matrix that all others are measured by."""
    if matrix.ndim != 2 or not 1 <= len(matrix) <= LONGEST:
        raise ValueError(f"{name}: got {tuple(matrix.shape)}, expected [g, N] with g from 1 to {LONGEST}")
    _check(name, matrix, matrix.shape, matrix)
    return tuple(matrix.shape)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: got {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != torch.float32 or tensor.device != like.device:
        raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, expected torch.float32 on {like.device}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, expected 1 along the last dimension")
    if tensor.ndim == 2 and tensor.stride(0) * len(tensor) >= 2**31:
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, expected its elements to lie within 2^31 of the first"
        )


def _check_levels(levels: int) -> None:
    if not 2 <= levels <= 256:
        raise ValueError(f"levels: got {levels}, expected 2 to 256")


@triton.jit
def _columns_kernel(
    target, feedback, costs, scales, zeros, codes, chosen, n, tried,
    target_stride, feedback_stride, scales_stride, zeros_stride,
    TOP: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n
    column = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    real, block = column < LENGTH, (column // BLOCK)[:, :, None]
    best = tl.zeros([ROWS], tl.int32)
    cheapest = tl.full([ROWS], float("inf"), tl.float32)
    # every grid, and then the best again, whose codes are written: less than to hold those of the best so far
    for attempt in range(tl.where(tried == 1, 1, 0), tried + 1):
        grid = tl.where(attempt < tried, attempt, best)
        written = rows < tl.where(attempt < tried, 0, n)
        scale = tl.load(scales + grid * scales_stride + rows, mask=present, other=1.0)
        zero = tl.load(zeros + grid * zeros_stride + rows, mask=present, other=0.0)
        lowest, highest = -zero, TOP - zero
        cost = tl.zeros([ROWS], tl.float32)
        # for each column the sum of the feedback so far: of all columns, and of those of the block whose turn it is
        fed = tl.zeros([BLOCKS, BLOCK, ROWS], tl.float32)
        for first in range(0, LENGTH, BLOCK):
            near = tl.sum(tl.where(block == first // BLOCK, fed, 0.0), axis=0)
            beside = first + tl.arange(0, BLOCK)
            turn, inside = beside[:, None], beside < LENGTH
            for k in range(first, tl.minimum(first + BLOCK, LENGTH)):
                wanted = tl.load(target + k * target_stride + rows, mask=present, other=0.0)
                now = wanted + tl.sum(tl.where(turn == k, near, 0.0), axis=0)
                # the bounds are whole numbers: rounding may come after them
                step = (tl.clamp(tl.div_rn(now, scale), lowest, highest) + _ROUNDER) - _ROUNDER
                value = step * scale
                off, error = now - value, wanted - value
                cost += tl.load(costs + k) * off * off
                tl.store(codes + k * n + rows, step + zero, mask=written)
                onto = feedback + k * feedback_stride
                near += tl.load(onto + beside, mask=inside, other=0.0)[:, None] * error[None, :]
                fed += tl.load(onto + column, mask=real, other=0.0)[:, :, None] * error[None, None, :]
        better = cost < cheapest
        best = tl.where(better, grid, best)
        cheapest = tl.where(better, cost, cheapest)
    tl.store(chosen + rows, tl.load(scales + best * scales_stride + rows, mask=present), mask=present)
    tl.store(chosen + n + rows, tl.load(zeros + best * zeros_stride + rows, mask=present), mask=present)
    tl.store(chosen + 2 * n + rows, cheapest, mask=present)


@triton.jit
def _descend_kernel(
    codes, scales, zeros, descent, inner, found, moves, gain, n,
    codes_stride, descent_stride, inner_stride,
    TOP: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n
    column = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    real, block = column < LENGTH, (column // BLOCK)[:, :, None]
    scale = tl.load(scales + rows, mask=present, other=1.0)
    zero = tl.load(zeros + rows, mask=present, other=0.0)
    lowest, highest = -zero, TOP - zero
    total = tl.zeros([ROWS], tl.float32)
    # for each column the sum of what the moves so far took off its force: as in the other kernel
    fed = tl.zeros([BLOCKS, BLOCK, ROWS], tl.float32)
    for first in range(0, LENGTH, BLOCK):
        near = tl.sum(tl.where(block == first // BLOCK, fed, 0.0), axis=0)
        beside = first + tl.arange(0, BLOCK)
        turn, inside = beside[:, None], beside < LENGTH
        for k in range(first, tl.minimum(first + BLOCK, LENGTH)):
            onto = inner + k * inner_stride
            curvature = tl.load(onto + k)
            force = tl.load(descent + k * descent_stride + rows, mask=present, other=0.0)
            force -= tl.sum(tl.where(turn == k, near, 0.0), axis=0)
            now = (tl.load(codes + k * codes_stride + rows, mask=present, other=0.0) - zero) * scale
            aim = now + tl.div_rn(force, curvature)
            step = (tl.clamp(tl.div_rn(aim, scale), lowest, highest) + _ROUNDER) - _ROUNDER
            moved = step * scale - now
            total += moved * (2 * force - curvature * moved)
            tl.store(found + k * n + rows, step + zero, mask=present)
            tl.store(moves + k * n + rows, moved, mask=present)
            near += tl.load(onto + beside, mask=inside, other=0.0)[:, None] * moved[None, :]
            fed += tl.load(onto + column, mask=real, other=0.0)[:, :, None] * moved[None, None, :]
    tl.store(gain + rows, total, mask=present)
