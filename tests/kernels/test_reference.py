"""The kernels' oracle and lowbit's definition are written apart and must agree."""

import pytest
import torch
from covering import covering
from weights import DTYPES, GROUPS, KERNEL_BITS, SCHEMES, matrix, random_quantized, unit

from lowbit.numerics import reference
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit_kernels import reference as kernels


def shape(scheme, rows):
    return rows, 43 if scheme.group_size == -1 else 3 * scheme.group_size


def scattered(qweight):
    """The same groups, their inputs dealt out at random."""
    in_features, groups = qweight.codes.shape[1], qweight.scales.shape[1]
    g_idx = (torch.randperm(in_features) % groups).int()
    return QuantWeight(qweight.codes, qweight.scales, qweight.scheme, qweight.zeros, g_idx)


def arguments(qweight):
    return qweight.codes, qweight.scales, qweight.zeros, qweight.scheme.bits, qweight.g_idx


@covering(bits=KERNEL_BITS, group=GROUPS, sym={"sym": True, "asym": False}, dtype=DTYPES)
def test_same_weight_and_same_product(bits, group, sym, dtype):
    scheme = Scheme(bits, group, sym)
    for rows, in_order in ((1, True), (7, True), (7, False)):
        qweight = random_quantized(scheme, *shape(scheme, rows), dtype)
        if not in_order:
            qweight = scattered(qweight)
        exact = matrix(qweight)
        # codes of 8 bits times scales of at most 24: one rounding, the same on both sides
        weight = kernels.dequantize(*arguments(qweight))
        assert weight.dtype == torch.float32 and torch.equal(weight, exact.float())
        assert torch.equal(weight, dequantize(qweight, torch.float32))

        x, bias = torch.randn(2, 3, qweight.in_features).to(dtype), torch.randn(rows).to(dtype)
        y, theirs = reference.linear(x, qweight, bias), kernels.linear(x, *arguments(qweight), bias=bias)
        wanted = x.double() @ exact.T + bias.double()
        size = (x.double().square() @ exact.square().T + bias.double().square()).sqrt().norm()
        size = max(size, wanted.norm())
        steps = qweight.in_features**0.5 * 2.0**-24
        # the kernels' oracle rounds the output only; the definition rounds weight, product and sum with the bias
        for result, roundings in ((theirs, 1), (y, 3)):
            assert result.dtype == dtype and result.shape == (2, 3, rows)
            assert (result.double() - wanted).norm() <= (roundings * unit(dtype) + steps) * size


def test_g_idx_matters():
    qweight = random_quantized(SCHEMES[0], 7, 48)
    assert not torch.equal(kernels.dequantize(*arguments(scattered(qweight))), kernels.dequantize(*arguments(qweight)))


def test_groups_must_divide_the_row():
    with pytest.raises(ValueError, match="in_features 50 is not a multiple of the 3 groups"):
        kernels.dequantize(torch.zeros(2, 50, dtype=torch.uint8), torch.ones(2, 3), None, 4)
