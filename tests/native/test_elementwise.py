"""torch's small operations as elementwise.c computes them: equal to torch's own, rounding included."""

import pytest
import torch
from covering import covering

from lowbit.native import elementwise
from lowbit.native.elementwise import instructions, program

pytestmark = pytest.mark.usefixtures("level")
aten = torch.ops.aten
# operator -> its arguments behind the first tensor
UNARY = {
    aten.neg.default: (), aten.rsqrt.default: (), aten.sigmoid.default: (), aten.silu.default: (),
    aten.tanh.default: (), aten.gelu.default: (), aten.pow.Tensor_Scalar: (2,), aten.clone.default: (),
    aten.mean.dim: ([-1], True), aten.add.Tensor: (0.375,), aten.mul.Tensor: (-1.75,), aten.div.Tensor: (3,),
}  # fmt: skip
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
DTYPES = (torch.float32, torch.bfloat16)
# A unit in the last place, or two in float32: torch computes exponentials and sums in another order
NEAR = {torch.float32: 5e-7, torch.bfloat16: 2**-7}
CANCEL = (aten.mean.dim, aten.gelu.default)  # what is computed on the way is as large as the inputs


def again(func, args, kwargs=None) -> torch.Tensor | None:
    """What the kernel gives for func(*args), None if it does not know how."""
    output = func(*args, **(kwargs or {}))
    made = instructions(func, args, kwargs or {}, output)
    if made is None:
        return None
    exact = output.clone()
    output.zero_()
    program(made)()
    size = args[0].abs().max() if func in CANCEL else exact.abs()
    difference = (output.double() - exact.double()).abs()
    assert (difference <= NEAR[exact.dtype] * size.double() + 1e-9)[exact.isfinite()].all()
    # rounded as torch does it, but for what lies in the middle of two numbers
    assert exact.dtype == torch.float32 or (difference == 0).double().mean() > 0.9
    return output


@covering(func=UNARY.keys(), shape=((1,), (3, 17), (2, 3, 5, 64), (2, 1, 2049)), dtype=DTYPES)
def test_one_tensor(func, shape, dtype):
    x = torch.linspace(-9, 9, torch.Size(shape).numel()).view(shape)
    x = (x.abs() + 0.01 if func is aten.rsqrt.default else x + 0.001).to(dtype)
    assert again(func, (x, *UNARY[func])) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("func", BINARY, ids=str)
def test_two_tensors(func, dtype):
    """Broadcast, transposed, cut out."""
    x, y = torch.randn(2, 6, 5, 33).to(dtype), torch.randn(2, 6, 5, 33).to(dtype).abs() + 0.1
    for a, b in ((x, y), (x, y[:1, :, :1]), (x.transpose(1, 2), y.transpose(1, 2)), (x[..., ::2], y[..., :1]),
                 (x[0, 0], y[0, 0, :, 3:4]), (x[0, 0, 0], y[0, 0, 0])):  # fmt: skip
        assert again(func, (a, b)) is not None


def test_tanh_form_of_gelu_and_large_numbers():
    x = torch.tensor([-200.0, -88, -20, -1e-6, 0, 1e-6, 20, 88, 200])
    for func in (aten.sigmoid.default, aten.silu.default, aten.tanh.default, aten.gelu.default):
        again(func, (x,))
    assert again(aten.gelu.default, (torch.randn(50),), {"approximate": "tanh"}) is not None


@pytest.mark.parametrize("func", UNARY, ids=str)
def test_nan_stays_nan(func):
    x = torch.tensor([[torch.nan, 1.0, 2.0]])
    output = func(x, *UNARY[func])
    made = instructions(func, (x, *UNARY[func]), {}, output.zero_())
    program(made)()
    assert output[0, 0].isnan() and (output.numel() == 1 or output[0, 1:].isfinite().all())


@pytest.mark.parametrize("dim", [0, -1])
def test_parts_of_a_whole(dim):
    parts = [torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16().neg()]
    assert torch.equal(again(aten.cat.default, (parts, dim)), torch.cat(parts, dim))


def test_copies_convert():
    x = torch.randn(4, 7)
    for source, target in ((x, torch.empty(4, 7).bfloat16()), (x.bfloat16(), torch.empty(7, 4).t()), (x[0], x.clone())):
        program(instructions(aten.copy_.default, (target, source), {}, target))()
        assert torch.equal(target, source.to(target.dtype).expand_as(target))


def test_copies_round_to_even():
    """All that lies in the middle of two bfloat16, beside it, and at the ends."""
    middles = (torch.arange(0, 2**15, 7, dtype=torch.int32) << 16) + 2**15
    x = torch.cat([middles - 1, middles, middles + 1]).view(torch.float32)
    x = torch.cat([x, -x, torch.tensor([3.3895e38, torch.inf, -torch.inf, -0.0, 2.0**-126])])
    x = x[~x.isnan()][: elementwise._LARGEST]
    target = torch.empty(x.shape, dtype=torch.bfloat16)
    program(instructions(aten.copy_.default, (target, x), {}, target))()
    assert torch.equal(target.view(torch.int16), x.bfloat16().view(torch.int16))


def test_rows_go_where_a_tensor_says():
    keys, rows, position = torch.zeros(2, 3, 9, 4), torch.randn(2, 3, 1, 4), torch.tensor([2])
    call = program(instructions(aten.index_copy_.default, (keys, 2, position, rows), {}, keys))
    for place in (2, 8, 0):
        position.fill_(place)
        call()
        assert torch.equal(keys[:, :, place], rows[:, :, 0])
    assert keys[:, :, 1].eq(0).all()


def test_unsupported_operations_are_left_to_torch():
    x, half = torch.randn(3, 4), torch.randn(3, 4).bfloat16()
    large = torch.randn(elementwise._LARGEST + 1)
    for func, args, kwargs in (
        (aten.add.Tensor, (x, x), {"alpha": 2}),
        (aten.div.Tensor_mode, (x, x), {"rounding_mode": "floor"}),
        (aten.pow.Tensor_Scalar, (x, 1.5), {}),
        (aten.mean.dim, (x, [0], True), {}),
        (aten.mul.Tensor, (x.double(), x.double()), {}),
        (aten.add.Tensor, (x.long(), 1), {}),
        (aten.mul.Tensor, (half, torch.tensor(0.3)), {}),  # torch may round 0.3 before
        (aten.add.Tensor, (half, 0.3), {}),
        (aten.exp.default, (x,), {}),
        (aten.neg.default, (large,), {}),
        (aten.neg.default, (x[:0],), {}),
        (aten.neg.default, (x[None, None, None],), {}),
    ):
        assert again(func, args, kwargs) is None, func
