"""Kernels on random sizes, strides and groups, against their definitions. LOWBIT_KERNEL_CASES runs more of them.

Each tensor ends where its memory ends, so that under a sanitizer (scripts/sanitize.sh) a number too many is an error.
"""

import os
import random

import pytest
import torch
from weights import matrix, random_quantized

from lowbit.backends import native
from lowbit.native import attention, gemm, matmul
from lowbit.native.build import library
from lowbit.native.linear import _weight_of, product
from lowbit.numerics.scheme import BITS, GROUP_SIZES, Scheme

pytestmark = pytest.mark.usefixtures("compiler")
CASES = int(os.environ.get("LOWBIT_KERNEL_CASES", "40"))
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.fixture(params=range(CASES))
def rng(request):
    return random.Random(request.param)


def size(rng: random.Random, largest: int) -> int:
    """Small ones more often: there the edges are."""
    return int(largest ** rng.random())


def test_product_of_integers(rng):
    """Integers that 16 bits hold times scales that are powers of two: every bit of the product is known."""
    bits, group = rng.choice(BITS), rng.choice(GROUP_SIZES)
    groups = size(rng, 1500 // group) if group > 0 else 1
    shape = size(rng, 70), groups * group if group > 0 else size(rng, 1500)
    scheme, rows = Scheme(bits, group, rng.random() < 0.5), size(rng, 12)
    qweight = random_quantized(scheme, *shape, seed=rng.randrange(2**31))
    qweight.scales.copy_(2.0 ** torch.randint(-3, 1, qweight.scales.shape))
    buffers = native.prepare(qweight)
    assert torch.equal(native.restore(buffers, scheme, shape).codes, qweight.codes)
    x, y = torch.randint(-127, 128, (rows, shape[1])).float(), torch.full((rows, shape[0]), torch.nan)
    product(_weight_of(buffers, scheme, shape), x, y, None, pieces=1)()
    assert torch.equal(y.double(), x.double() @ matrix(qweight).T), (scheme.name, shape, rows)


def test_product_of_many_rows(rng):
    """The same with blocks of inputs whose scale is 1; the tensors end where their memory ends."""
    bits, group = rng.choice(BITS), rng.choice([size for size in GROUP_SIZES if size % 32 == 0 or size < 0])
    in_features = group * size(rng, max(1500 // group, 1)) if group > 0 else size(rng, 1500)
    shape, rows = (size(rng, 70), in_features), size(rng, 40)
    scheme, arithmetic = Scheme(bits, group, rng.random() < 0.5), rng.choice(list(gemm.ARITHMETICS))
    qweight = random_quantized(scheme, *shape, seed=rng.randrange(2**31))
    qweight.scales.fill_(2.0**-12)
    buffers, x = native.prepare(qweight), torch.randint(-127, 128, (rows, in_features)).to(torch.bfloat16)
    x[:, ::32] = 127
    stored = buffers["codes"], buffers["scales"], buffers.get("zeros")
    library().use(rng.choice(library().levels))
    try:
        y = torch.ops.lowbit.gemm_native(x, *stored, None, scheme.name, shape[0], arithmetic)
    finally:
        library().use(library().levels[0])
    exact = x.double() @ matrix(qweight).T
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all(), (scheme.name, shape, rows, arithmetic)


def test_matmul(rng):
    rows, shape, dtype = rng.randint(1, 4), (size(rng, 200), size(rng, 600)), rng.choice(list(BOUNDS))
    x, weight = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    y = torch.full((rows, shape[0]), torch.nan, dtype=dtype)
    matmul.replay(y, x, weight.t())()
    terms = x.double().abs() @ weight.double().abs().T
    assert ((y - x.double() @ weight.double().T).abs() <= BOUNDS[dtype] * terms).all(), (rows, shape)


def strided(rng: random.Random, *sizes: int) -> torch.Tensor:
    """A tensor whose dimensions but the last are padded, or lie in another order."""
    order = rng.sample(range(3), 3)
    memory = torch.randn([sizes[axis] + rng.choice((0, 0, 3)) for axis in order] + [sizes[3]])
    for axis, dimension in enumerate(order):
        memory = memory.narrow(axis, memory.shape[axis] - sizes[dimension], sizes[dimension])
    return memory.permute(*(order.index(axis) for axis in range(3)), 3)


def test_attention(rng):
    batch, key_heads, group, queries = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 5), size(rng, 12)
    keys, head_dim, value_dim = size(rng, 1200), size(rng, 300), size(rng, 300)
    query = strided(rng, batch, key_heads * group, queries, head_dim)
    key, value = strided(rng, batch, key_heads, keys, head_dim), strided(rng, batch, key_heads, keys, value_dim)
    out = torch.full((batch, key_heads * group, queries, value_dim), torch.nan)
    mask = torch.rand(batch, 1, queries, keys) > 0.3 if rng.random() < 0.5 else None
    if mask is not None:
        mask[..., rng.randrange(keys)] = True
    attention.replay(out, query, key, value, mask, enable_gqa=True)()
    wide = (tensor.double() for tensor in (query, key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(*wide, mask, enable_gqa=True)
    assert (out - wanted).norm() <= 2e-6 * wanted.norm()
