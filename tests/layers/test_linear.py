"""LowbitLinear: a packed and a prepared state that hold the same bits, and a forward that equals the dense one."""

import copy
import io

import pytest
import torch
from torch import nn
from weights import DTYPES, as_loaded, assert_same, matrix, random_quantized, unit

from lowbit.backends import choose
from lowbit.formats import compressed_tensors as ct
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.scheme import Scheme

# Between them every backend and layout: int4, int4 with zeros, two int4, int8, off the kernels' multiples, one word
CASES = [
    (Scheme(4, 32), 48, 96, "bf16"),
    (Scheme(3, 64, False), 48, 128, "fp16"),
    (Scheme(8, 32), 48, 96, "bf16"),
    (Scheme(8, -1), 48, 96, "bf16"),
    (Scheme(2, 16, False), 16, 32, "bf16"),
    (Scheme(8, -1, False), 7, 172, "fp16"),
    (Scheme(4, 32, False), 1, 32, "fp32"),
]
cases = pytest.mark.parametrize(
    ("scheme", "rows", "columns", "dtype"),
    [(s, n, k, DTYPES[d]) for s, n, k, d in CASES],
    ids=[f"{s.name}-{n}x{k}-{d}" for s, n, k, d in CASES],
)


def loaded(state, layer):
    """A layer of the same kind that was filled from a state dict."""
    with torch.device("meta"):
        empty = LowbitLinear(layer.in_features, layer.out_features, layer.scheme, layer.bias is not None, layer.dtype)
    empty.to_empty(device="cpu")
    empty.load_state_dict(state)
    return empty


def assert_packed(tensors, expected):
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@cases
def test_packed_prepared_packed(scheme, rows, columns, dtype):
    qweight = random_quantized(scheme, rows, columns, dtype)
    packed = ct.pack(qweight)
    layer = LowbitLinear.from_quantized(qweight)
    assert layer.backend is not None and not list(layer.parameters())
    assert_packed(layer.packed_tensors(), packed)
    assert_same(layer.quantized_weight(), qweight)
    assert layer.prepare() is layer

    assert layer.unprepare() is layer and layer.backend is None
    assert_packed(dict(layer.named_parameters()), packed)
    assert not list(layer.buffers()) and not any(p.requires_grad for p in layer.parameters())
    assert layer.unprepare() is layer
    assert_packed(layer.packed_tensors(), packed)
    assert_same(layer.quantized_weight(), qweight)

    assert_same(layer.prepare().quantized_weight(), qweight)
    assert layer.backend is not None


@cases
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_state_dict_is_the_checkpoint_in_both_states(scheme, rows, columns, dtype, bias):
    qweight = random_quantized(scheme, rows, columns, dtype)
    offset = torch.randn(rows).to(dtype) if bias else None
    layer = LowbitLinear.from_quantized(qweight, offset)
    expected = ct.pack(qweight) | ({"bias": offset} if bias else {})
    order = list if layer.bias is None else set
    for prepared in (True, False):
        state = layer.state_dict() if prepared else layer.unprepare().state_dict()
        assert order(state) == order(expected)
        assert_packed({name: state[name] for name in expected}, expected)
    nested = nn.ModuleDict({"a": layer.prepare()}).state_dict()
    assert set(nested) == {f"a.{name}" for name in expected}


@cases
def test_load_state_dict(scheme, rows, columns, dtype):
    """Into an empty layer, and over the weight of a prepared one."""
    qweight = random_quantized(scheme, rows, columns, dtype)
    bias = torch.randn(rows).to(dtype)
    source = LowbitLinear.from_quantized(qweight, bias)
    state = as_loaded(source.state_dict())
    x = torch.randn(5, columns).to(dtype)
    fresh = loaded(state, source)
    assert fresh.backend is None
    assert_same(fresh.quantized_weight(), qweight)
    assert torch.equal(fresh.prepare()(x), source(x))

    other = LowbitLinear.from_quantized(random_quantized(scheme, rows, columns, dtype, seed=1), torch.zeros_like(bias))
    assert not torch.equal(other(x), source(x))
    other.load_state_dict(state)
    assert other.backend == source.backend
    assert_same(other.quantized_weight(), qweight)
    assert torch.equal(other(x), source(x))


def test_load_state_dict_reports_missing_and_unexpected_keys():
    layer = LowbitLinear.from_quantized(random_quantized(Scheme(4, 32), 16, 32, torch.bfloat16))
    state = layer.state_dict()
    del state["weight_scale"]
    state["weight_zero_point"] = torch.zeros(2, 1, dtype=torch.int32)
    result = layer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["weight_scale"] and result.unexpected_keys == ["weight_zero_point"]


@cases
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "packed"])
def test_forward(scheme, rows, columns, dtype, prepared):
    qweight = random_quantized(scheme, rows, columns, dtype)
    weight, bias = matrix(qweight), torch.randn(rows).to(dtype)
    layer = LowbitLinear.from_quantized(qweight, bias)
    layer = layer if prepared else layer.unprepare()
    for x_dtype in {dtype, torch.float32}:  # inputs of another dtype too: norms and embeddings may stay in float32
        x = torch.randn(2, 3, columns).to(x_dtype)
        y = layer(x)
        assert y.dtype == x_dtype and y.shape == (2, 3, rows)
        exact = x.double() @ weight.T + bias.double()
        # one rounding each of the input, the weight, the product and the sum with the bias
        size = (x.double().square() @ weight.square().T + bias.double().square()).sqrt().norm()
        steps = 4 + (columns**0.5 if dtype == torch.float32 else 0)
        assert (y.double() - exact).norm() <= steps * unit(dtype) * max(size, exact.norm())


@cases
def test_weight_is_the_dequantized_matrix(scheme, rows, columns, dtype):
    qweight = random_quantized(scheme, rows, columns, dtype)
    layer = LowbitLinear.from_quantized(qweight)
    for state in (layer, layer.unprepare()):
        assert state.weight.dtype == dtype and state.weight.shape == state.shape == (rows, columns)
        assert torch.equal(state.weight, matrix(qweight).float().to(dtype))
        assert torch.equal(state.dequantize(torch.float32), matrix(qweight).float())
        assert "weight" not in state.state_dict() and "weight" not in dict(state.named_parameters())
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        layer.other  # noqa: B018


@cases
def test_deepcopy_shares_nothing(scheme, rows, columns, dtype):
    qweight = random_quantized(scheme, rows, columns, dtype)
    layer = LowbitLinear.from_quantized(qweight, torch.ones(rows, dtype=dtype))
    for state in (layer, copy.deepcopy(layer).unprepare()):
        twin = copy.deepcopy(state)
        assert twin.backend == state.backend
        for tensor in (*twin.buffers(), *twin.parameters()):
            tensor.data.zero_()
        assert_same(state.quantized_weight(), qweight)
        assert state.bias.eq(1).all()


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_another_dtype(dtype, prepared):
    """The codes stay, the scales are rounded, and the backend is chosen anew."""
    dtype = DTYPES[dtype]
    qweight = random_quantized(Scheme(4, 32, False), 48, 96, torch.bfloat16)
    layer = LowbitLinear.from_quantized(qweight, torch.ones(48).bfloat16())
    layer = (layer if prepared else layer.unprepare()).to(dtype)
    assert (layer.backend is not None) == prepared
    moved = layer.quantized_weight()
    assert torch.equal(moved.codes, qweight.codes) and torch.equal(moved.zeros, qweight.zeros)
    assert torch.equal(moved.scales, qweight.scales.to(dtype)) and moved.scales.dtype == dtype
    assert layer.bias.dtype == layer.dtype == layer.weight.dtype == dtype
    if prepared:
        assert layer.backend == choose(layer.scheme, torch.device("cpu"), dtype, (48, 96))
    x = torch.randn(3, 96).to(dtype)
    exact = x.double() @ matrix(moved).T + 1
    steps = 4 + (96**0.5 if dtype == torch.float32 else 0)
    assert (layer(x).double() - exact).norm() <= steps * unit(dtype) * exact.norm()


def test_to_another_device_keeps_the_state():
    layer = LowbitLinear.from_quantized(random_quantized(Scheme(4, 32), 16, 32, torch.bfloat16))
    chosen = layer.backend
    assert chosen is not None and layer.to("cpu").backend == chosen
    meta = copy.deepcopy(layer).to("meta")
    assert meta.backend is None and {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta.prepare() is meta and meta.backend is None  # nothing to lay out without data
    assert meta.weight.shape == (16, 32)


def test_wanted_backend_survives():
    layer = LowbitLinear.from_quantized(random_quantized(Scheme(4, 32), 16, 32, torch.bfloat16), backend="reference")
    assert layer.backend == copy.deepcopy(layer).to(torch.float16).unprepare().prepare().backend == "reference"


def test_files_of_a_model_hold_the_packed_tensors():
    """torch.save reaches the layer through state_dict only."""
    qweight = random_quantized(Scheme(4, 32), 16, 32, torch.bfloat16)
    file = io.BytesIO()
    torch.save(nn.Sequential(LowbitLinear.from_quantized(qweight)).state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert_packed({name.removeprefix("0."): tensor for name, tensor in state.items()}, ct.pack(qweight))


def test_placeholder_is_a_parameter_until_it_is_removed():
    layer = LowbitLinear(32, 16, Scheme(4, 32), False, torch.bfloat16)
    dense = torch.randn(16, 32)
    layer.add_placeholder(dense)
    assert layer.weight is dict(layer.named_parameters())["weight"] and torch.equal(layer.weight, dense)
    del layer.weight
    for name, tensor in ct.pack(random_quantized(Scheme(4, 32), 16, 32, torch.bfloat16)).items():
        layer._set_packed(name, tensor)
    assert layer.weight.shape == (16, 32) and "weight" not in dict(layer.named_parameters())


def test_repr_names_scheme_and_backend():
    layer = LowbitLinear.from_quantized(random_quantized(Scheme(4, 32), 16, 32, torch.bfloat16), backend="reference")
    assert repr(layer) == (
        "LowbitLinear(in_features=32, out_features=16, bias=False, scheme=W4A16-G32, backend=reference)"
    )
