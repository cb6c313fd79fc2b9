"""The operators for integer inputs as torch sees them, their choice and tuning, and lowbit's `triton_int8` backend."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from packed import rms_norm
from weights import assert_same, random_quantized

from lowbit.backends import choose, kernels_for, triton, triton_int8
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics import reference as definition
from lowbit.numerics.scheme import Scheme
from lowbit_kernels import reference
from lowbit_kernels.int8 import layout as int8_layout
from lowbit_kernels.int8 import ops as int8_ops
from lowbit_kernels.int8.layout import Int8Layout
from lowbit_kernels.tuning import select, tune

CPU = torch.device("cpu")
LAYOUT = Int8Layout(4, 64, torch.bfloat16, 70, 192)
FORMS = {  # scheme -> dtype of x and of the scales
    "W8A8": torch.bfloat16, "W8A8-STATIC": torch.bfloat16, "W8A8-STATIC_SYM": torch.float16,
    "W8A8-DYNAMIC_ASYM": torch.float32, "W4A8-G64": torch.float16, "W4A8-CHANNEL-DYNAMIC_ASYM": torch.bfloat16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv(select.TABLES_VARIABLE, str(tmp_path))
    monkeypatch.setattr(triton, "INTERPRETED", True)
    select.forget()
    yield
    select.forget()


def relative(actual, wanted):
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())


def arguments(layout, sym=True, static=False, bias=None):
    """Those of int8_linear behind x, and codes and scales of the weight."""
    codes, scales, _ = tune.random_weight(layout, CPU)
    packed = int8_layout.pack(codes, scales, layout)
    sums = None if sym else int8_layout.row_sums(codes, scales, layout)
    scale = torch.tensor([0.04]) if static else None
    zero = torch.tensor([-20], dtype=torch.int8) if static and not sym else None
    return (*packed, sums, bias, scale, zero, layout.bits, layout.group_size, layout.out_features), codes, scales


def test_linear_takes_any_input():
    form, codes, scales = arguments(LAYOUT)
    whole = torch.randn(2, 3, 197)
    for x in (
        whole[..., :-5].bfloat16(),  # rows apart
        whole[..., 5:].half().transpose(0, 1),
        torch.randn(192, 4).T,  # no row in one piece
        torch.randn(192).bfloat16(),
        torch.randn(70, 192).bfloat16(),
    ):
        y = int8_ops.int8_linear(x, *form)
        assert y.shape == (*x.shape[:-1], 70) and y.dtype == x.dtype
        wanted = reference.int8_linear(*reference.quantize_rows(x.reshape(-1, 192)), codes, scales, 4)
        assert relative(y.reshape(-1, 70), wanted) < 3e-3
    assert int8_ops.int8_linear(x[:0], *form).shape == (0, 70)


def test_a_quantized_x_serves_several_weights():
    form, codes, scales = arguments(LAYOUT, sym=False)
    x, norm = torch.randn(2, 3, 192).bfloat16(), torch.rand(192).bfloat16() + 0.5
    quantized = int8_ops.quantize_rows(x, False, None, None, norm, 1e-6)
    assert [tuple(part.shape) for part in quantized] == [(2, 3, 256), (2, 3), (2, 3)]
    y = int8_ops.int8_matmul(*quantized, *form[:3], None, 4, 64, torch.float16, 70, 192)
    normed = rms_norm(x, norm, 1e-6).reshape(-1, 192)
    wanted = reference.int8_linear(*reference.quantize_rows(normed, False), codes, scales, 4)
    assert y.dtype == torch.float16 and relative(y.reshape(-1, 70), wanted) < 3e-3


def test_gradients_pass_the_rounding_by():
    bias = torch.randn(70).requires_grad_()
    form, codes, scales = arguments(replace(LAYOUT, dtype=torch.float32), bias=bias)
    x, grad = torch.randn(5, 192).requires_grad_(), torch.randn(5, 70)
    int8_ops.int8_linear(x, *form).backward(grad)
    assert relative(x.grad, grad.double() @ reference.dequantize(codes, scales, None, 4).double()) < 1e-6
    assert relative(bias.grad, grad.sum(0)) < 1e-6


def test_opcheck():
    for sym, static, rows in ((False, True, 0), (True, False, 3)):
        form, *_ = arguments(LAYOUT, sym, static)
        x = torch.randn(rows, 192).bfloat16().requires_grad_(rows > 0)
        torch.library.opcheck(int8_ops.int8_linear.default, (x, *form))
    form, *_ = arguments(LAYOUT, sym=False)
    x = x.detach()
    for sym, norm in ((True, None), (False, torch.ones(192).bfloat16())):
        torch.library.opcheck(int8_ops.quantize_rows.default, (x, sym, None, None, norm, 1e-6))
    quantized = int8_ops.quantize_rows(x, False, None, None, None, 0.0)
    torch.library.opcheck(
        int8_ops.int8_matmul.default, (*quantized, *form[:3], None, 4, 64, torch.bfloat16, 70, 192)
    )  # fmt: skip


def test_choice_and_tuning():
    assert select.key(LAYOUT, 3) == "w4a8 g64 sym bf16 70x192 m4"
    assert select.choose(LAYOUT, 3, CPU).kernel == "int8" and select.choose(LAYOUT, 3, CPU).reason == "by rule"
    small = Int8Layout(8, -1, torch.float32, 64, 128)
    kernel, config, us, dropped = tune.fastest(small, 1, CPU)
    assert kernel == "int8" and us > 0 and dropped == {}
    gpu = select.gpu_of(CPU)
    select.write_table(select.user_table(gpu), gpu, {select.key(small, 1): (kernel, config, us)})
    assert select.choose(small, 1, CPU) == select.Choice("int8", config, "tuned here")
    h100 = select.Gpu("H100", (9, 0), 132)
    for bits, rows in ((8, 1), (4, 4096)):
        found = list(tune.candidates(Int8Layout(bits, -1, torch.bfloat16, 4096, 4096), rows, h100))
        assert len(found) == len(set(found)) > 4 and {kernel for kernel, _ in found} == {"int8"}


def test_commands_speak_of_these_kernels():
    scheme, form = Scheme.parse("W8A8"), ((64, 128), torch.bfloat16, 1, "cpu")
    kernels = kernels_for(scheme)
    assert kernels.explain(scheme, *form)["reason"] == "by rule"
    found = kernels.tune(scheme, *form)
    assert found["key"] == "w8a8 grow sym bf16 64x128 m1" and found["kernel"] == "int8"
    assert kernels.explain(scheme, *form) == {
        "kernel": "int8", "config": found["config"], "reason": "tuned here"
    }  # fmt: skip


def quantized(name, shape, dtype):
    scheme = Scheme.parse(name)
    scale = torch.tensor([0.03]) if scheme.is_static else None
    zero = torch.tensor([-25], dtype=torch.int8) if scale is not None and not scheme.activations.sym else None
    return random_quantized(scheme.weight_only, *shape, dtype).with_inputs(scheme, scale, zero)


@pytest.mark.parametrize("name, dtype", FORMS.items(), ids=str)
def test_backend_runs_and_restores(name, dtype):
    shape = (70, 192)
    qweight = quantized(name, shape, dtype)
    scheme = qweight.scheme
    assert choose(scheme, CPU, dtype, shape) == "triton_int8"
    buffers = triton_int8.prepare(qweight)
    restored = triton_int8.restore(buffers, scheme, shape)
    assert_same(restored, qweight)
    assert restored.input_scale == qweight.input_scale and restored.input_zero == qweight.input_zero
    for rows in (1, 40):
        x = torch.randn(rows, 192).to(dtype)
        y = triton_int8.linear(x, buffers, scheme, shape)
        assert relative(y, definition.integer_product(x, qweight)) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_a_layer():
    qweight = quantized("W8A8-STATIC", (48, 192), torch.bfloat16)
    layer = LowbitLinear.from_quantized(qweight, torch.randn(48).bfloat16(), backend="triton_int8")
    x = torch.randn(2, 3, 192).bfloat16()
    assert relative(layer(x), definition.linear(x, qweight, layer.bias)) < 5e-3
    assert_same(layer.quantized_weight(), qweight)


def test_reasons(monkeypatch):
    refuse = triton_int8.refuse
    assert "eight bits only" in refuse(Scheme(4, 128), CPU, torch.bfloat16, (64, 128))
    assert "symmetric weights only" in refuse(Scheme.parse("W8A8_ASYM"), CPU, torch.bfloat16, (64, 128))
    assert "bits is 3" in refuse(Scheme.parse("W3A8"), CPU, torch.bfloat16, (64, 256))
    assert "group_size is 32" in refuse(Scheme.parse("W4A8-G32"), CPU, torch.bfloat16, (64, 128))
    assert "one matrix at a time" in refuse(Scheme.parse("W8A8"), CPU, torch.bfloat16, (2, 64, 128))
    assert "runs on GPUs, not on mps" in refuse(Scheme.parse("W8A8"), "mps", torch.bfloat16, (64, 128))
    form = (Scheme.parse("W8A8-G256"), CPU, torch.float16, (64, 512))
    run = int8_ops.run
    for faulty, words in (
        (lambda *args: run(*args) * 1.1, "something else"),
        (lambda *args: 1 / 0, "ZeroDivisionError"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(int8_ops, "run", faulty)
            triton_int8._trial.cache_clear()
            assert words in refuse(*form) and choose(*form) == "native"
        triton_int8._trial.cache_clear()
    assert refuse(*form) is None
