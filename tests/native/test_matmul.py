"""matmul.c against a product in float64."""

import pytest
import torch

from lowbit.native import matmul

pytestmark = pytest.mark.usefixtures("level")
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (37, 7), (5, 33), (64, 256), (129, 2051)], ids=str)
def test_product(shape, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    mix = torch.eye(shape[1]) + 0.5  # inputs that go together
    x = (torch.randn(rows, shape[1], generator=generator) @ mix).to(dtype)
    weight = torch.randn(shape, generator=generator).to(dtype)
    y = torch.full((rows, shape[0]), torch.nan, dtype=dtype)
    matmul.replay(y, x, weight.t())()
    wanted = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T  # what is rounded on the way
    assert ((y - wanted).abs() <= BOUNDS[dtype] * (wanted.abs() + 2**-8 * terms) + 1e-6 * terms).all()
    assert (y - wanted).norm() <= BOUNDS[dtype] * max(wanted.norm(), terms.norm() * 0.05)


def test_unsupported_products_are_left_to_torch():
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    for inputs, transposed in (
        (torch.randn(5, 16), weight.t()), (x, weight.t().contiguous()), (x[:, ::2], weight[:, :8].t()),
        (x.double(), weight.double().t()), (x.half(), weight.half().t()),
    ):  # fmt: skip
        assert matmul.replay(inputs @ transposed, inputs, transposed) is None
