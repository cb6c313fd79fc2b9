"""Sectors and wavefronts of accesses whose number is known."""

import numpy as np
import pytest
from executed.counts import Accesses, kind_of
from machine.global_memory import TENSOR_BITS

LANES = np.arange(32)
BASE = 1 << TENSOR_BITS


@pytest.mark.parametrize(
    "offsets, size, sectors, asked",
    [
        (4 * LANES, 4, 4, 128),  # neighbours
        (4 * LANES + 16, 4, 5, 128),  # not from the start of a sector
        (16 * LANES, 16, 16, 512),
        (128 * LANES, 4, 32, 128),  # one word of a line each
        (0 * LANES, 4, 1, 4),  # all the same
        (4 * (LANES // 8), 4, 1, 16),
    ],
)
def test_sectors(offsets, size, sectors, asked):
    seen = Accesses()
    for _ in range(2):
        seen.global_access(None, LANES, (BASE + offsets).astype(np.uint64), size)
    assert seen.touched == {1: 2 * sectors} and seen.bytes == {1: 2 * asked}
    assert seen.words(1) * 4 == asked


def test_warps_touch_sectors_of_their_own():
    seen = Accesses()
    seen.global_access(None, np.arange(64), np.full(64, BASE, np.uint64), 4)
    assert seen.touched == {1: 2} and seen.bytes == {1: 8} and seen.words(1) == 1


@pytest.mark.parametrize(
    "at, size, wavefronts, ideal",
    [
        (4 * LANES, 4, 1, 1),
        (8 * LANES, 4, 2, 1),  # every other bank
        (128 * LANES, 4, 32, 1),  # one bank
        (0 * LANES, 4, 1, 1),  # one word for all
        (132 * LANES, 4, 1, 1),  # a padded column
        (16 * LANES, 16, 4, 4),  # quarters of a warp
        (128 * LANES, 16, 32, 4),
        (8 * LANES, 8, 2, 2),
        (2 * LANES, 2, 1, 1),
    ],
)
def test_wavefronts(at, size, wavefronts, ideal):
    seen = Accesses()
    seen.shared_access(None, LANES, at, size)
    assert (seen.wavefronts, seen.ideal) == (wavefronts, ideal)


@pytest.mark.parametrize(
    "opcode, kind",
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor core"),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "tensor core"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared memory"),
        ("st.shared::cta.b32", "shared memory"),
        ("cp.async.cg.shared.global", "global memory"),
        ("cp.async.wait_group", "waiting"),
        ("fma.rn.bf16x2", "float"),
        ("cvt.rn.f32.s32", "float"),
        ("lop3.b32", "integer"),
        ("mov.b32", "moves"),
        ("bra", "branches"),
        ("bar.sync", "waiting"),
    ],
)
def test_kinds(opcode, kind):
    assert kind_of(opcode) == kind
