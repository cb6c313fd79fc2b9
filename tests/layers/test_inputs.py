"""Inputs that are rounded where they are many: what asks for it, what does it, what tells it."""

import json

import pytest
import torch
from weights import matrix, random_quantized

import lowbit
from lowbit.backends import EXACT, get_backend, inputs_of, native
from lowbit.cli.commands.doctor import examine
from lowbit.errors import UsageError
from lowbit.generation import Decoder
from lowbit.layers.inputs import EXACT_VARIABLE, choose_inputs, inputs_of_model
from lowbit.layers.linear import LowbitLinear
from lowbit.native import gemm, operators
from lowbit.native.build import library
from lowbit.native.operators import ROUNDED_ROWS, replay, replay_experts
from lowbit.numerics.scheme import Scheme

pytestmark = pytest.mark.usefixtures("compiler")
ROUNDED = f"int8 inputs from {ROUNDED_ROWS} rows on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("inputs") / "quantized"
    lowbit.quantize("reference", made, scheme="W4A16-G32")
    return made


@pytest.fixture
def measured(monkeypatch):
    """The level that this machine uses is one on which rounding was measured to be faster."""
    monkeypatch.setattr(gemm, "_ROUNDED_LEVELS", (library().level,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_rounded_few_are_not(dtype):
    scheme, shape = Scheme(4, 32, False), (37, 256)
    qweight, x, bias = (
        random_quantized(scheme, *shape, dtype),
        torch.randn(ROUNDED_ROWS + 9, 256).to(dtype),
        torch.randn(37).to(dtype),
    )
    buffers = native.prepare(qweight)
    few = ROUNDED_ROWS - 1
    exact = native.linear(x[:few], buffers, scheme, shape, bias)
    assert torch.equal(native.linear_rounded(x[:few], buffers, scheme, shape, bias), exact)
    wide = x if dtype in (torch.float32, torch.bfloat16) else x.float()
    of_gemm = torch.ops.lowbit.gemm_native(
        wide, buffers["codes"], buffers["scales"], buffers["zeros"], bias.to(wide.dtype), scheme.name, 37, "int8"
    )
    y = native.linear_rounded(x, buffers, scheme, shape, bias)
    assert torch.equal(y, of_gemm.to(dtype))
    truth = x.double() @ matrix(qweight).T + bias.double()
    assert 1e-4 < (y - truth).norm() / truth.norm() < 1e-2  # rounded, and no more than that


@pytest.mark.parametrize("amx", [False, True])
def test_many_exact_rows(amx, monkeypatch):
    """Only y is rounded, whatever multiplies them: dot products of integers, or of bfloat16 where those are faster."""
    monkeypatch.setattr(operators, "has_amx", lambda: amx)
    scheme, shape = Scheme(4, 32, False), (37, 256)
    qweight, x = random_quantized(scheme, *shape, torch.bfloat16), torch.randn(150, 256).bfloat16()
    buffers, y = native.prepare(qweight), torch.empty(150, 37).bfloat16()
    replay(y, x, *(buffers[name] for name in ("codes", "scales", "zeros")), None, None, None, scheme.name, 37)()
    assert torch.equal(y, native.linear(x, buffers, scheme, shape))
    truth = x.double() @ matrix(qweight).T
    terms = x.double().abs() @ matrix(qweight).abs().T
    assert ((y - truth).abs() <= 2**-8 * truth.abs() + 2**-14 * terms).all()


def test_the_gradient_is_that_of_exact_inputs():
    scheme, shape = Scheme(4, 32), (37, 256)
    buffers, grad = native.prepare(random_quantized(scheme, *shape)), torch.randn(20, 37)
    found = []
    for run in (native.linear, native.linear_rounded):
        x = torch.ones(20, 256).requires_grad_()
        run(x, buffers, scheme, shape).backward(grad)
        found.append(x.grad)
    assert torch.equal(*found)


def test_experts_round_the_rows_of_those_that_have_many():
    scheme, shape = Scheme(4, 32), (3, 20, 64)
    each = [native.prepare(random_quantized(scheme, 20, 64, torch.bfloat16, seed=seed)) for seed in range(3)]
    buffers = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    x, start = torch.randn(50, 64).bfloat16(), torch.tensor([0, 4, 4, 45], dtype=torch.int32)
    y = native.experts_rounded(x, buffers, start, scheme, shape)
    assert torch.equal(y[:4], native.linear(x[:4], each[0], scheme, shape[1:]))
    assert torch.equal(y[4:45], native.linear_rounded(x[4:45], each[2], scheme, shape[1:]))
    assert not torch.equal(y[4:45], native.linear(x[4:45], each[2], scheme, shape[1:]))
    assert not y[45:].any()


@pytest.mark.parametrize("rows", [ROUNDED_ROWS, 40, 300])
def test_a_repeated_product_of_many_rows(rows):
    scheme, shape = Scheme(4, 32), (21, 96)
    buffers = native.prepare(random_quantized(scheme, *shape, torch.bfloat16))
    x, y = torch.empty(rows, 96).bfloat16(), torch.empty(rows, 21).bfloat16()
    call = replay(y, x, buffers["codes"], buffers["scales"], None, None, None, None, scheme.name, 21, False)
    for _ in range(2):
        x.copy_(torch.randn(rows, 96))
        call()
        assert torch.equal(y, native.linear_rounded(x, buffers, scheme, shape))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_repeated_product_of_experts(dtype, exact):
    """The routing may be another each time; rows of nobody are zeros each time."""
    scheme, shape = Scheme(4, 32, False), (3, 21, 96)
    each = [native.prepare(random_quantized(scheme, 21, 96, dtype, seed=seed)) for seed in range(3)]
    buffers = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    x, y, bias = torch.randn(40, 96).to(dtype), torch.empty(40, 21, dtype=dtype), torch.randn(3, 21).to(dtype)
    start = torch.empty(4, dtype=torch.int32)
    stored = buffers["codes"], buffers["scales"], buffers["zeros"]
    call = replay_experts(y, x, *stored, None, None, bias, start, scheme.name, 21, exact)
    for bounds in ((0, 13, 13, 40), (0, 1, 8, 9), (0, 40, 40, 40)):
        start.copy_(torch.tensor(bounds))
        call()
        assert torch.equal(y, native.experts(x, buffers, start, scheme, shape, bias, exact))
        for number in range(3):
            rows = slice(bounds[number], bounds[number + 1])
            truth = x[rows].double() @ matrix(random_quantized(scheme, 21, 96, dtype, seed=number)).T + bias[number]
            assert (y[rows] - truth).norm() <= (2**-6 if not exact else 2**-8) * truth.norm()
        assert not y[bounds[-1] :].any()
    assert replay_experts(y, x, *stored, None, None, bias, start.long(), scheme.name, 21) is None
    assert replay_experts(y, x, *stored, None, None, bias, start, "W4A8-G32", 21) is None


def test_what_is_not_rounded(measured):
    """Groups that are no blocks, integers, eight bits by default, levels that nobody timed, backends that never do."""
    assert inputs_of("native", Scheme(4, 16), False) == EXACT
    assert inputs_of("native", Scheme.parse("W8A8"), False) == EXACT
    assert inputs_of("reference", Scheme(4, 32), False) == EXACT
    assert inputs_of("native", Scheme(8, 32), None) == EXACT and inputs_of("native", Scheme(8, 32), False) == ROUNDED
    assert inputs_of("native", Scheme(4, 32), None) == ROUNDED and inputs_of("native", Scheme(4, 32), True) == EXACT
    assert not gemm.rounds(Scheme(4, 32), "portable") or library().level == "portable"
    scheme, shape = Scheme(4, 16), (21, 96)
    buffers, x = native.prepare(random_quantized(scheme, *shape)), torch.randn(40, 96)
    assert torch.equal(native.linear_rounded(x, buffers, scheme, shape), native.linear(x, buffers, scheme, shape))


def test_who_says_it(folder, measured, monkeypatch):
    """A keyword, else the environment, else what was measured."""
    for value, given, expected in (
        ("1", None, EXACT), ("1", False, ROUNDED), ("0", None, ROUNDED), ("0", True, EXACT), ("", None, ROUNDED),
    ):  # fmt: skip
        monkeypatch.setenv(EXACT_VARIABLE, value)
        assert inputs_of_model(lowbit.load(folder, exact=given)) == expected, (value, given)
    monkeypatch.setenv(EXACT_VARIABLE, "maybe")
    with pytest.raises(UsageError, match="LOWBIT_EXACT is 'maybe'"):
        lowbit.load(folder)


def test_it_stays_where_a_layer_moves():
    layer = LowbitLinear.from_quantized(random_quantized(Scheme(4, 32), 20, 64))
    assert inputs_of_model(layer) == EXACT  # nobody has asked
    choose_inputs(layer, False)
    for moved in (layer.unprepare().prepare(), layer.bfloat16()):
        assert inputs_of_model(moved) == ROUNDED and moved.run is native.linear_rounded


def test_tokens_of_exact_inputs_are_those_of_the_exact_kernel(folder):
    """Greedy, of a prompt of many rows; and rounded inputs change logits, but little."""
    ids = torch.arange(3, 60)[None]
    exact, rounded = (lowbit.load(folder, dtype="float32", exact=exact) for exact in (True, False))
    plain = lowbit.load(folder, dtype="float32", exact=True)
    for module in plain.modules():
        if isinstance(module, LowbitLinear):
            module.run = get_backend("native").linear
    made = [Decoder(model).generate(ids, max_new_tokens=12) for model in (exact, plain, rounded)]
    assert torch.equal(made[0].tokens, made[1].tokens)
    assert [each.stats.inputs for each in made] == [EXACT, EXACT, ROUNDED]
    assert json.loads(json.dumps(made[2].stats.as_dict()))["inputs"] == ROUNDED
    with torch.inference_mode():
        logits = [model(ids).logits.double() for model in (exact, rounded)]
    assert 0 < (logits[0] - logits[1]).norm() / logits[0].norm() < 0.05


def test_doctor_says_it(measured):
    assert examine()["instructions"]["rounded_bits"] == [3, 4]
