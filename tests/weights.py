"""Quantized weights for tests, and the float64 matrix that they stand for."""

import torch

from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

BITS = (2, 3, 4, 5, 6, 8)
KERNEL_BITS = (2, 3, 4, 8)  # of kernels on GPUs, and of GPTQ files
GROUPS = (16, 32, 64, 128, 256, 512, -1)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCHEMES = [Scheme(bits, group, sym) for bits in BITS for group in GROUPS for sym in (True, False)]


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`: 2^-8 for bf16, 2^-11 for fp16, 2^-24 for fp32."""
    return torch.finfo(dtype).eps / 2


def random_quantized(scheme: Scheme, out_features: int, in_features: int, dtype=torch.float32, seed=0) -> QuantWeight:
    """Every code and zero point is as likely as any other, so no part of a layout stays unused."""
    rng = torch.Generator().manual_seed(seed)
    groups = scheme.groups(in_features)

    def integers(*shape):
        return torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8, generator=rng)

    scales = (0.01 * torch.randn(out_features, groups, generator=rng).exp()).to(dtype)
    zeros = None if scheme.sym else integers(out_features, groups)
    return QuantWeight(integers(out_features, in_features), scales, scheme, zeros)


def matrix(qweight: QuantWeight) -> torch.Tensor:
    """float64 [N, K] = (code - zero) * scale, exact, written apart from lowbit.numerics.grid."""
    in_features, groups = qweight.codes.shape[1], qweight.scales.shape[1]
    group_of = torch.tensor([k * groups // in_features for k in range(in_features)])
    if qweight.g_idx is not None:
        group_of = qweight.g_idx.long()
    zeros = torch.full_like(qweight.scales, 2 ** (qweight.scheme.bits - 1), dtype=torch.float64)
    if qweight.zeros is not None:
        zeros = qweight.zeros.double()
    return (qweight.codes.double() - zeros[:, group_of]) * qweight.scales.double()[:, group_of]


def as_loaded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fresh row-major copies, as a file gives them. A transposed tensor with one row or column calls itself contiguous,
    and keeps strides that no file has."""
    return {name: torch.tensor(t.tolist(), dtype=t.dtype).reshape(t.shape) for name, t in tensors.items()}


def assert_same(actual: QuantWeight, expected: QuantWeight) -> None:
    assert actual.scheme == expected.scheme
    for field in ("codes", "scales", "zeros", "input_scale", "input_zero"):
        got, want = getattr(actual, field), getattr(expected, field)
        if want is None:
            assert got is None, field
        else:
            assert got.dtype == want.dtype and torch.equal(got, want), field


def old_words(codes):
    """[R, C] of 3 bits, ten to a word: compressed-tensors before 0.18."""
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns // 10), dtype=torch.int32)
    for c in range(columns):
        words[:, c // 10] |= codes[:, c].int() << 3 * (c % 10)
    return words
