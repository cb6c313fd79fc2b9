"""Rules of wgmma, TMA and setmaxnreg, each with the smallest kernel that breaks it and its neighbour that does not."""

import numpy as np
import pytest
from machine.copies import TensorMap
from machine.threads import Fault
from snippets import execute

SHARED = 1024
BAR = SHARED + 512
THREADS = np.arange(64, dtype=np.uint32)
BARRIER = "bar.sync 0;"
READ_RACE = "shared memory: reads what another thread writes, unordered"
NOBODY = "shared memory: reads what nobody has written"
WRITE_READ = "shared memory: writes what another thread has read, unordered"
FLYING = "what an asynchronous copy is writing"
RUNNING_WRITTEN, SUM_READ = "register of a running wgmma is written", "sum of a running wgmma is read"
EXPECT = f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{BAR}], 256;"
AWAIT = f"mov.b32 %r9, 0;\nloop: mbarrier.try_wait.parity.shared::cta.b64 %p2, [{BAR}], %r9;\n@!%p2 bra.uni loop;"

# one wgmma of A in registers and B in shared memory, m64n8k16: %o0 to %o3 its sums
WGMMA = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 { %o0, %o1, %o2, %o3 }, { %r20, %r21, %r22, %r23 }, %rd1, "
    "%p1, 1, 1, 0;"
)
FENCE, CLOSE, DONE = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
PROXY = "fence.proxy.async.shared::cta;"
FILL = f"""
  mov.u32 %r0, %tid.x;
  shl.b32 %r1, %r0, 2;
  add.s32 %r1, %r1, {SHARED};
  mov.b64 %rd1, {SHARED >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32};
  setp.ne.b32 %p1, 0, 0;
  mov.b32 %r20, 0x3F803F80;
  mov.b32 %r21, 0x3F803F80;
  mov.b32 %r22, 0x3F803F80;
  mov.b32 %r23, 0x3F803F80;
  mov.b32 %o0, 0;
  mov.b32 %o1, 0;
  mov.b32 %o2, 0;
  mov.b32 %o3, 0;
"""
STORE_ONES = "st.shared.b32 [%r1], 0x3F803F80;"
COPY_ONES = "cp.async.ca.shared.global [ %r1 + 0 ], [ %in + 0 ], 0x4;\ncp.async.commit_group;\ncp.async.wait_group 0;"
UNFENCED = "reads asynchronously what was written generically, without a proxy fence"


@pytest.mark.parametrize(
    "steps, rule",
    [
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, DONE), None),
        ((STORE_ONES, BARRIER, PROXY, FENCE, WGMMA, CLOSE, DONE), None),
        ((COPY_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, DONE), None),
        ((COPY_ONES, BARRIER, FENCE, WGMMA, CLOSE, DONE), UNFENCED),
        ((STORE_ONES, BARRIER, FENCE, WGMMA, CLOSE, DONE), UNFENCED),
        ((PROXY, STORE_ONES, BARRIER, FENCE, WGMMA, CLOSE, DONE), UNFENCED),
        ((STORE_ONES, PROXY, FENCE, WGMMA, CLOSE, DONE), READ_RACE),
        ((STORE_ONES, PROXY, BARRIER, WGMMA, CLOSE, DONE), "wgmma without a fence"),
        ((STORE_ONES, PROXY, BARRIER, FENCE, "mov.b32 %r20, 0;", WGMMA, CLOSE, DONE), "wgmma without a fence"),
        ((STORE_ONES, PROXY, BARRIER, FENCE, "mov.b32 %r5, %o0;", WGMMA, CLOSE, DONE), "wgmma without a fence"),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, WGMMA, CLOSE, DONE), None),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, "mov.b32 %r20, 0;", DONE), RUNNING_WRITTEN),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, "mov.b32 %r5, %r20;", DONE), None),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, "mov.b32 %r5, %o0;", DONE), SUM_READ),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE), SUM_READ),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, DONE, CLOSE), SUM_READ),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, "wgmma.wait_group.sync.aligned 1;"), SUM_READ),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, STORE_ONES, DONE), "writes what a running wgmma reads"),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, DONE, STORE_ONES), WRITE_READ),
        ((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, DONE, BARRIER, STORE_ONES), None),
        ((BARRIER, FENCE, WGMMA, CLOSE, DONE), NOBODY),
    ],
)  # fmt: skip
def test_wgmma(steps, rule):
    for seed in range(4):
        inputs = [np.full(128, 0x3F803F80, np.uint32)]
        ran = execute(FILL + "\n".join(steps), inputs, 4, threads=128, shared=1024, seed=seed)
        if rule is None:
            assert ran.findings == [] and (ran.outputs.view(np.float32) == 16).all()
        else:
            assert any(rule in finding for finding in ran.findings), ran.findings


def test_wgmma_reads_late():
    """What is in shared memory when the group is waited for counts, not what was there when it started."""
    body = FILL + "\n".join((STORE_ONES, PROXY, BARRIER, FENCE, WGMMA, CLOSE, "st.shared.b32 [%r1], 0x40004000;", DONE))
    ran = execute(body, [np.zeros(128, np.uint32)], 4, threads=128, shared=1024)
    assert ran.findings and (ran.outputs.view(np.float32) == 32).all()


def test_wgmma_descriptor_out_of_bounds():
    body = FILL.replace(str(SHARED >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32), "0x3FFF") + FENCE + WGMMA
    with pytest.raises(Fault, match="descriptor reaches out of bounds"):
        execute(body, [np.zeros(128, np.uint32)], 4, threads=128, shared=1024)


TMA = (
    f"cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [{SHARED}], [%rd1, {{ %r10, %r10 }}], "
    f"[{BAR}];"
)
START = f"""
  mov.u32 %r0, %tid.x;
  setp.eq.u32 %p0, %r0, 0;
  mov.b64 %rd1, snippet_param_2;
  mov.b32 %r10, 0;
  mbarrier.init.shared::cta.b64 [{BAR}], 1;
"""
LOAD_TILE = f"shl.b32 %r1, %r0, 2;\nadd.s32 %r1, %r1, {SHARED};\nld.shared.b32 %o0, [%r1];"


@pytest.mark.parametrize(
    "steps, words",
    [
        ((PROXY, BARRIER, EXPECT, f"@%p0 {TMA}", AWAIT, LOAD_TILE), None),
        ((BARRIER, EXPECT, f"@%p0 {TMA}", AWAIT, LOAD_TILE), UNFENCED),
        ((PROXY, BARRIER, EXPECT, f"@%p0 {TMA}", BARRIER, LOAD_TILE), FLYING),
        ((PROXY, BARRIER, EXPECT.replace("256", "512"), f"@%p0 {TMA}", AWAIT, LOAD_TILE), "deadlock"),
        ((PROXY, BARRIER, EXPECT.replace("256", "128"), f"@%p0 {TMA}", AWAIT, LOAD_TILE), "deadlock|asynchronous copy"),
    ],
)
def test_tma(steps, words):
    tensor = TensorMap(2, (8, 16), (16, 1), 0, (8, 16), 32)
    found = []
    body = START.replace("  mbarrier.init", "  @%p0 mbarrier.init") + "\n".join(steps)
    for seed in range(4):
        try:
            ran = execute(body, [np.arange(64)], threads=64, shared=2048, seed=seed, tensor_map=tensor)
            found += ran.findings
        except Fault as fault:
            found.append(str(fault))
    if words is None:
        assert found == []
    else:
        assert any(word in finding for finding in found for word in words.split("|")), found


@pytest.mark.parametrize(
    "low, high, words",
    [
        ("setmaxnreg.dec.sync.aligned.u32 24;", "setmaxnreg.inc.sync.aligned.u32 168;", None),
        ("nothing", "setmaxnreg.inc.sync.aligned.u32 168;", "deadlock.*waiting for registers"),
        ("setmaxnreg.dec.sync.aligned.u32 24;", "setmaxnreg.inc.sync.aligned.u32 240;", "deadlock"),
        ("setmaxnreg.inc.sync.aligned.u32 24;", "nothing", "from 96 registers"),
        ("setmaxnreg.dec.sync.aligned.u32 20;", "nothing", "no such number of registers"),
    ],
)
def test_registers_move_between_warps(low, high, words):
    """Of 96 each, one warp gives back 72, which the other may take."""
    body = f"""
      mov.u32 %r0, %tid.x;
      setp.lt.u32 %p1, %r0, 32;
      @%p1 bra first;
      {high if high != "nothing" else ""}
      bra.uni out;
      first: {low if low != "nothing" else ""}
      out: mov.b32 %o0, %i0;
    """
    if words is None:
        for seed in range(4):
            got = execute(body, [THREADS], threads=64, max_registers=96, seed=seed).outputs
            assert got[:, 0].tolist() == THREADS.tolist()
    else:
        with pytest.raises(Fault, match=words):
            execute(body, [THREADS], threads=64, max_registers=96)
