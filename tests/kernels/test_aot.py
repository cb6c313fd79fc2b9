"""Kernels as machine code: compiled for GPUs that are not here, and what the report would say of bad ones."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "benchmarks")]

import tables  # noqa: E402
from aot import hazard, ptx, sass, shipped  # noqa: E402
from executed import process  # noqa: E402
from executed.known_faults import MISSING_FENCE, known_fault  # noqa: E402

pytestmark = pytest.mark.slow

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

REPRESENTATIVE = (
    "skinny-w4-g128-sym-bf16-m8-n64-",
    "skinny-w4-g128-sym-bf16-m16-n128-",
    "gemm-w4-g128-sym-bf16-m64-",
    "hopper-w4-g128-sym-bf16-m128-",
    "int8-w8-channel-sym-bf16-m128-",
    "int8-w4-g128-sym-bf16-m8-",
)


@pytest.fixture
def printed(compiling):
    """printed(program) -> what it prints where kernels are compiled."""
    return lambda program: compiling.submit(process.printed, program).result()


@needs_triton
def test_shipped_kernels_pass_the_check(triton_cache):
    """All but one fault, which is that of a triton: it is refused, and nothing else is."""
    import triton

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT / "triton_kernels"), str(SCRIPTS), environment.get("PYTHONPATH")]))
    command = [sys.executable, SCRIPTS / "kernel_report.py", "--check", "--only", *REPRESENTATIVE]
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": triton_cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    chosen = [one for one in shipped.find(list(REPRESENTATIVE)) if one.targets]
    faulty = [one for one in chosen if known_fault(one, "sm_90", triton.__version__) is MISSING_FENCE]
    problems = [line for line in done.stdout.splitlines() if "PROBLEM" in line]
    assert done.returncode == bool(faulty) and len(problems) == len(faulty), done.stdout + done.stderr
    assert all("cp.async feeds wgmma without fence.proxy.async" in problem for problem in problems)
    for one in chosen:
        assert one.id in done.stdout


BAD = """
from dataclasses import replace
from aot import measure, shipped

one = next(shipped.find(["skinny-w4-g128-sym-bf16-m8-n64-"]))
good = shipped.call(one)

def show(call, before=None):
    print(measure.problems(one, measure.measure(call, "sm_90", one.bits, one.block_m), "sm_90", before))

show(good)
show(good, before={"instructions_per_weight": 1.0, "spills": 0})
show(replace(good, options=good.options | {"maxnreg": 32}))
show(replace(good, types=good.types | {"weight": "*i16:1"}))
"""


@needs_triton
def test_bad_kernels_are_flagged(printed):
    out = printed(BAD)
    good, slow, few_registers, misaligned = out.splitlines()
    assert good == "[]"
    assert "instructions per weight, recorded 1.0" in slow
    assert "spills" in few_registers
    assert "bytes of weight at a time, expected 16" in misaligned


AMD = """
from aot import measure, shipped

chosen = ["skinny-w4-g128-sym-bf16-m16-n64-", "gemm-w8-channel-sym-fp16-", "dequantize", "int8-w4-g128-sym-fp16-"]
for one in shipped.find(chosen):
    print(measure.compiles(shipped.call(one), "gfx942", multiplies=True))
"""


@needs_triton
def test_kernels_compile_for_amd(printed):
    out = printed(AMD)
    skinny, gemm, dequantize, int8 = out.splitlines()
    assert skinny == gemm == int8 == "yes" and dequantize == "without matrix instructions"


@needs_triton
def test_defaults_on_amd_are_what_is_compiled_for_it(monkeypatch):
    from lowbit_kernels import gemm, launching, skinny
    from lowbit_kernels.layout import Layout

    monkeypatch.setattr(gemm, "AMD", True)
    monkeypatch.setattr(launching, "FEWEST_ROWS", 16)
    compiled = [one for one in shipped.SHIPPED if one.kernel in ("skinny", "gemm") and one.also == shipped.AMD]
    assert {(one.kernel, one.bits) for one in compiled} >= {(k, bits) for k in ("skinny", "gemm") for bits in (2, 3, 8)}
    for one in compiled:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[one.dtype]
        layout = Layout(one.bits, one.group, one.sym, dtype, 4096, 4096)
        config = skinny.default_config(layout, 1) if one.kernel == "skinny" else gemm.default_config(layout, 512)
        given = config.block_n, config.block_m, config.warps, config.stages
        assert given == (one.block_n, one.block_m, one.warps, one.stages)


TWO_WARPS = """
from dataclasses import replace

import torch
from aot import measure, shipped
from lowbit_kernels import gemm
from lowbit_kernels.int8 import kernel as int8
from lowbit_kernels.int8.layout import Int8Layout
from lowbit_kernels.layout import Layout

for one in shipped.find(["gemm-w4-g128-sym-bf16-m64", "int8-w8-g128-sym-bf16-m128"]):
    if one.kernel == "gemm":
        layout, default = Layout(one.bits, one.group, True, torch.bfloat16, 4096, 4096), gemm.default_config
    else:
        layout, default = Int8Layout(one.bits, one.group, torch.bfloat16, 4096, 4096), int8.default_config
    config = default(layout, 512, most_warps=2)
    one = replace(one, block_n=config.block_n, block_m=config.block_m, warps=config.warps, stages=config.stages)
    for target in ("sm_90", "sm_100"):
        text = measure.compiled(shipped.call(one), target).asm["ptx"]
        print("mma.sync" in text, "wgmma" in text or "tcgen05" in text)
    print(measure.measure(shipped.call(one), "sm_90", one.bits, one.block_m)["spills"])
"""


@needs_triton
def test_two_warps_multiply_from_registers(printed):
    """What Hopper and Blackwell get from a triton that forgets the fence between cp.async and wgmma or tcgen05."""
    out = printed(TWO_WARPS)
    assert out.splitlines() == ["True False", "True False", "0"] * 2


META_LOADS = """
from dataclasses import replace

from aot import measure, shipped

for one in shipped.find(["hopper-w4-g128-sym-bf16-m128", "hopper-w4-g32-asym", "hopper-w8-g128-asym"]):
    call = shipped.call(one)
    types = {name: kind for name, kind in call.types.items() if name != "bias"}
    call = replace(call, types=types, constants=call.constants | {"bias": None})
    print(measure.compiled(call, "sm_90").asm["ptx"].count("ld.global.b32"))
"""


@needs_triton
def test_the_hopper_kernel_loads_a_meta_word_once(printed):
    """Two consumers load at four places; a lane has two rows, each with a word, or one for each group of a turn."""
    out = printed(META_LOADS)
    assert [int(line) for line in out.split()] == [2 * 4 * 2 * words for words in (1, 4, 1)]


def test_report_is_of_what_is_shipped():
    report = json.loads((ROOT / "tests" / "kernels" / "aot_report.json").read_text())
    for version, records in report.items():
        known = [one for one in shipped.SHIPPED if one.since <= tuple(map(int, version.split(".")[:2]))]
        assert list(records) == [one.id for one in known]
        for one in known:
            compiles = records[one.id].pop("compiles", {})
            assert set(records[one.id]) == set(one.targets) and compiles == dict.fromkeys(one.also, "yes")


def test_few_rows_issue_no_more_than_they_have_time_for():
    """An H200 reads two bits so fast that their loop has half the instructions of four bits to spend."""
    rows = tables.issue_budget().splitlines()[2:]
    assert len(rows) == 13
    for row in rows:
        shares = [int(share) for share in re.findall(r": (\d+) %", row)]
        assert len(shares) == 2 and (max(shares) <= 100 or " | 32 | " in row), row


def listing(*instructions):
    """nvdisasm's text; a name that ends in a colon is a label."""
    lines = (
        f"{text}" if text.endswith(":") else f"        /*{16 * number:04x}*/                   {text} ;"
        for number, text in enumerate(instructions)
    )
    return sass.parse("\n".join(lines))


WGMMA = "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
LOOP = "@P0 BRA `(.L_x_1)"


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        pytest.param((".L_x_1:", WGMMA, WAIT, "LOP3.LUT R89, R1, R2, RZ, 0xc0, !PT", LOOP, "EXIT"), None, id="waited"),
        pytest.param((WGMMA, "LOP3.LUT R89, R1, R2, RZ, 0xc0, !PT", WAIT, "EXIT"), "left operand", id="too early"),
        pytest.param((WGMMA, "LOP3.LUT R92, R1, R2, RZ, 0xc0, !PT", WAIT, "EXIT"), None, id="another register"),
        pytest.param((WGMMA, "LDG.E.128 R88, desc[UR4][R2.64]", WAIT, "EXIT"), "left operand", id="by a load"),
        pytest.param((WGMMA, "LDG.E.128 R85, desc[UR4][R2.64]", WAIT, "EXIT"), "left operand", id="its last register"),
        pytest.param((WGMMA, "STG.E desc[UR4][R2.64], R88", WAIT, "EXIT"), None, id="only read"),
        pytest.param((WGMMA, "FADD R1, R24, R25", WAIT, "EXIT"), "reads accumulators", id="sums too early"),
        pytest.param((".L_x_1:", "MOV R88, R1", WGMMA, LOOP, WAIT, "EXIT"), "left operand", id="in the next iteration"),
        pytest.param(
            (".L_x_1:", WGMMA, WAIT_BUT_ONE, "MOV R88, R1", LOOP, WAIT, "EXIT"), "left operand", id="one may still run"
        ),
        pytest.param(
            (WGMMA, WGMMA.replace("R88", "R92"), WAIT_BUT_ONE, "MOV R88, R1", WAIT, "EXIT"),
            None,
            id="the older is done",
        ),
        pytest.param(
            (WGMMA, "@P1 BRA `(.L_x_2)", WAIT, ".L_x_2:", "MOV R88, R1", "EXIT"), "left operand", id="around the wait"
        ),
    ],
)
def test_registers_of_running_wgmmas(instructions, expected):
    found = hazard.check(listing(*instructions))
    assert [expected in h.what for h in found] == [True] if expected else found == []


@pytest.mark.parametrize("barrier", [True, False])
def test_arrival_needs_a_barrier(barrier):
    arrive = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR11+0x20070], RZ"
    between = ("BAR.SYNC.DEFER_BLOCKING 0x0, 0x80",) if barrier else ()
    program = listing(WGMMA, WAIT, *between, "MOV R1, R2", arrive, "EXIT")
    assert hazard.early_arrivals(program) == ([] if barrier else [arrive])


def test_hot_loop_is_the_innermost_with_tensor_cores():
    product = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    program = listing(
        ".L_x_1:", "MOV R1, R2", ".L_x_2:", product, "@P0 BRA `(.L_x_2)", "MOV R1, R2", "@P1 BRA `(.L_x_1)", "EXIT"
    )
    assert [i.op for i in program.hot_loop()] == ["HMMA.16816.F32.BF16", "BRA"]


def test_loads_lead_back_to_their_argument():
    text = """
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 .ptr .global .align 1 k_param_1,
    .param .u32 k_param_2
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b32 %r9, [k_param_2];
    mad.wide.s32 %rd3, %r9, 2, %rd1;
    add.s64 %rd4, %rd2, %rd9;
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 64 ], 0x8, %r6;
    ld.global.b32 { %r7 }, [ %rd8 + 0 ];
    """
    assert ptx.load_widths(text, ["x", "weight"]) == {"?": [4], "weight": [8], "x": [16]}


COPY, WGMMA_PTX, PROXY = (
    "cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 64 ], 0x10, %r6;",
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0;",
    "fence.proxy.async.shared::cta;",
)


@pytest.mark.parametrize(
    ("lines", "refused"),
    [
        ((COPY, "cp.async.commit_group;", WGMMA_PTX), True),
        ((COPY, "cp.async.commit_group;", PROXY, WGMMA_PTX), False),
        ((COPY, "cp.async.commit_group;"), False),
        (("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1];", WGMMA_PTX), False),
    ],
)
def test_copies_that_a_wgmma_may_read_too_early(lines, refused):
    assert ptx.unfenced_copies("\n".join(lines)) is refused


def test_ids_are_unique():
    ids = [one.id for one in shipped.SHIPPED]
    assert len(ids) == len(set(ids))


@needs_triton
def test_hopper_kernel_says_what_it_cannot_do():
    gemm_hopper = pytest.importorskip("lowbit_kernels.gemm_hopper")
    from lowbit_kernels.layout import Layout, pack

    def layout(bits=4, group_size=128, in_features=256):
        return Layout(bits, group_size, True, torch.bfloat16, 64, in_features)

    x = torch.ones(33, 256, dtype=torch.bfloat16)
    for config, words in (({"block_m": 32}, "block_m"), ({"stages": 9}, "stages"), ({"block_m": 256}, "stages")):
        with pytest.raises(ValueError, match=words):
            gemm_hopper.Config(**config)
    with pytest.raises(ValueError, match="split is 2, expected 1 for block_m 256"):
        gemm_hopper.Config(block_m=256, stages=3, split=2)
    config, large = gemm_hopper.Config(), gemm_hopper.Config(block_m=256, stages=3)
    assert "bits is 3" in gemm_hopper.refusal(layout(bits=3, in_features=512), config, x)
    assert "padded to 320" in gemm_hopper.refusal(layout(bits=8, group_size=-1, in_features=320), config, x)
    assert "group_size is 64" in gemm_hopper.refusal(layout(bits=8, group_size=64), config, x)
    assert "registers would spill" in gemm_hopper.refusal(layout(bits=8), large, x)
    if not torch.cuda.is_available():
        assert "compute capability 9.0" in gemm_hopper.refusal(layout(), config, x)
        weight, meta = pack(torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 2, dtype=x.dtype), None, 4)
        with pytest.raises(ValueError, match=r"x is on cpu, expected a GPU of compute capability 9\.0"):
            gemm_hopper.launch(x, weight, meta, layout(), config)
        with pytest.raises(ValueError, match=r"bias is torch\.float32"):
            gemm_hopper.launch(x, weight, meta, layout(), config, bias=torch.zeros(64))
        with pytest.raises(ValueError, match=r"x is torch.bfloat16 \[33, 128\]"):
            gemm_hopper.launch(x[:, :128], weight, meta, layout(), config)
