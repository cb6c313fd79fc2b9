# SPDX-License-Identifier: Apache-2.0
"""The end of every product: partial sums of programs that share a tile, bias, SiLU(gate) * up, residual, the store.

    inputs split over 3 programs          partials, float32            counter of the tile
        program 0  sums [BN, BM]  --->    [0, BN, BM]                  0 -> 1
        program 1  sums [BN, BM]  --->    [1, BN, BM]                  1 -> 2
        program 2  sums [BN, BM]  --->    [2, BN, BM]                  2 -> 3: the last to arrive, whichever it is, adds
                                                                       part 0, 1, 2 in this order and sets it back to 0

So a result does not depend on which program is last, and nothing has to be cleared before the next launch.
"""

import triton
import triton.language as tl

from lowbit_kernels.decode import round_to


@triton.jit
def tile_of_parts(partials, tile, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Where part 0 of an output tile lies, [BN, BM]; the others follow, BN * BM apart."""
    first = partials + tile.to(tl.int64) * (SPLIT * BN * BM)
    return first + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]


@triton.jit
def store_part(at, sums, counters, tile, part, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """Store the sums of one program. Returns whether all others have stored theirs: this one is the last."""
    tl.store(at + part * SIZE, sums)
    tl.debug_barrier()  # all threads have stored before one of them says so
    return tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def total_of_parts(at, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """All parts, added in their order. From the L2 cache: the first level may hold what was there before."""
    total = tl.load(at, cache_modifier=".cg")
    for i in tl.static_range(1, SPLIT):
        total += tl.load(at + i * SIZE, cache_modifier=".cg")
    return total


@triton.jit
def finish(
    acc, y, bias, residual, pn, rm, row_ok, out_features,
    BN: tl.constexpr, BM: tl.constexpr, GATE_UP: tl.constexpr,
):  # fmt: skip
    """Bias, SiLU(gate) * up and residual in float32, one rounding, and the store of y [rows, features].

    acc float32 [BN, BM]: column tile `pn`, rows `rm`. None for bias and residual.
    """
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
