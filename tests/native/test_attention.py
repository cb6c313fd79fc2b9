"""attention.c against torch's attention in float64."""

import pytest
import torch

from lowbit.native import attention

pytestmark = pytest.mark.usefixtures("level")
# batch, heads, heads of keys, queries, keys, head_dim, the values' head_dim
SHAPES = [
    (1, 32, 8, 1, 57, 64, 64), (2, 8, 8, 3, 130, 16, 16), (3, 6, 2, 1, 1, 80, 80), (1, 4, 1, 1, 300, 256, 256),
    (2, 9, 3, 5, 64, 20, 12), (1, 2, 1, 11, 65, 512, 7), (1, 4, 2, 1, 1100, 32, 32), (2, 2, 2, 3, 513, 8, 24),
]  # fmt: skip
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def tensors(shape, dtype, spread=1.0):
    batch, heads, key_heads, queries, keys, size, value_size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(batch, queries, heads, size, generator=generator).mul(spread).to(dtype).transpose(1, 2)
    # the first part of a cache
    key = torch.randn(batch, key_heads, keys + 9, size, generator=generator).to(dtype)[:, :, :keys]
    value = torch.randn(batch, key_heads, keys + 9, value_size, generator=generator).to(dtype)[:, :, :keys]
    return query, key, value, torch.empty(batch, queries, heads, value_size, dtype=dtype).transpose(1, 2)


def exact(query, key, value, mask=None, **options):
    wide = (tensor.double() for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*wide, mask, enable_gqa=True, **options)


def rounding(query, key) -> float:
    """By how much a weight changes where the largest score is summed in float32: its terms by the last bit of one."""
    terms = query.double().abs() @ key.double().abs().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    return float(terms.max()) * query.shape[-1] ** -0.5 * 2**-24


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, dtype):
    for spread in (1.0, 30.0):  # flat and peaked
        query, key, value, out = tensors(shape, dtype, spread)
        batch, heads, queries, keys = *query.shape[:3], key.shape[2]
        seen = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.5
        seen[..., 0] = True
        last = torch.zeros(batch, 1, 1, keys, dtype=torch.bool)
        last[..., -1] = True  # in the last block only
        for mask in (None, seen, last, seen.expand(batch, heads, queries, keys).contiguous()):
            attention.replay(out, query, key, value, mask, enable_gqa=True)()
            wanted = exact(query, key, value, mask)
            assert (out - wanted).norm() <= max(BOUNDS[dtype], rounding(query, key)) * wanted.norm()


def test_scale_and_fully_masked_queries():
    query, key, value, out = tensors(SHAPES[1], torch.float32)
    attention.replay(out, query, key, value, scale=0.3)()
    assert (out - exact(query, key, value, scale=0.3)).norm() <= 1e-6 * out.norm()
    mask = torch.ones(2, 1, 3, 130, dtype=torch.bool)
    mask[1, :, 2] = False
    attention.replay(out, query, key, value, mask)()
    assert out[1, :, 2].eq(0).all() and out[1, :, 1].ne(0).all()


def test_large_scores_nan_and_infinity():
    query, key, value, out = tensors(SHAPES[0], torch.float32)
    attention.replay(out, query * 1e4, key, value)()
    wanted = exact(query * 1e4, key, value)
    assert (out - wanted).norm() <= 1e-4 * wanted.norm()  # of what float32 resolves of such scores
    query[0, 3] = torch.nan
    attention.replay(out, query, key, value)()
    assert out[0, 3].isnan().all() and out[0, :3].isfinite().all() and out[0, 4:].isfinite().all()
    value[0, 7, 20, 5] = torch.inf
    attention.replay(out, query, key, value)()
    assert not out[0, 28:, 0, 5].isfinite().any() and out[0, 4:28].isfinite().all()


def test_unsupported_attention_is_left_to_torch():
    query, key, value, out = tensors(SHAPES[1], torch.float32)
    mask = torch.zeros(2, 1, 3, 130)
    for arguments, options in (
        ((query, key, value, mask), {}), ((query, key, value, None, 0.1), {}),
        ((query, key, value), {"is_causal": True}), ((query.half(), key.half(), value.half()), {}),
        ((query[0], key[0], value[0]), {}),
        ((query, key.transpose(2, 3).contiguous().transpose(2, 3), value), {}),
    ):  # fmt: skip
        assert attention.replay(out, *arguments, **options) is None
