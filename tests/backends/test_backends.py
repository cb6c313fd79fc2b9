"""What every backend in the table must do: give a reason, or equal the float64 product."""

import logging
import os
import shutil

import pytest
import torch
from covering import covering
from weights import BITS, DTYPES, SCHEMES, assert_same, matrix, random_quantized, unit

from lowbit import backends
from lowbit.backends import BACKENDS, choose, get_backend
from lowbit.errors import BackendError, UsageError
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

# (N, K): one output, blocks of 16, 32 and 64 outputs with and without a rest, inputs off every multiple, long inputs
SHAPES = [
    (1, 32), (5, 1), (6, 20), (16, 32), (48, 96), (80, 96), (160, 96), (7, 172), (48, 172), (80, 256), (160, 256),
    (96, 1024),
]  # fmt: skip
ROWS = (0, 1, 3, 17, 64, 130)  # on both sides of 16 and 96, where torch_cpu passes from one path to the other
LAYOUTS = [Scheme(4, 32), Scheme(2, 128), Scheme(3, 64, False), Scheme(4, -1, False), Scheme(8, 64), Scheme(8, -1)]

# Those that run on a CPU; tests/kernels/test_triton_backend.py has the other one
HERE = [
    n for n in BACKENDS if get_backend(n).refuse(Scheme(4, 128), torch.device("cpu"), torch.bfloat16, (64, 128)) is None
]
each_backend = pytest.mark.parametrize("name", HERE)
each_layout = pytest.mark.parametrize("scheme", LAYOUTS, ids=lambda s: s.name)


def tolerance(dtype, in_features):
    """Twice the largest error of one rounding: the weight may be rounded to `dtype` once and the output once. Sums are
    in float32, K roundings of 2^-24 that add up like a random walk: nothing beside those two, except in float32."""
    return (2 + (in_features**0.5 if dtype == torch.float32 else 0)) * unit(dtype)


def sums(x, weight):
    """x W^T in float64, and the sums of the squares of its terms."""
    return x.double() @ weight.T, x.double().square() @ weight.square().T


def error(y, exact, squares):
    """|y - exact| in terms of |exact|, or of its terms added as if they were independent, should the sums cancel."""
    size = max(exact.norm(), squares.sum().sqrt())
    return float((y.double() - exact).norm() / size) if y.numel() else 0.0


@covering(name=HERE, scheme=SCHEMES, dtype=DTYPES)
def test_refuses_or_equals_float64(name, scheme, dtype, nan_poison):
    """Each scheme on each backend: a layout of its own."""
    backend = get_backend(name)
    ran = 0
    for out_features, in_features in SHAPES:
        shape = (out_features, in_features)
        if not scheme.fits(in_features):
            continue
        reason = backend.refuse(scheme, torch.device("cpu"), dtype, shape)
        if reason is not None:
            assert isinstance(reason, str) and reason
            continue
        ran += 1
        qweight = random_quantized(scheme, *shape, dtype)
        buffers = backend.prepare(qweight)
        assert_same(backend.restore(buffers, scheme, shape), qweight)
        x = torch.randn(max(ROWS), in_features).to(dtype)
        exact, squares = sums(x, matrix(qweight))
        for rows in ROWS:
            y = backend.linear(x[:rows], buffers, scheme, shape)
            assert y.shape == (rows, out_features) and y.dtype == dtype
            assert error(y, exact[:rows], squares[:rows]) <= tolerance(dtype, in_features), (shape, rows)
        assert_same(backend.restore(buffers, scheme, shape), qweight)  # after use as before
    assert ran or name != "reference"


def test_which_backends_run_on_a_cpu():
    """All three for this weight, but for those that say of this machine or this torch that they cannot run at all."""
    assert [name for name in ("native", "torch_cpu", "reference") if get_backend(name).available() is None] == HERE


def test_torch_cpu_refuses_no_scheme_that_it_is_for():
    """A backend that refuses everything would pass the test above."""
    refused = {}
    for scheme in SCHEMES:
        for dtype in (torch.bfloat16, torch.float16):
            reason = get_backend("torch_cpu").refuse(scheme, torch.device("cpu"), dtype, (160, 1024))
            if reason:
                refused[scheme] = reason
    assert set(refused) == {s for s in SCHEMES if s.group_size == 16 or s.bits in (5, 6) or (s.bits == 8 and not s.sym)}


@pytest.mark.skipif(shutil.which(os.environ.get("CC") or "cc") is None, reason="there is no C compiler")
def test_where_there_is_a_compiler_the_native_backend_runs():
    """Or what needs it would be skipped, unnoticed."""
    assert get_backend("native").available() is None


@covering(name=HERE, scheme=LAYOUTS, dtype=("bf16", "fp16"))
def test_inputs_with_a_mean(name, scheme, dtype):
    """Behind an activation function inputs are not centred. A backend that computes y as a difference of large parts
    and rounds those on the way loses what the weights, centred themselves, would have cancelled."""
    dtype = DTYPES[dtype]
    qweight = quantize_nearest((0.02 * torch.randn(160, 1024)).to(dtype), scheme)
    backend, shape = get_backend(name), (160, 1024)
    buffers = backend.prepare(qweight)
    x = (torch.randn(130, 1024) + 2).to(dtype)
    for rows in (1, 17, 130):
        y = backend.linear(x[:rows], buffers, scheme, shape)
        assert error(y, *sums(x[:rows], matrix(qweight))) <= tolerance(dtype, 1024), rows


@each_layout
@each_backend
def test_bias(name, scheme, nan_poison):
    backend, shape = get_backend(name), (80, 256)
    for dtype in DTYPES.values():
        if backend.refuse(scheme, torch.device("cpu"), dtype, shape):
            continue
        qweight = random_quantized(scheme, *shape, dtype)
        buffers = backend.prepare(qweight)
        bias = torch.randn(80).to(dtype).requires_grad_()
        for rows in (0, 1, 17, 130):
            x = torch.randn(rows, 256).to(dtype)
            exact, squares = sums(x, matrix(qweight))
            y = backend.linear(x, buffers, scheme, shape, bias)
            assert y.dtype == dtype
            assert error(y, exact + bias.double(), squares) <= tolerance(dtype, 256), (dtype, rows)
        y.sum().backward()
        assert torch.equal(bias.grad, torch.full_like(bias, rows))


@each_layout
@each_backend
def test_gradient_of_the_input(name, scheme, nan_poison):
    backend, shape = get_backend(name), (80, 256)
    for dtype in DTYPES.values():
        if backend.refuse(scheme, torch.device("cpu"), dtype, shape):
            continue
        qweight = random_quantized(scheme, *shape, dtype)
        buffers = backend.prepare(qweight)
        for rows in (1, 3, 130):
            x = torch.randn(rows, 256).to(dtype).requires_grad_()
            grad = torch.randn(rows, 80).to(dtype)
            backend.linear(x, buffers, scheme, shape).backward(grad)
            assert x.grad.dtype == dtype
            assert error(x.grad, *sums(grad, matrix(qweight).T)) <= tolerance(dtype, 80), (dtype, rows)


@each_layout
@each_backend
def test_inputs_of_any_rank_and_stride(name, scheme):
    qweight = random_quantized(scheme, 48, 128, torch.bfloat16)
    layer = LowbitLinear.from_quantized(qweight, backend=name)
    assert layer.backend == name
    x = torch.randn(2, 3, 128).bfloat16()
    flat = x.view(6, 128)
    expected = layer(flat)
    assert error(expected, *sums(flat, matrix(qweight))) <= tolerance(torch.bfloat16, 128)
    wide = torch.full((2, 3, 256), torch.nan, dtype=torch.bfloat16)
    wide[:, :, ::2] = x
    for strided in (x, x.transpose(0, 1).contiguous().transpose(0, 1), wide[:, :, ::2], flat.T.contiguous().T):
        y = layer(strided)
        assert y.shape == (*strided.shape[:-1], 48)
        assert torch.equal(y.reshape(6, 48), expected)
    one = layer(flat[0])
    assert one.shape == (48,) and error(one[None], *sums(flat[:1], matrix(qweight))) <= tolerance(torch.bfloat16, 128)
    assert layer(flat[0].expand(5, 128)).shape == (5, 48)
    assert layer(x[:0]).shape == (0, 3, 48)


@each_layout
@each_backend
def test_strided_weights(name, scheme):
    plain = random_quantized(scheme, 48, 128, torch.bfloat16)
    codes, scales = plain.codes.T.contiguous().T, plain.scales.T.contiguous().T
    strided = QuantWeight(codes, scales, scheme, plain.zeros if scheme.sym else plain.zeros.T.contiguous().T)
    backend, x = get_backend(name), torch.randn(100, 128).bfloat16()
    buffers = backend.prepare(strided)
    assert_same(backend.restore(buffers, scheme, (48, 128)), plain)
    for rows in (3, 100):
        y = backend.linear(x[:rows], buffers, scheme, (48, 128))
        assert error(y, *sums(x[:rows], matrix(plain))) <= tolerance(torch.bfloat16, 128)


@each_backend
def test_inputs_scattered_over_groups_are_not_run_as_if_in_order(name):
    """A backend may support g_idx or raise; it may not drop it."""
    plain = random_quantized(Scheme(4, 32), 16, 128, torch.bfloat16)
    order = torch.arange(128, dtype=torch.int32) % 4
    scattered = QuantWeight(plain.codes, plain.scales, plain.scheme, None, order)
    backend, x = get_backend(name), torch.randn(3, 128).bfloat16()
    try:
        y = backend.linear(x, backend.prepare(scattered), plain.scheme, (16, 128))
    except (ValueError, BackendError) as refusal:
        assert "g_idx" in str(refusal)
    else:
        assert error(y, *sums(x, matrix(scattered))) <= tolerance(torch.bfloat16, 128)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiles_as_one_graph():
    qweight = random_quantized(Scheme(4, 32), 16, 32, torch.bfloat16)
    layer = LowbitLinear.from_quantized(qweight, torch.ones(16).bfloat16())
    x = torch.randn(3, 32).bfloat16()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        y, expected = compiled(x), layer(x)
    # the addition of the bias may be rounded once instead of twice
    assert (y - expected).norm() <= 2 * unit(torch.bfloat16) * expected.norm()


# --- choosing ---


def test_every_backend_says_whether_it_is_available():
    for name in BACKENDS:
        reason = get_backend(name).available()
        assert reason is None or (isinstance(reason, str) and reason)


@pytest.mark.parametrize(
    ("scheme", "device", "dtype", "shape", "expected"),
    [
        (Scheme(4, 32), "cpu", torch.bfloat16, (64, 64), "torch_cpu"),
        (Scheme(4, 32), "cpu", torch.float32, (64, 64), "reference"),
        (Scheme(4, 16), "cpu", torch.bfloat16, (64, 64), "reference"),
        (Scheme(4, 32), "cpu", torch.bfloat16, (63, 64), "reference"),
        (Scheme(4, -1), "cpu", torch.bfloat16, (64, 172), "reference"),
        (Scheme(8, 32, False), "cpu", torch.bfloat16, (64, 64), "reference"),
        (Scheme(4, 32), "meta", torch.bfloat16, (64, 64), "reference"),
    ],
    ids=str,
)
def test_the_first_that_does_not_refuse(scheme, device, dtype, shape, expected, without_native):
    assert choose(scheme, torch.device(device), dtype, shape) == expected


@pytest.mark.usefixtures("compiler")
def test_native_comes_before_the_kernels_of_torch():
    for dtype in DTYPES.values():
        assert choose(Scheme(4, 32), torch.device("cpu"), dtype, (63, 64)) == "native"


def test_a_wanted_backend_is_taken_or_an_error():
    layer = (Scheme(4, 32), torch.device("cpu"), torch.bfloat16, (64, 64))
    assert choose(*layer, wanted="reference") == "reference"
    assert choose(*layer, wanted="torch_cpu") == "torch_cpu"
    reason = get_backend("torch_cpu").refuse(Scheme(4, 32), torch.device("cpu"), torch.float32, (64, 64))
    with pytest.raises(BackendError) as error:
        choose(Scheme(4, 32), torch.device("cpu"), torch.float32, (64, 64), wanted="torch_cpu")
    assert str(error.value) == f"backend torch_cpu cannot run W4A16-G32 [64, 64] in torch.float32 on cpu: {reason}"
    with pytest.raises(BackendError, match="backend torch_cpu cannot run"):
        LowbitLinear.from_quantized(random_quantized(Scheme(4, 16), 16, 32, torch.bfloat16), backend="torch_cpu")
    with pytest.raises(UsageError, match=r"backend 'cuda' is not known; allowed: .*reference"):
        choose(*layer, wanted="cuda")


def test_no_backend_at_all(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", {"torch_cpu": BACKENDS["torch_cpu"]})
    with pytest.raises(BackendError, match=r"no backend can run W4A16-G32 \[64, 64\] in torch.float32 on cpu"):
        choose(Scheme(4, 32), torch.device("cpu"), torch.float32, (64, 64))


def test_each_reason_is_logged_once(caplog, without_native):
    backends._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="lowbit")
    for bits in (4, 4, 2, 4):
        choose(Scheme(bits, 32), torch.device("cpu"), torch.float32, (64, 64))
        choose(Scheme(bits, 32), torch.device("cpu"), torch.bfloat16, (64, 64))
    messages = [record.getMessage() for record in caplog.records]
    for name in ("triton", "triton_int8", "torch_cpu", "int8_cpu"):  # each of W4A16-G32 and W2A16-G32
        assert sum(message.startswith(f"backend {name} passes over") for message in messages) == 2
    messages = [message for message in messages if "torch_cpu" in message]
    assert "torch_cpu passes over W4A16-G32 layers: runs bfloat16 and float16, not torch.float32" in messages[0]
    assert "W2A16-G32" in messages[1]


@pytest.mark.parametrize("bits", BITS)
def test_errors_of_refusals_name_numbers(bits):
    refuse = get_backend("torch_cpu").refuse
    cpu = torch.device("cpu")
    assert "172" in refuse(Scheme(bits, -1), cpu, torch.bfloat16, (64, 172))
    assert "63" in refuse(Scheme(bits, -1), cpu, torch.bfloat16, (63, 64))
    assert "16" in refuse(Scheme(bits, 16), cpu, torch.bfloat16, (64, 64))
    assert "cuda" in refuse(Scheme(bits, 32), torch.device("cuda"), torch.bfloat16, (64, 64))
