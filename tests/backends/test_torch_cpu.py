"""The paths of the torch_cpu backend: packed kernels for few rows, dequantized blocks for many."""

import pytest
import torch
from covering import cover
from weights import assert_same, matrix, random_quantized, unit

from lowbit.backends import torch_cpu
from lowbit.numerics import dense
from lowbit.numerics.scheme import Scheme

LAYOUTS = {
    "int4-sym": Scheme(4, 32),
    "int4-asym": Scheme(4, 64, False),
    "int4-2-bits": Scheme(2, 32),
    "int4-3-bits-asym": Scheme(3, -1, False),
    "int4-long-groups": Scheme(4, 512),  # the kernel takes them as two groups of 256
    "int8-channel": Scheme(8, -1),
    "two-int4": Scheme(8, 128),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
pytestmark = pytest.mark.skipif(torch_cpu.available() is not None, reason=str(torch_cpu.available()))


def crossover(dtype):
    wide = dense.gemm_dtype(dtype) == torch.float32
    return torch_cpu._CROSSOVER_FP32 if wide else torch_cpu._CROSSOVER_BF16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_layout
def test_few_rows_are_packed_and_many_are_dense(layout, dtype, monkeypatch, nan_poison):
    scheme, shape = LAYOUTS[layout], (80, 512)
    qweight = random_quantized(scheme, *shape, dtype)
    buffers, weight = torch_cpu.prepare(qweight), matrix(qweight)
    taken = []
    for module, path in ((torch_cpu, "_packed"), (dense, "product")):
        real = getattr(module, path)
        monkeypatch.setattr(module, path, lambda *args, path=path, real=real: taken.append(path) or real(*args))
    last = crossover(dtype) - 1
    for rows, expected in ((1, "_packed"), (last, "_packed"), (last + 1, "product"), (last + 34, "product")):
        x = torch.randn(rows, 512).to(dtype)
        y = torch_cpu.linear(x, buffers, scheme, shape)
        assert taken.pop() == expected and not taken
        exact = x.double() @ weight.T
        # a rounding of the weight and one of the output, each at most `unit`
        assert (y.double() - exact).norm() <= 2 * unit(dtype) * exact.norm()


@pytest.mark.parametrize("layout, rows_of_a_block, native", cover(LAYOUTS, (1, 32, 128), (False, True)))
def test_dense_path_and_gradient_over_several_blocks(layout, rows_of_a_block, native, monkeypatch, nan_poison):
    """With both kinds of GEMM, whichever this CPU would choose."""
    monkeypatch.setattr(dense, "gemm_dtype", lambda dtype: dtype if native else torch.float32)
    scheme, shape = LAYOUTS[layout], (240, 512)
    qweight = random_quantized(scheme, *shape, torch.bfloat16)
    buffers, weight = torch_cpu.prepare(qweight), matrix(qweight)
    monkeypatch.setattr(dense, "BLOCK_ELEMENTS", rows_of_a_block * 512)
    blocks = list(torch_cpu._blocks(buffers, scheme, shape, torch.float32))
    assert len(blocks) > 1 and [stop for _, stop, _ in blocks[:-1]] == [start for start, _, _ in blocks[1:]]
    assert torch.equal(torch.cat([block for _, _, block in blocks]), weight.float())  # bf16 scales: exact in float32
    x, grad = torch.randn(130, 512).bfloat16().requires_grad_(), torch.randn(130, 240).bfloat16()
    y = torch_cpu.linear(x, buffers, scheme, shape)
    y.backward(grad)
    for actual, exact in ((y, x.double() @ weight.T), (x.grad, grad.double() @ weight)):
        assert (actual.double() - exact).norm() <= 2 * unit(torch.bfloat16) * exact.norm()


@pytest.mark.parametrize("native", [False, True], ids=["float32-gemm", "bf16-gemm"])
def test_gradient_does_not_wear_off_over_many_blocks(native, monkeypatch):
    """A sum over blocks that is rounded after each of them gets worse with out_features."""
    monkeypatch.setattr(dense, "gemm_dtype", lambda dtype: dtype if native else torch.float32)
    monkeypatch.setattr(dense, "BLOCK_ELEMENTS", 1)
    scheme, shape = Scheme(4, 32), (8192, 32)
    qweight = random_quantized(scheme, *shape, torch.bfloat16)
    x, grad = torch.randn(3, 32).bfloat16().requires_grad_(), torch.randn(3, 8192).bfloat16()
    torch_cpu.linear(x, torch_cpu.prepare(qweight), scheme, shape).backward(grad)
    exact = grad.double() @ matrix(qweight)
    assert (x.grad.double() - exact).norm() <= 2 * unit(torch.bfloat16) * exact.norm()


@each_layout
def test_layout_is_undone_for_every_rest_of_a_block(layout):
    for out_features in (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 240):
        scheme, shape = LAYOUTS[layout], (out_features, 512)
        qweight = random_quantized(scheme, *shape, torch.bfloat16, seed=out_features)
        assert_same(torch_cpu.restore(torch_cpu.prepare(qweight), scheme, shape), qweight)


@each_layout
def test_buffers_are_no_larger_than_the_codes_need(layout):
    """`prepare` keeps the weight once: half a byte a weight for up to 4 bits, one byte for 8, besides the scales."""
    scheme = LAYOUTS[layout]
    buffers = torch_cpu.prepare(random_quantized(scheme, 64, 512, torch.bfloat16))
    codes = sum(t.nbytes for name, t in buffers.items() if name.startswith("int"))
    assert codes == 64 * 512 * (1 if scheme.bits == 8 else 0.5)
    assert set(buffers) == set(torch_cpu._keys(scheme))


@pytest.mark.parametrize("layout", ["int4-sym", "int4-asym", "int8-channel", "two-int4"])
def test_operator_is_declared_as_it_behaves(layout):
    scheme = LAYOUTS[layout]
    buffers = torch_cpu.prepare(random_quantized(scheme, 16, 512, torch.bfloat16))
    for requires_grad in (False, True):
        x = torch.randn(3, 512).bfloat16().requires_grad_(requires_grad)
        tensors = [buffers[key] for key in torch_cpu._keys(scheme)]
        bias = torch.randn(16).bfloat16().requires_grad_() if requires_grad else None
        arguments = (x, tensors, bias, scheme.bits, scheme.group_size, scheme.sym, 16)
        torch.library.opcheck(torch.ops.lowbit.linear_torch_cpu.default, arguments)
