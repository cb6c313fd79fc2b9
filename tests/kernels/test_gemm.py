"""The kernel for many rows against float64 and the dense weight it makes, bit by bit."""

import pytest
import torch
from covering import cover
from packed import DTYPES, EXACT, ROUNDING, Case, codes_and_grid, error, inputs, packed, poisoned

from lowbit_kernels import gemm
from lowbit_kernels import layout as layouts

pytestmark = pytest.mark.slow

INPUTS = {32: 96, 64: 320, 128: 384, 256: 512, 512: 512, 1024: 1024, -1: 171}
ROWS, OUTPUTS, JOINED = (33, 65, 1, 16), (64, 70, 1), (1, 2, 4)
CASES = [
    (Case(bits, group, sym, dtype, rows, outputs, INPUTS[group]), joined)
    for bits, group, sym, dtype, rows, outputs, joined in cover(
        layouts.SLICES, INPUTS, (True, False), ("bf16", "fp16"), ROWS, OUTPUTS, JOINED,
        where=lambda bits, *others: others[-1] <= layouts.SLICES[bits],  # of what is joined
    )
]  # fmt: skip


def rounded(weight):
    """The weight as this kernel multiplies it: in 16 bits, but per channel exact."""
    per_channel = weight.layout.group_size == layouts.PER_CHANNEL
    return weight.matrix if per_channel else weight.matrix.to(weight.layout.dtype).double()


@pytest.mark.parametrize("case, joined", CASES, ids=lambda v: str(v) if isinstance(v, Case) else f"joined{v}")
def test_product(case, joined, device):
    weight = packed(*codes_and_grid(case, device), case.bits)
    x = inputs(case, device)
    config = gemm.Config(block_n=64, block_m=32, joined=joined, warps=4, group_m=1 + joined)
    y = poisoned((case.M, case.N), torch.float32, device)
    gemm.launch(x, weight.weight, weight.meta, weight.layout, config, out=y)
    assert error(y, x.double() @ rounded(weight).T) < EXACT
    assert error(y, x.double() @ weight.matrix.T) < ROUNDING[x.dtype]


def test_output_rounds_once(device):
    for dtype in DTYPES:
        case = Case(4, 64, False, dtype, 40, 100, 192)
        weight = packed(*codes_and_grid(case, device), case.bits)
        x = inputs(case, device)
        exact = poisoned((case.M, case.N), torch.float32, device)
        config = gemm.default_config(weight.layout, case.M)
        gemm.launch(x, weight.weight, weight.meta, weight.layout, config, out=exact)
        y = gemm.launch(x, weight.weight, weight.meta, weight.layout, config)
        assert y.dtype == x.dtype and torch.equal(y, exact.to(y.dtype))


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
def test_every_tile_is_visited_once(group_m, device):
    case = Case(4, 32, True, "bf16", 70, 192, 32)
    weight = packed(*codes_and_grid(case, device), case.bits)
    x = inputs(case, device)
    config = gemm.Config(block_n=64, block_m=16, group_m=group_m)
    y = poisoned((case.M, case.N), torch.float32, device)
    gemm.launch(x, weight.weight, weight.meta, weight.layout, config, out=y)
    assert error(y, x.double() @ rounded(weight).T) < EXACT


@pytest.mark.parametrize("gate_up", [True, False], ids=["gate_up", "plain"])
def test_epilogue(gate_up, device):
    case = Case(4, 32, True, "bf16", 35, 80, 96)
    weight = packed(*codes_and_grid(case, device), case.bits)
    x, bias = inputs(case, device), torch.randn(case.N, device=device).bfloat16()
    expected = x.double() @ rounded(weight).T + bias.double()
    if gate_up:
        gate, up = expected.unflatten(1, (-1, 2, 8)).unbind(2)
        expected = (torch.nn.functional.silu(gate) * up).flatten(1)
    residual = torch.randn(expected.shape, device=device)
    y = poisoned(expected.shape, torch.float32, device)
    config = gemm.Config(block_n=64, block_m=32, warps=4)
    gemm.launch(
        x, weight.weight, weight.meta, weight.layout, config, bias=bias, residual=residual, gate_up=gate_up, out=y
    )  # fmt: skip
    assert error(y, expected + residual.double()) < EXACT


@pytest.mark.parametrize("case, _", CASES, ids=lambda v: str(v) if isinstance(v, Case) else "")
def test_dequantize(case, _, device):
    """Products of a small integer and a 16-bit scale, rounded once: equal to the last bit."""
    weight = packed(*codes_and_grid(case, device), case.bits)
    dense = gemm.dequantize(weight.weight, weight.meta, weight.layout)
    assert dense.dtype == weight.layout.dtype and torch.equal(dense, weight.matrix.to(dense.dtype))


def test_dequantize_rows(device):
    case = Case(4, 32, False, "fp16", 1, 200, 96)
    weight = packed(*codes_and_grid(case, device), case.bits)
    dense = weight.matrix.half()
    for start, rows in ((0, 64), (64, 100), (128, 72), (192, None)):
        out = poisoned((72 - 64 if rows is None else rows, case.K), torch.float16, device)
        gemm.dequantize(weight.weight, weight.meta, weight.layout, start=start, rows=rows, out=out)
        assert torch.equal(out, dense[start : start + len(out)])
    for start, rows in ((32, 10), (-64, 10), (128, 73), (0, 0)):
        with pytest.raises(ValueError, match=f"start is {start} and rows {rows}"):
            gemm.dequantize(weight.weight, weight.meta, weight.layout, start=start, rows=rows)


def test_wrong_arguments(device):
    case = Case(8, 32, True, "bf16", 2, 64, 96)
    weight = packed(*codes_and_grid(case, device), case.bits)
    x = inputs(case, device)

    def launch(x=x, config=gemm.Config(block_n=64), **kwargs):  # noqa: B008 - a frozen default
        return gemm.launch(x, weight.weight, weight.meta, weight.layout, config, **kwargs)

    with pytest.raises(ValueError, match=r"joined is 4, expected at most 2 for 8 bits"):
        launch(config=gemm.Config(block_n=64, joined=4))
    with pytest.raises(ValueError, match=r"block_n 128 does not divide the 64 padded out_features"):
        launch(config=gemm.Config())
    with pytest.raises(ValueError, match=r"x is torch.float16 \[2, 96\]"):
        launch(x.half())
    with pytest.raises(ValueError, match=r"residual is torch.bfloat16 \[2, 64\].*expected torch.float32"):
        launch(residual=x.new_zeros(2, 64), out=x.new_zeros(2, 64, dtype=torch.float32))
    with pytest.raises(ValueError, match="joined is 3, expected one of"):
        gemm.Config(joined=3)
    assert launch(x[:0]).shape == (0, 64)
