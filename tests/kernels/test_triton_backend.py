"""lowbit's `triton` backend in triton's interpreter: the same contract as every backend, and act-order."""

import pytest
import torch

pytest.importorskip("triton")

from weights import assert_same, matrix, random_quantized

from lowbit.backends import choose, triton
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

CPU = torch.device("cpu")
SCHEMES = [Scheme(4, 128), Scheme(4, 32, False), Scheme(8, 64), Scheme(8, -1, False), Scheme(3, 64), Scheme(2, 32)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", True)


def relative(actual, wanted):
    return float((actual.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_runs_and_restores(scheme, dtype):
    for shape in ((72, 256), (33, 384)):
        assert triton.refuse(scheme, CPU, dtype, shape) is None
        qweight = random_quantized(scheme, *shape, dtype)
        buffers = triton.prepare(qweight)
        assert_same(triton.restore(buffers, scheme, shape), qweight)
        for rows in (1, 40):
            x = torch.randn(rows, shape[1]).to(dtype)
            assert relative(triton.linear(x, buffers, scheme, shape), x.double() @ matrix(qweight).T) < 8e-3


def test_a_group_that_is_the_whole_row():
    scheme, shape = Scheme(4, 128), (64, 128)
    qweight = random_quantized(scheme, *shape, torch.bfloat16)
    buffers = triton.prepare(qweight)
    assert_same(triton.restore(buffers, scheme, shape), qweight)
    x = torch.randn(3, 128).to(torch.bfloat16)
    assert relative(triton.linear(x, buffers, scheme, shape), x.double() @ matrix(qweight).T) < 8e-3


@pytest.mark.parametrize("sym", [True, False])
def test_act_order(sym):
    """Inputs whose groups are mixed, as desc_act checkpoints have them."""
    scheme, shape = Scheme(4, 32, sym), (64, 128)
    plain = random_quantized(scheme, *shape, torch.bfloat16)
    g_idx = (torch.randperm(128, generator=torch.Generator().manual_seed(1)) // 32).to(torch.int32)
    qweight = QuantWeight(plain.codes, plain.scales, scheme, plain.zeros, g_idx)
    zeros = torch.full_like(plain.scales, 8.0) if sym else plain.zeros
    dense = (plain.codes.double() - zeros.double()[:, g_idx.long()]) * plain.scales.double()[:, g_idx.long()]
    layer = LowbitLinear.from_quantized(qweight, backend="triton")
    x = torch.randn(5, 128).to(torch.bfloat16)
    assert relative(layer(x), x.double() @ dense.T) < 8e-3
    restored = layer.quantized_weight()
    assert torch.equal(restored.g_idx, g_idx)
    assert torch.equal(restored.codes, plain.codes) and torch.equal(restored.scales, plain.scales)


def test_reasons():
    assert triton.available() is None
    assert "bfloat16 and float16" in triton.refuse(Scheme(4, 128), CPU, torch.float32, (64, 128))
    assert "multiple of 32" in triton.refuse(Scheme(4, 16), CPU, torch.bfloat16, (64, 128))
    assert "runs on GPUs, not on mps" in triton.refuse(Scheme(4, 128), "mps", torch.bfloat16, (64, 128))
    assert choose(Scheme(4, 128), CPU, torch.bfloat16, (64, 256)) == "triton"


def test_kernels_that_compute_something_else_are_not_used(monkeypatch, caplog):
    """As on a GPU or with a compiler that nobody has tried: the next backend runs the layer, and the log says why."""
    from lowbit_kernels import ops

    scheme, form = Scheme(2, 64, False), (CPU, torch.float16, (64, 128))
    run = ops.run
    for faulty, words in (
        (lambda *args: run(*args) * 1.1, "something else"),
        (lambda *args: 1 / 0, "ZeroDivisionError"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(ops, "run", faulty)
            triton._trial.cache_clear()
            assert words in triton.refuse(scheme, *form)
            assert choose(scheme, *form) == "native"
        triton._trial.cache_clear()
    assert triton.refuse(scheme, *form) is None


def test_where_the_kernel_of_hopper_alone_is_wrong_the_general_one_runs(monkeypatch, caplog):
    from lowbit_kernels import ops
    from lowbit_kernels.tuning import select

    gpu = select.Gpu("a Hopper", (9, 0), 132)
    monkeypatch.setattr(select, "gpu_of", lambda device: gpu)
    monkeypatch.setattr(select, "_distrusted", set())
    run, chosen = ops.run, []

    def launch(x, weight, meta, layout, bias, choice):
        chosen.append(choice.kernel)
        if choice.kernel == "hopper":
            return x.new_zeros(len(x), layout.out_features)
        return run(x, weight, meta, layout, bias, choice)

    monkeypatch.setattr(ops, "run", launch)
    for cached in (triton._trial, select._choose):
        cached.cache_clear()
    assert triton.refuse(Scheme(4, 128), CPU, torch.float16, (64, 512)) is None
    assert chosen == ["skinny", "hopper", "gemm"]
    assert "kernel of Hopper is not used" in caplog.text
    for cached in (triton._trial, select._choose):
        cached.cache_clear()


def test_a_layer():
    scheme = Scheme(4, 64, False)
    qweight = random_quantized(scheme, 48, 192, torch.bfloat16)
    layer = LowbitLinear.from_quantized(qweight, torch.randn(48).to(torch.bfloat16), backend="triton")
    assert layer.backend == "triton"
    x = torch.randn(2, 3, 192).to(torch.bfloat16)
    assert relative(layer(x), x.double() @ matrix(qweight).T + layer.bias.double()) < 8e-3
    assert_same(layer.quantized_weight(), qweight)
    saved = layer.state_dict()
    other = LowbitLinear.from_quantized(random_quantized(scheme, 48, 192, torch.bfloat16), layer.bias, "triton")
    other.load_state_dict(saved)
    assert torch.equal(other(x), layer(x))
