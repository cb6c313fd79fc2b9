"""Products of many rows, gemm.c: integers exactly, and the same bits on every level of instructions."""

import pytest
import torch
from weights import matrix, random_quantized

from lowbit.backends import native
from lowbit.native import gemm
from lowbit.native.build import library
from lowbit.numerics.scheme import BITS, Scheme

pytestmark = pytest.mark.usefixtures("compiler", "nan_poison")
SCHEMES = [Scheme(bits, group, sym) for bits in BITS for group in (32, 64, 128, -1) for sym in (True, False)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
# Rows of x, and the shape of the weight: parts and whole tiles, blocks and chunks
SIZES = [(1, 64, 640), (2, 1, 32), (3, 16, 1152), (13, 37, 256), (24, 37, 96)]


def run(x, buffers, scheme, shape, bias=None, arithmetic="int8"):
    stored = buffers["codes"], buffers["scales"], buffers.get("zeros")
    return torch.ops.lowbit.gemm_native(x, *stored, bias, scheme.name, shape[0], arithmetic)


def sizes(scheme: Scheme):
    """SIZES with whole groups."""
    for rows, out_features, in_features in SIZES:
        yield rows, (out_features, -(-in_features // max(scheme.group_size, 1)) * max(scheme.group_size, 1))


def blocks_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 codes [M, K] and scales [M, K] of x in float32: the definition of the inputs of int8."""
    pad = -x.shape[1] % 32
    blocks = torch.nn.functional.pad(x.float(), (0, pad)).view(len(x), -1, 32)
    largest = blocks.abs().amax(2, keepdim=True).clamp(min=2.0**-80)
    inverse = torch.tensor(127.0) / largest  # `127 / largest` would be 127 times the reciprocal
    codes, scales = (blocks * inverse).round(), (largest / 127).expand_as(blocks)
    return tuple(part.reshape(len(x), -1)[:, : x.shape[1]].double() for part in (codes, scales))


@each_scheme
def test_integers_are_exact(level, scheme):
    """Inputs whose blocks have the scale 1, scales that are powers of two: every bit of y is known."""
    for rows, shape in sizes(scheme):
        qweight = random_quantized(scheme, *shape)
        qweight.scales.copy_(2.0 ** torch.randint(-3, 1, qweight.scales.shape))
        x = torch.randint(-127, 128, (rows, shape[1])).float()
        x[:, ::32] = 127
        y = run(x, native.prepare(qweight), scheme, shape)
        assert torch.equal(y.double(), x.double() @ matrix(qweight).T)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8(level, scheme, dtype):
    """Against the definition in float64, and the portable level bit by bit."""
    for rows, shape in sizes(scheme):
        qweight, bias = random_quantized(scheme, *shape, dtype), torch.randn(shape[0]).to(dtype)
        x = (torch.randn(rows, shape[1]) * torch.logspace(-3, 3, shape[1])).to(dtype)
        x[:, 32:64] = 0
        library().use(level)
        buffers = native.prepare(qweight)
        y = run(x, buffers, scheme, shape, bias)
        codes, scales = blocks_of(x)
        exact = (codes * scales) @ matrix(qweight).T + bias.double()
        terms = (codes * scales).abs() @ matrix(qweight).abs().T + bias.double().abs()
        assert ((y - exact).abs() <= 2**-20 * terms + torch.finfo(dtype).eps * exact.abs()).all()
        library().use("portable")
        assert torch.equal(y, run(x, buffers, scheme, shape, bias))


@each_scheme
def test_bf16(level, scheme):
    """Neither the inputs nor the codes are rounded, only sums."""
    for rows, shape in sizes(scheme):
        qweight, bias = random_quantized(scheme, *shape, torch.bfloat16), torch.randn(shape[0]).bfloat16()
        library().use(level)
        x, buffers = torch.randn(rows, shape[1]).bfloat16(), native.prepare(qweight)
        y = run(x, buffers, scheme, shape, bias, "bf16")
        exact = x.double() @ matrix(qweight).T + bias.double()
        terms = x.double().abs() @ matrix(qweight).abs().T + bias.double().abs()
        assert ((y - exact).abs() <= 2**-8 * exact.abs() + 2**-16 * terms).all()
        library().use("portable")
        assert level == "avx512bf16" or torch.equal(y, run(x, buffers, scheme, shape, bias, "bf16"))


def test_a_last_block_that_is_not_whole(level):
    for in_features in (1, 31, 33, 100):
        scheme, shape = Scheme(4, -1, False), (19, in_features)
        qweight = random_quantized(scheme, *shape)
        x = torch.randint(-127, 128, (5, in_features)).float()
        x[:, ::32] = 127
        qweight.scales.fill_(0.25)
        for arithmetic, dtype in (("int8", torch.float32), ("bf16", torch.bfloat16)):
            y = run(x.to(dtype), native.prepare(qweight), scheme, shape, None, arithmetic)
            assert torch.equal(y, (x.double() @ matrix(qweight).T).to(dtype))


@pytest.mark.parametrize("arithmetic", ["int8", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(level, value, arithmetic):
    scheme, shape = Scheme(4, 32), (17, 256)
    x = torch.randn(3, 256).bfloat16()
    x[1, 77] = value
    y = run(x, native.prepare(random_quantized(scheme, *shape, torch.bfloat16)), scheme, shape, None, arithmetic)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-25, 1e30])
def test_inputs_of_any_size(level, size):
    scheme, shape = Scheme(4, 32), (17, 256)
    qweight = random_quantized(scheme, *shape)
    x = torch.rand(2, 256) * size
    exact = x.double() @ matrix(qweight).T
    y = run(x, native.prepare(qweight), scheme, shape)
    assert (y - exact).norm() <= 0.01 * exact.norm() + 1e-22  # of the smallest block 2^-80 is the largest


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    scheme, shape = Scheme(4, 64, False), (203, 512)
    buffers, x = native.prepare(random_quantized(scheme, *shape)), torch.randn(37, 512)
    alone, before = run(x, buffers, scheme, shape), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run(x, buffers, scheme, shape), alone)
    finally:
        torch.set_num_threads(before)


def test_what_it_does_not_multiply():
    scheme, shape = Scheme(4, 16), (17, 256)
    buffers = native.prepare(random_quantized(scheme, *shape))
    with pytest.raises(ValueError, match="a group of 16 inputs is not a multiple of 32"):
        run(torch.randn(3, 256), buffers, scheme, shape)
    assert "float32" in gemm.refuse(Scheme(4, 32), "bf16", torch.float32)
    assert "float16" in gemm.refuse(Scheme(4, 32), "int8", torch.float16)
    assert "integer activations" in gemm.refuse(Scheme.parse("W8A8"), "int8", torch.float32)
    assert "no arithmetic 'int4'" in gemm.refuse(Scheme(4, 32), "int4", torch.float32)


@pytest.mark.parametrize("arithmetic", ["int8", "bf16"])
def test_operator_is_declared_as_it_behaves(arithmetic):
    scheme = Scheme(4, 32, False)
    buffers = native.prepare(random_quantized(scheme, 18, 96, torch.bfloat16))
    x, bias = torch.randn(3, 96).bfloat16(), torch.randn(18).bfloat16()
    arguments = x, buffers["codes"], buffers["scales"], buffers["zeros"], bias, scheme.name, 18, arithmetic
    torch.library.opcheck(torch.ops.lowbit.gemm_native.default, arguments)
