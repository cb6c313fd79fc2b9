"""Integer activations on CPUs, in C and on the float32 GEMM: the sums are those of int64, whatever the codes."""

from itertools import product

import pytest
import torch
from covering import covering
from weights import assert_same, random_quantized

from lowbit.backends import choose, get_backend, int8_cpu, native
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.activations import quantize_input
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.reference import linear as definition
from lowbit.numerics.scheme import BITS, TENSOR, TOKEN, Activations, Scheme

CPU = torch.device("cpu")
EVERY = [Activations(8, sym, strategy) for sym in (True, False) for strategy in (TOKEN, TENSOR)]
NAMES = [f"{activations.strategy}-{'sym' if activations.sym else 'asym'}" for activations in EVERY]
each_activations = pytest.mark.parametrize("activations", EVERY, ids=NAMES)
SYM = {"sym": True, "asym": False}


def with_inputs(qweight, activations, scale=0.02, zero=-5):
    scheme = Scheme(qweight.scheme.bits, qweight.scheme.group_size, qweight.scheme.sym, activations)
    grid = {"input_scale": torch.tensor([scale]), "input_zero": torch.tensor([zero], dtype=torch.int8)}
    stored = [grid[name] if name in input_grid(scheme) else None for name in grid]
    return qweight.with_inputs(scheme, *stored)


@pytest.fixture(params=["int8_cpu", "native"])
def run(request):
    if request.param == "native":
        request.getfixturevalue("compiler")

    def call(x, qweight, bias=None):
        backend, shape = get_backend(request.param), tuple(qweight.codes.shape)
        buffers = backend.prepare(qweight)
        assert_same(backend.restore(buffers, qweight.scheme, shape), qweight)
        return backend.linear(x, buffers, qweight.scheme, shape, bias)

    return call


def by_int64(x, qweight):
    """float32 [M, N] of a weight per channel, from sums in int64, by the operations of the definition."""
    codes, scale, zero = quantize_input(x, qweight.scheme.activations, qweight.input_scale, qweight.input_zero)
    steps = codes.long() - (0 if zero is None else zero.long())
    sums = steps @ (qweight.codes.long() - (128 if qweight.zeros is None else qweight.zeros.long())).T
    return (sums.double().float() * qweight.scales.float().T) * scale, sums


@each_activations
@pytest.mark.parametrize("sym", SYM.values(), ids=SYM)
def test_extreme_codes_are_summed_exactly(run, sym, activations):
    """All products as large as they get and of one sign: 16 bits saturate, and float32 in one piece rounds."""
    for in_features, (code, zero), value in product((1, 7, 515, 4099), ((0, 255), (255, 0)), (-1.0, 1.0)):
        codes = torch.full((3, in_features), code, dtype=torch.uint8)
        codes[1, ::2], codes[2, : in_features // 2] = 127, 131
        zeros = None if sym else torch.full((3, 1), zero, dtype=torch.uint8)
        scheme = Scheme(8, -1, sym)
        qweight = with_inputs(QuantWeight(codes, torch.ones(3, 1), scheme, zeros), activations, 1e-3, -128)
        x = torch.full((2, in_features), value)
        x[1, ::3] = -x[1, ::3]
        wanted, sums = by_int64(x, qweight)
        assert sums.abs().max() > 100 * 100 * in_features // 4
        assert torch.equal(run(x, qweight), wanted), (in_features, code, value)


def test_inputs_are_divided_no_more_than_needed():
    narrow = random_quantized(Scheme(8, -1), 8, 4096)
    narrow.codes.clamp_(118, 138)
    assert int8_cpu._parts(with_inputs(narrow, EVERY[0])) == 1
    wide, x = with_inputs(random_quantized(Scheme(8, -1), 8, 4096), EVERY[0]), torch.randn(5, 4096)
    assert int8_cpu._parts(wide) == 4
    y = int8_cpu.linear(x, int8_cpu.prepare(wide), wide.scheme, (8, 4096))
    assert torch.equal(y, by_int64(x, wide)[0])


@covering(bits=BITS, sym=SYM, activations=dict(zip(NAMES, EVERY, strict=True)))
def test_equals_the_definition(run, bits, sym, activations, nan_poison):
    for group, shape in ((-1, (33, 37)), (16, (5, 48)), (128, (900, 1280)), (32, (1, 32)), (-1, (7, 1))):
        qweight = with_inputs(random_quantized(Scheme(bits, group, sym), *shape), activations)
        x = torch.randn(19, shape[1]) + 0.5
        x[3], x[4, 0] = 0, 900.0
        bias = torch.randn(shape[0])
        for rows in (0, 1, 19):
            y, wanted = run(x[:rows], qweight, bias), definition(x[:rows], qweight, bias)
            assert y.shape == wanted.shape and y.dtype == torch.float32
            assert not rows or (y - wanted).norm() <= 1e-6 * wanted.norm()
        assert torch.equal(run(x[3:4], qweight, bias), bias[None])


@each_activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(run, dtype, activations):
    qweight = with_inputs(random_quantized(Scheme(8, -1), 24, 100, dtype), activations)
    x = torch.randn(9, 100).to(dtype)
    y, exact = run(x, qweight), definition(x.double(), qweight)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.001).all()


@each_activations
def test_a_token_with_nan_stays_one(run, activations):
    qweight = with_inputs(random_quantized(Scheme(8, -1), 5, 40), activations)
    x = torch.randn(3, 40)
    clean = run(x, qweight)
    x[1, 39] = torch.nan
    y = run(x, qweight)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


@each_activations
def test_gradients_are_those_of_the_definition(run, activations):
    for scheme in (Scheme(8, -1), Scheme(4, 16, False)):
        qweight = with_inputs(random_quantized(scheme, 40, 48), activations)
        grad, found = torch.randn(6, 40), []
        for function in (run, definition):
            x = torch.linspace(-2, 2, 6 * 48).view(6, 48).requires_grad_()
            bias = torch.zeros(40, requires_grad=True)
            function(x, qweight, bias).backward(grad)
            found.append((x.grad, bias.grad))
        for first, second in zip(*found, strict=True):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def test_the_operator_is_what_torch_expects():
    qweight = with_inputs(random_quantized(Scheme(8, -1, False), 8, 24), EVERY[-1])
    buffers = int8_cpu.prepare(qweight)
    x = torch.randn(3, 24, requires_grad=True)
    arguments = (x, " ".join(buffers), list(buffers.values()), torch.randn(8), qweight.scheme.name, 8)
    torch.library.opcheck(torch.ops.lowbit.linear_int8_cpu.default, arguments)


@pytest.mark.parametrize("backend", ["int8_cpu", "native"])
def test_a_layer_runs_and_gives_its_tensors_back(backend, request):
    if backend == "native":
        request.getfixturevalue("compiler")
    for activations in EVERY:
        qweight = with_inputs(random_quantized(Scheme(8, -1), 16, 40), activations)
        first = "native" if native.available() is None else "int8_cpu"
        assert choose(qweight.scheme, CPU, torch.float32, (16, 40)) == first
        layer = LowbitLinear.from_quantized(qweight, backend=backend)
        assert layer.backend == backend
        x = torch.randn(2, 3, 40)
        wanted = definition(x, qweight)
        assert torch.allclose(layer(x), wanted, rtol=1e-6, atol=1e-6)
        stored = layer.state_dict()
        assert stored["weight"].dtype == torch.int8 and torch.equal(stored["weight"].int() + 128, qweight.codes.int())
        assert_same(layer.unprepare().quantized_weight(), qweight)
        assert torch.allclose(layer(x), wanted, rtol=1e-6, atol=1e-6)  # packed, as accelerate moves it in and out


@pytest.mark.parametrize("name", ["W4A16", "W8A16-CHANNEL"])
def test_floating_point_inputs_are_refused(name):
    assert int8_cpu.refuse(Scheme.parse(name), CPU, torch.float32, (16, 128)) == "multiplies integer inputs only"
