"""Damaged kernels: of synchronisation the machine notices every fault but a written list that changes nothing."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("kernels need triton", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import kernel_mutations
import triton
from executed import mutations, shipped_runs, source_mutations
from executed.equivalents import EQUIVALENT, TRITON
from executed.source_damage import DAMAGE

pytestmark = pytest.mark.slow

SAMPLED = [pair for pair in kernel_mutations.full_names() if pair[0].startswith(("skinny", "int8-w8", "hopper"))]


@pytest.mark.skipif(triton.__version__ != TRITON, reason=f"places are those of triton {TRITON}")
@pytest.mark.parametrize("name, gpu", SAMPLED, ids=lambda v: v)
def test_damage_is_noticed(name, gpu, compiling):
    """One place of each kind; scripts/kernel_mutations.py damages all of them."""
    verdicts = compiling.submit(mutations.damage, name, gpu, 1, 0).result()
    assert len(verdicts) >= 4
    assert not [v.mutant for v in verdicts if v.noticed is None and v.equivalent is None]


@pytest.mark.parametrize("damage", source_mutations.sample(4, seed=1), ids=lambda damage: damage.name)
def test_damaged_sources_are_noticed(damage, compiling):
    """scripts/kernel_mutations.py compiles all of them."""
    assert compiling.submit(source_mutations.run, damage).result().noticed


def test_sources_hold_what_is_damaged():
    for damage in DAMAGE:
        assert source_mutations.damaged(damage) and source_mutations.configuration(damage)
        assert damage.equivalent is None or len(damage.equivalent) > 20
    assert len({damage.name for damage in DAMAGE}) == len(DAMAGE)


def test_every_equivalent_has_a_configuration_and_a_reason():
    kinds = {mutation.name for mutation in mutations.MUTATIONS if mutation.synchronisation}
    for one in EQUIVALENT:
        assert one.mutation in kinds and len(one.reason) > 20
        assert [pair for pair in shipped_runs.pairs() if pair[0].startswith(one.configuration) and pair[1] == one.gpu]


TEXT = """
  bar.sync 0;
  lop3.b32 d, t, 0x000f000f, 0x43004300, 0xEA;
  cp.async.wait_group 2;
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, { %r2, %r3, %r4, %r5 }, {%r6}, {%r1};
  shl.b32 %r1, %r2, 4;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 16384;
"""


def test_mutants():
    """Each changes one line, to what it says."""
    changed = {}
    for mutant in mutations.mutants(TEXT):
        lines = [b for a, b in zip(TEXT.splitlines(), mutant.apply(TEXT).splitlines(), strict=True) if a != b]
        assert len(lines) == 1
        changed.setdefault(mutant.mutation.name, []).append(lines[0].strip())
    assert changed == {
        "barrier removed": [""],
        "wait for copies removed": [""],
        "wait for one copy less": ["cp.async.wait_group 3;"],
        "expected bytes changed": ["mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 16400;"],
        "mask of a code": ["lop3.b32 d, t, 983054, 0x43004300, 0xEA;"],
        "shift": ["shl.b32 %r1, %r2, 5;"],
        "operands of mma": [
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, { %r3, %r2, %r4, %r5 }, {%r6}, {%r1};"
        ],
    }
