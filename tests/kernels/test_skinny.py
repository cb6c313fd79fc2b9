"""The decode kernel against float64: every width, group size and dtype, rows and shapes that do not fit its blocks."""

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from packed import DTYPES, EXACT, ROUNDING, Case, codes_and_grid, error, inputs, packed, poisoned

from lowbit_kernels import launching, skinny
from lowbit_kernels import layout as layouts

pytestmark = pytest.mark.slow

# one entry per width and group size; symmetry, rows, shapes and splits take turns, their periods chosen to mix
INPUTS = {
    32: (224, 416),
    64: (320, 448),
    128: (640, 640),
    256: (768, 768),
    512: (1024, 1536),
    1024: (2048, 2048),
    -1: (43, 600),
}
ROWS, OUTPUTS, SPLITS = cycle((1, 2, 7, 8, 9, 16, 17, 1, 8, 3, 16)), cycle((64, 70, 1)), cycle((1, 2, 3, 4))
CASES = [
    (Case(bits, group, (b + g) % 2 == 0, dtype, next(ROWS), next(OUTPUTS), INPUTS[group][bits == 3]), next(SPLITS))
    for ((b, bits), (g, group)), dtype in zip(
        product(enumerate(layouts.SLICES), enumerate(INPUTS)), cycle(("bf16", "bf16", "fp16")), strict=False
    )
]


def config_of(layout, case, split):
    """The default but for the split; blocks of 128 outputs where they fit."""
    default = skinny.default_config(layout, case.M)
    block_n = 128 if layout.padded_out % 128 == 0 else 64
    return skinny.Config(block_n=block_n, block_m=default.block_m, split=split, tiles=default.tiles)


@pytest.mark.parametrize("case, split", CASES, ids=lambda v: str(v) if isinstance(v, Case) else f"split{v}")
def test_product(case, split, device):
    weight = packed(*codes_and_grid(case, device), case.bits)
    x = inputs(case, device)
    expected = x.double() @ weight.matrix.T
    config = config_of(weight.layout, case, split)
    workspace = launching.Workspace(device)

    exact = poisoned(expected.shape, torch.float32, device)
    assert skinny.launch(x, weight.weight, weight.meta, weight.layout, config, out=exact, workspace=workspace) is exact
    assert error(exact, expected) < EXACT

    # a second launch finds the counters at zero; 16-bit outputs are the same sums, rounded once
    y = skinny.launch(x, weight.weight, weight.meta, weight.layout, config, workspace=workspace)
    assert torch.equal(y, exact.to(x.dtype)) and error(y, expected) < ROUNDING[x.dtype]
    assert not any(counters.any() for counters in workspace.counters)


SCHEMES_OF_BLOCKS = [(4, 128, True, "bf16"), (8, 32, False, "fp16"), (2, 64, False, "bf16")]
BLOCKS = {
    "n16-m8-t1": (skinny.Config(block_n=16, block_m=8, split=2, tiles=1, warps=1), 9),
    "n32-m16-t2": (skinny.Config(block_n=32, block_m=16, split=3, tiles=2), 17),
    "n128-m32-t2": (skinny.Config(block_n=128, block_m=32, split=1, tiles=2, warps=4), 33),
    "n64-m64-t4": (skinny.Config(block_n=64, block_m=64, split=2, tiles=4), 65),
}


@pytest.mark.parametrize("config, rows", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("scheme", SCHEMES_OF_BLOCKS, ids=["w4", "w8", "w2"])
def test_blocks(scheme, config, rows, device):
    case = Case(*scheme, rows, 70, 256 * config.tiles)
    weight = packed(*codes_and_grid(case, device), case.bits)
    x = inputs(case, device)
    y = poisoned((case.M, case.N), torch.float32, device)
    skinny.launch(x, weight.weight, weight.meta, weight.layout, config, out=y)
    assert error(y, x.double() @ weight.matrix.T) < EXACT


@pytest.mark.parametrize("split", [1, 3], ids="split{}".format)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_bias_and_residual(sym, split, device):
    case = Case(4, 64, sym, "bf16", 5, 70, 448)
    weight = packed(*codes_and_grid(case, device), case.bits)
    x = inputs(case, device)
    bias, residual = (torch.randn(shape, device=device).bfloat16() for shape in (case.N, (case.M, case.N)))
    config = config_of(weight.layout, case, split)
    y = skinny.launch(x, weight.weight, weight.meta, weight.layout, config, bias=bias, residual=residual)
    assert error(y, x.double() @ weight.matrix.T + bias.double() + residual.double()) < ROUNDING[y.dtype]


@pytest.mark.parametrize("split", [1, 2], ids="split{}".format)
@pytest.mark.parametrize("bits", layouts.SLICES)
def test_gate_up(bits, split, device):
    """SiLU(gate) * up + residual of a fused weight whose rows are interleaved, not a multiple of the block."""
    case = Case(bits, 32, False, "bf16", 3, 40, 1024 if bits == 3 else 256)
    gate, up = codes_and_grid(case, device), codes_and_grid(case, device)
    weight = packed(*(layouts.interleave_gate_up(a, b) for a, b in zip(gate, up, strict=True)), bits)
    x = inputs(case, device)
    biases = torch.randn(2, case.N, device=device).bfloat16()
    residual = torch.randn(case.M, case.N, device=device)
    y = poisoned((case.M, case.N), torch.float32, device)
    skinny.launch(
        x, weight.weight, weight.meta, weight.layout, config_of(weight.layout, case, split),
        bias=layouts.interleave_gate_up(*biases), residual=residual, gate_up=True, out=y,
    )  # fmt: skip
    gate, up = (
        x.double() @ packed(*part, bits).matrix.T + b.double() for part, b in zip((gate, up), biases, strict=True)
    )
    assert error(y, torch.nn.functional.silu(gate) * up + residual.double()) < EXACT


def stacked(case, experts, device):
    weights = [packed(*codes_and_grid(case, device), case.bits) for _ in range(experts)]
    weight, meta = torch.stack([w.weight for w in weights]), torch.stack([w.meta for w in weights])
    return weight, meta, weights[0].layout, [w.matrix for w in weights]


EXPERTS = {  # rows of each expert, split, whether rows of x are gathered
    "uneven": ((3, 0, 17, 1), 2, True),
    "one-of-four": ((0, 0, 0, 8), 1, False),
    "one-row-each": ((1, 1, 1, 1), 2, False),
    "whole-tiles": ((16, 8, 8, 0), 1, True),
}


@pytest.mark.parametrize("counts, split, gathered", EXPERTS.values(), ids=EXPERTS)
def test_experts(counts, split, gathered, device):
    case = Case(4, 128, True, "bf16", sum(counts), 60, 256)
    weight, meta, layout, matrices = stacked(case, len(counts), device)
    start = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=device)
    config = skinny.Config(block_m=8, split=split)
    tiles = skinny.expert_tiles(start, case.M, config.block_m)
    x = inputs(case, device)
    gather = torch.randperm(case.M, device=device).to(torch.int32) if gathered else None
    bias = torch.randn(len(counts), case.N, device=device).bfloat16()
    y = poisoned((case.M, case.N), torch.float32, device)
    workspace = launching.Workspace(device)
    for _ in range(2):
        skinny.launch_experts(
            x, weight, meta, layout, config, tiles, gather=gather, bias=bias, out=y, workspace=workspace
        )  # fmt: skip
        rows = x.double() if gather is None else x.double()[gather.long()]
        expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).tolist()
        expected = torch.stack([matrices[e] @ row + bias[e].double() for e, row in zip(expert, rows, strict=True)])
        assert error(y, expected) < EXACT
        y.fill_(float("nan"))


@pytest.mark.parametrize("block_m", [8, 16])
def test_expert_tiles_cover_each_row_once(block_m, device):
    generator = torch.Generator().manual_seed(0)
    for experts, rows in ((1, 1), (3, 40), (64, 8), (8, 300)):
        counts = torch.bincount(torch.randint(0, experts, (rows,), generator=generator), minlength=experts)
        start = torch.cat([torch.zeros(1), counts.cumsum(0)]).to(device, torch.int32)
        owner = [None] * rows
        for expert, first, last in skinny.expert_tiles(start, rows, block_m).tolist():
            assert last - first <= block_m
            for row in range(first, last):
                assert owner[row] is None
                owner[row] = expert
        assert owner == torch.repeat_interleave(torch.arange(experts), counts).tolist()


def test_workspace_grows_and_is_shared_by_stream(device):
    workspace = launching.Workspace(device)
    small, counters = workspace.get(10, 3)
    assert workspace.get(10, 3)[0] is small and not counters.any()
    large, _ = workspace.get(small.numel() + 1, 3)
    assert large.numel() >= 2 * small.numel() and workspace.partials[0] is small  # a CUDA graph may point there
    assert launching.workspace_of(device) is launching.workspace_of(device)


def test_wrong_arguments(device):
    case = Case(4, 128, True, "bf16", 2, 64, 384)
    weight = packed(*codes_and_grid(case, device), case.bits)
    x = inputs(case, device)

    def launch(x=x, config=skinny.Config(), weight=weight, **kwargs):  # noqa: B008 - a frozen default
        return skinny.launch(x, weight.weight, weight.meta, weight.layout, config, **kwargs)

    with pytest.raises(ValueError, match=r"x is torch.float16 \[2, 384\].*expected torch.bfloat16 \[M, 384\]"):
        launch(x.half())
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 \[2, 383\]"):
        launch(x[:, 1:])
    with pytest.raises(ValueError, match=r"strides \(1, 2\)"):
        launch(x.T.contiguous().T)
    with pytest.raises(ValueError, match="block_n 128 does not divide the 64 padded"):
        launch(config=skinny.Config(block_n=128))
    with pytest.raises(ValueError, match="tiles 2 does not divide the 3 K tiles"):
        launch(config=skinny.Config(tiles=2))
    with pytest.raises(ValueError, match=r"bias is torch.bfloat16 \[63\] on .*, expected torch.bfloat16 \[64\]"):
        launch(bias=x.new_zeros(63))
    with pytest.raises(ValueError, match=r"out is torch.float64 \[2, 64\]"):
        launch(out=x.new_zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="block_m is 7, expected one of"):
        skinny.Config(block_m=7)
    assert launch(x[:0]).shape == (0, 64)


def test_long_iterations_cost_no_program():
    layouts_of = {n: layouts.Layout(2, 128, True, DTYPES["bf16"], n, 4096) for n in (4096, 28672)}
    small, large = (skinny.default_config(layout, 1) for layout in layouts_of.values())
    assert (small.tiles, small.split) == (1, 8) and (large.tiles, large.split) == (2, 1)
    assert skinny.default_config(layouts_of[28672], 32).tiles == 1


def test_hopper_has_configurations_that_keep_to_its_registers_and_slots(monkeypatch):
    """Those of scripts/aot/shipped.py, whose counts tests/kernels/aot_report.json has."""
    two, three = (layouts.Layout(bits, 64, True, DTYPES["bf16"], 28672, 4096) for bits in (2, 3))
    hopper, ampere = ((capability, 528) for capability in (launching.HOPPER, launching.AMPERE))

    def config(layout, rows, capability, programs):
        chosen = skinny.default_config(layout, rows, programs, capability)
        return chosen.block_n, chosen.block_m, chosen.tiles, chosen.warps, chosen.stages

    assert config(two, 16, *hopper) == (128, 16, 1, 2, 2) and config(two, 16, *ampere) == (64, 16, 2, 2, 3)
    assert config(two, 8, *hopper) == (64, 8, 2, 2, 3) and config(replace(two, group_size=128), 16, *hopper)[0] == 64
    assert config(replace(two, out_features=4096), 16, *hopper)[0] == 64  # half the programs would be missing
    assert config(three, 32, *ampere) == (64, 32, 1, 2, 3)
    for fenced, expected in ((True, (64, 32, 1, 4, 3)), (False, (32, 32, 1, 2, 3))):
        monkeypatch.setattr(launching, "FENCED", fenced)
        assert config(three, 32, *hopper) == expected


def test_default_config_fits():
    for bits, groups in product(layouts.SLICES, (1, 7)):
        for out_features, rows in ((64, 1), (4096, 9), (28672, 32)):
            layout = layouts.Layout(bits, 32 if groups > 1 else -1, True, DTYPES["bf16"], out_features, 32 * 7 * 9)
            config = skinny.default_config(layout, rows)
            assert layout.tiles % config.tiles == 0 and layout.padded_out % config.block_n == 0
