"""What threads must not do, each rule with the smallest kernel that breaks it and its neighbour that does not."""

import numpy as np
import pytest
from machine.program import PtxError, parse
from machine.threads import Fault
from snippets import execute, kernel

SHARED = 1024
THREADS = np.arange(64, dtype=np.uint32)

# %r1 is this thread's word of shared memory, %r2 that of the thread opposite in the other warp, %r3 in the same warp
PLACES = f"""
  mov.u32 %r0, %tid.x;
  shl.b32 %r1, %r0, 2;
  xor.b32 %r2, %r1, 128;
  xor.b32 %r3, %r1, 4;
  add.s32 %r1, %r1, {SHARED};
  add.s32 %r2, %r2, {SHARED};
  add.s32 %r3, %r3, {SHARED};
"""
STORE, LOAD_OTHER, LOAD_LANE = "st.shared.b32 [%r1], %i0;", "ld.shared.b32 %o0, [%r2];", "ld.shared.b32 %o0, [%r3];"
BARRIER, WARP_BARRIER = "bar.sync 0;", "bar.warp.sync -1;"
READ_RACE = "shared memory: reads what another thread writes, unordered"
NOBODY = "shared memory: reads what nobody has written"
WRITE_READ = "shared memory: writes what another thread has read, unordered"
WRITE_WRITE = "shared memory: writes what another thread has written, unordered"
AT_ONCE = "is written by two threads at once"


def broken(body, rule, *, inputs=None, expected=None, seeds=range(6), **options):
    """The rule is found whatever the order of the threads; expected: what each thread gets where it is not broken."""
    for seed in seeds:
        ran = execute(body, [THREADS] if inputs is None else inputs, threads=64, shared=1024, seed=seed, **options)
        if rule is None:
            assert ran.findings == []
            if expected is not None:
                assert ran.outputs[:, 0].tolist() == list(expected)
        else:
            assert any(rule in finding for finding in ran.findings), ran.findings


OTHER = (THREADS ^ 32).tolist()
SAME = (THREADS ^ 1).tolist()


@pytest.mark.parametrize(
    "steps, rule, expected",
    [
        ((STORE, BARRIER, LOAD_OTHER), None, OTHER),
        ((STORE, "barrier.sync 1;", LOAD_OTHER), None, OTHER),
        ((STORE, "bar.sync 3, 64;", LOAD_OTHER), None, OTHER),
        ((STORE, LOAD_OTHER), "unordered", None),
        ((STORE, WARP_BARRIER, LOAD_OTHER), "unordered", None),
        ((STORE, WARP_BARRIER, LOAD_LANE), None, SAME),
        ((STORE, LOAD_LANE), READ_RACE, None),
        ((BARRIER, LOAD_OTHER), NOBODY, None),
        ((STORE, BARRIER, LOAD_OTHER, BARRIER, "st.shared.b32 [%r1], %o0;"), None, OTHER),
        ((STORE, BARRIER, LOAD_OTHER, "st.shared.b32 [%r1], %o0;"), WRITE_READ, None),
        ((STORE, BARRIER, LOAD_OTHER, WARP_BARRIER, "st.shared.b32 [%r1], %o0;"), WRITE_READ, None),
        ((STORE, BARRIER, "st.shared.b32 [%r2], %i0;", BARRIER, "ld.shared.b32 %o0, [%r1];"), None, OTHER),
        ((STORE, "st.shared.b32 [%r2], %i0;"), WRITE_WRITE, None),
        ((f"st.shared.b32 [{SHARED}], %i0;",), AT_ONCE, None),
        ((f"st.shared.b32 [{SHARED}], 7;", BARRIER, f"ld.shared.b32 %o0, [{SHARED}];"), None, [7] * 64),
    ],
)  # fmt: skip
def test_order_in_shared_memory(steps, rule, expected):
    broken(PLACES + "\n".join(steps), rule, expected=expected)


def test_sub_words_are_told_apart():
    """Neighbouring bytes of a word belong to different threads without a race."""
    body = f"""
      mov.u32 %r0, %tid.x;
      add.s32 %r1, %r0, {SHARED};
      xor.b32 %r2, %r0, 33;
      add.s32 %r2, %r2, {SHARED};
      cvt.u16.u32 %rs0, %i0;
      st.shared.b8 [%r1], %rs0;
      bar.sync 0;
      ld.shared.u8 %rs1, [%r2];
      cvt.u32.u16 %o0, %rs1;
    """
    broken(body, None, expected=(THREADS ^ 33).tolist())
    broken(body.replace("bar.sync 0;", ""), READ_RACE)


@pytest.mark.parametrize(
    "address, words", [(SHARED + 1024, "out of bounds"), (SHARED - 4, "out of bounds"), (SHARED + 2, "misaligned")]
)
@pytest.mark.parametrize(
    "access", ["st.shared.b32 [%r5], %i0;", "ld.shared.b32 %o0, [%r5];", "st.shared.v2.b32 [%r5], { %i0, %i0 };"]
)
def test_places_in_shared_memory(address, words, access):
    with pytest.raises(Fault, match=f"shared memory: {words}"):
        execute(f"mov.b32 %r5, {address};\n{access}", [THREADS], threads=64, shared=1024)


@pytest.mark.parametrize(
    "access, rule",
    [
        ("ld.global.b32 { %o0 }, [ %in + 0 ];", None),
        ("ld.global.b32 { %o0 }, [ %in + 4 ];", "out of bounds"),
        ("ld.global.b32 { %o0 }, [ %in + -4 ];", "out of bounds"),
        ("ld.global.v2.b32 { %o0, %r1 }, [ %in + 0 ];", "misaligned"),
        ("ld.global.b16 { %rs1 }, [ %in + 1 ];", "misaligned"),
        ("st.global.b32 [ %out + 256 ], { %i0 };", "out of bounds"),
        ("mov.b64 %rd1, 0;\nld.global.b32 { %o0 }, [ %rd1 + 0 ];", "out of bounds"),
        ("mov.b64 %rd1, 0;\n@%p15 ld.global.b32 { %o0 }, [ %rd1 + 0 ];", None),
        ("ld.global.b32 { %o0 }, [ %out + 0 ];", "reads what nobody has written"),
        ("cp.async.ca.shared.global [ 1024 ], [ %out + 0 ], 0x4;\ncp.async.wait_all;", "reads what nobody has written"),
    ],
)
def test_places_in_global_memory(access, rule):
    """Of 64 threads only the last reaches beyond, or all."""
    ran = execute(
        f"mov.b32 %o0, 0;\nsetp.ne.b32 %p15, 0, 0;\n{access}", [THREADS], threads=64, shared=1024, races=False
    )
    found = [finding for finding in ran.findings if "global memory" in finding]
    assert any(rule in finding for finding in found) if rule else not found


def test_unwritten_inputs():
    ran = execute("mov.b32 %o0, %i0;", [THREADS], threads=64, unwritten=slice(5, 7))
    assert len(ran.findings) == 1 and "nobody has written, 2 times, first CTA (0, 0, 0) thread 5" in ran.findings[0]


@pytest.mark.parametrize("order, racing", [("acq_rel", False), ("relaxed", True), ("acquire", True), ("release", True)])
def test_order_in_global_memory(order, racing):
    """The last of four CTAs to arrive at a counter reads what the others wrote: only with release and acquire."""
    body = f"""
      ld.param.b64 %rd1, [snippet_param_0];
      ld.param.b64 %rd2, [snippet_param_1];
      mov.u32 %r1, %ctaid.x;
      mov.u32 %r2, %tid.x;
      setp.eq.u32 %p1, %r2, 0;
      mov.b32 %o0, 0;
      st.global.b32 [ %out + 0 ], {{ %r1 }};
      bar.sync 0;
      @%p1 atom.global.gpu.{order}.add.u32 %r3, [ %rd1 + 0 ], 1;
      setp.eq.b32 %p2, %r3, 3;
      and.pred %p1, %p1, %p2;
      @%p1 ld.global.cg.b32 {{ %r4 }}, [ %rd2 + 0 ];
      @%p1 ld.global.cg.b32 {{ %r5 }}, [ %rd2 + 128 ];
    """
    counters = np.zeros(128, np.uint32)
    found = set()
    for seed in range(4):
        ran = execute(body, [counters], threads=32, ctas=4, seed=seed, text=kernel(body, 1, 1, 32, out=False))
        found |= {finding.partition(", unordered")[0] for finding in ran.findings}
    assert found == ({"global memory: reads what another thread writes"} if racing else set())


def test_two_ctas_write_the_same_place():
    body = "ld.param.b64 %rd2, [snippet_param_1];\nst.global.b32 [ %rd2 + 0 ], { %i0 };"
    text = kernel(body, 1, 1, 32, out=False)
    ran = execute(body, [np.arange(64)], threads=32, ctas=2, text=text)
    found = " ".join(ran.findings)
    assert "is written by two threads at once" in found and "writes what another thread has written" in found


def test_atomics_add_in_any_order():
    body = """
      ld.param.b64 %rd1, [snippet_param_1];
      atom.global.gpu.relaxed.add.u32 %o0, [ %in + 0 ], 5;
      add.s64 %rd1, %rd1, 0;
      atom.global.add.s32 %r1, [ %in + 0 ], -2;
      ld.global.b32 { %o1 }, [ %in + 0 ];
    """
    ran = execute(body, [THREADS], 2, threads=64)
    assert ran.outputs.tolist() == [[t, t + 3] for t in range(64)]


COPY = "cp.async.ca.shared.global [ %r1 + 0 ], [ %in + 0 ], 0x4;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"
LOAD_OWN = "ld.shared.b32 %o0, [%r1];"
FLYING = "what an asynchronous copy is writing"


@pytest.mark.parametrize(
    "steps, rule, expected",
    [
        ((COPY, COMMIT, WAIT, LOAD_OWN), None, THREADS),
        ((COPY, "cp.async.wait_all;", LOAD_OWN), None, THREADS),
        ((COPY, COMMIT, WAIT, BARRIER, LOAD_OTHER), None, OTHER),
        ((COPY, COMMIT, WAIT, LOAD_OTHER), "unordered", None),
        ((COPY, COMMIT, LOAD_OWN), FLYING, None),
        ((COPY, COMMIT, "cp.async.wait_group 1;", LOAD_OWN, WAIT), FLYING, None),
        ((COPY, COMMIT, COMMIT, "cp.async.wait_group 1;", LOAD_OWN), None, THREADS),
        ((COPY, WAIT, LOAD_OWN), FLYING, None),  # of no group
        ((COPY, COMMIT, "st.shared.b32 [%r1], 5;", WAIT), FLYING, None),
        ((COPY, COMMIT), "a copy is never waited for", None),
        ((COPY, COPY, COMMIT, WAIT), FLYING, None),
        (("cp.async.ca.shared.global [ %r1 + 0 ], [ %in + 0 ], 0x4, %r63;", COMMIT, WAIT, LOAD_OWN), None, [0] * 64),
        (("mov.b64 %in, 0;", COPY.replace("0x4;", "0x4, %r63;"), COMMIT, WAIT, LOAD_OWN), None, [0] * 64),
        (("mov.b64 %in, 0;", COPY, COMMIT, WAIT, LOAD_OWN), "global memory: out of bounds", None),
    ],
)
def test_asynchronous_copies(steps, rule, expected):
    """Data lands when its group is waited for, not before; a source size of 0 reads nothing and fills with zeros."""
    broken(PLACES + "mov.b32 %r63, 0;\n" + "\n".join(steps), rule, expected=expected)


@pytest.mark.parametrize(
    "text",
    [
        "cp.async.ca.shared.global [ %r1 + 0 ], [ %in + 0 ], 0x5;",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %in + 0 ], 0x4;",
    ],
)
def test_sizes_of_copies(text):
    with pytest.raises(Fault, match="a copy of"):
        execute(PLACES + text, [THREADS], threads=64, shared=1024)


BAR = SHARED + 512
INIT = f"@%p0 mbarrier.init.shared::cta.b64 [{BAR}], 64;\nbar.sync 0;"
ARRIVE = f"mbarrier.arrive.shared::cta.b64 _, [{BAR}];"
AWAIT = f"mov.b32 %r9, 0;\nloop: mbarrier.try_wait.parity.shared::cta.b64 %p2, [{BAR}], %r9;\n@!%p2 bra.uni loop;"
FIRST = "setp.eq.u32 %p0, %r0, 0;"
EXPECT = f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{BAR}], 256;"


@pytest.mark.parametrize(
    "steps, rule",
    [
        ((INIT, STORE, ARRIVE, AWAIT, LOAD_OTHER), None),
        ((INIT, STORE, ARRIVE, LOAD_OTHER), "unordered"),
        ((INIT, ARRIVE, STORE, AWAIT, LOAD_OTHER), "unordered"),
    ],
)
def test_mbarriers_order_memory(steps, rule):
    broken(PLACES + FIRST + "\n".join(steps), rule, expected=OTHER)


def test_mbarrier_must_be_seen_started():
    body = PLACES + FIRST + INIT.replace("bar.sync 0;", "") + ARRIVE
    found = []
    for seed in range(6):
        try:
            found += execute(body, [THREADS], threads=64, shared=2048, seed=seed).findings
        except Fault as fault:
            found.append(str(fault))
    assert any("unordered" in f for f in found) or any("no mbarrier" in f for f in found)


@pytest.mark.parametrize(
    "steps, words",
    [
        ((INIT.replace("64", "1"), EXPECT, f"@%p0 {ARRIVE}"), "more arrivals at an mbarrier than the 1 expected"),
        ((INIT, AWAIT), "deadlock.*at an mbarrier"),
        ((ARRIVE,), "no mbarrier at byte 512"),
        ((FIRST, "@!%p0 bra out;", BARRIER, "out:"), "not all lanes of a warp are here"),
        (("setp.lt.u32 %p1, %r0, 32;", "@%p1 bra out;", "bar.sync 2, 64;", "out:"), "deadlock.*at a barrier"),
        (("bar.sync 2, 32;",), "64 threads at a barrier for 32|barrier 2"),
        ((FIRST, "@!%p0 bra out;", "shfl.sync.idx.b32 %o0, %i0, 0, 31, -1;", "out:"), "not all lanes of a warp"),
    ],
)
def test_deadlocks_and_missing_threads(steps, words):
    with pytest.raises(Fault, match=words):
        for seed in range(20):
            execute(PLACES + FIRST + "\n".join(steps), [THREADS], threads=64, shared=2048, seed=seed)


def test_threads_that_have_ended_are_not_waited_for():
    body = "mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p1, %r0, 32;\n@%p1 bra out;\nbar.sync 0;\nout: mov.b32 %o0, %i0;"
    assert execute(body, [THREADS], threads=64).outputs[:, 0].tolist() == THREADS.tolist()


def test_loops_and_divergence():
    """Each lane turns as often as its number says; a table of branches leads lanes apart."""
    body = """
      mov.b32 %o0, 0;
      mov.b32 %r1, %i0;
      loop: setp.eq.b32 %p1, %r1, 0;
      @%p1 bra out;
      add.s32 %o0, %o0, %r1;
      sub.s32 %r1, %r1, 1;
      bra loop;
      out: and.b32 %r2, %i0, 1;
      table: .branchtargets even, odd;
      brx.idx %r2, table;
      even: mov.b32 %o1, 10;
      bra.uni done;
      odd: mov.b32 %o1, 11;
      done: add.s32 %o1, %o1, 100;
    """
    got = execute(body, [THREADS], 2, threads=64).outputs
    assert got.tolist() == [[t * (t + 1) // 2, 110 + t % 2] for t in range(64)]


def test_parsing():
    """Inline blocks have registers and labels of their own; comments, debug lines and several ways to write numbers."""
    body = """
      // begin inline asm
      { .reg .b32 t, u; mov.b32 t, 0x10U; add.u32 u, t, -1; mov.b32 %o0, u; // end
      }
      .loc 1 2 3
      { .reg .b32 t; .reg .pred done; mov.b32 t, 3;
        again: sub.s32 t, t, 1; setp.eq.s32 done, t, 0; @!done bra again; add.s32 %o0, %o0, t; }
      { .reg .b32 t; mov.b32 t, 3;
        again: sub.s32 t, t, 1; setp.ne.s32 %p1, t, 0; @%p1 bra again; }
      .pragma "nounroll";
      mov.b32 %o1, 0f3F800000;
      mov.b32 %o2, 1.5;
      ;
    """
    got = execute(body, None, 3).outputs[0]
    assert got.tolist() == [15, 0x3F800000, 0x3FC00000]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace(".reqntid 32", ""), "expected .reqntid"),
        (lambda text: text + text, "exactly one kernel"),
        (lambda text: text.replace("ret;\n}", "ret;"), "does not end"),
        (lambda text: text.replace("ret;", "bra nowhere; ret;"), "no label nowhere"),
        (lambda text: text.replace(".reg .b16", ".reg .f128"), "unknown register type"),
        (lambda text: text.replace("ret;", ".shared .b8 x[4]; ret;"), "unknown directive"),
        (lambda text: text.replace("mov.u32 %r60", "mov.u32 %nothing"), "unknown instruction"),
        (lambda text: text.replace("[snippet_param_0]", "[another]"), "unknown symbol another"),
    ],
)
def test_what_cannot_be_read(change, words):
    with pytest.raises(PtxError, match=words):
        execute("", text=change(kernel("", 0, 0)), outputs=1)


def test_lines_of_errors():
    with pytest.raises(PtxError, match=r"line \d+: clz.b32 %o0, %i0"):
        execute("clz.b32 %o0, %i0;", [THREADS[:32]])
    assert parse(kernel("", 0, 0)).code[-1].opcode == "ret"
