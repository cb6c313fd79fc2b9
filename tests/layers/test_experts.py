"""Fused expert parameters: packed tensors in, the matrix of one expert out."""

import copy

import pytest
import torch
from torch import nn
from weights import matrix, random_quantized

from lowbit.formats import compressed_tensors as ct
from lowbit.layers.experts import (
    ExpertWeights,
    expert_weights,
    finish_experts,
    pack_experts,
    packed_name,
    quantize_experts,
    restore_experts,
)
from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.scheme import Scheme

EXPERTS, OUT, IN = 3, 48, 64
SCHEMES = [Scheme(4, 32), Scheme(3, 16, False), Scheme(8, -1), Scheme(2, 64, False)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
each_layout = pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])


class Experts(nn.Module):
    """As transformers writes them: a 3-D parameter that the forward indexes by expert."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        shape = (IN, OUT) if transposed else (OUT, IN)
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, *shape))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, 8, 8))

    def product(self, x, expert):
        weight = self.gate_up_proj[expert]
        return x @ (weight if self.is_transposed else weight.T)


def quantized_module(scheme, transposed, dtype=torch.bfloat16):
    """(module, the float64 matrices of its experts in the layout of the parameter, their QuantWeights)"""
    module = Experts(transposed)
    qweights = [random_quantized(scheme, OUT, IN, dtype, seed) for seed in range(EXPERTS)]
    quantize_experts(module, "gate_up_proj", scheme, dtype)
    for suffix in ct.suffixes(scheme):
        stacked = torch.stack([ct.pack(q)[suffix] for q in qweights])
        parameter = getattr(module, packed_name("gate_up_proj", suffix))
        assert parameter.shape == stacked.shape and parameter.dtype == stacked.dtype and not parameter.requires_grad
        parameter.copy_(stacked)
    finish_experts(module, "gate_up_proj")
    return module, [matrix(q).T if transposed else matrix(q) for q in qweights], qweights


@each_layout
@each_scheme
def test_indexing_gives_the_matrix_of_an_expert(scheme, transposed):
    module, matrices, _ = quantized_module(scheme, transposed)
    weights = module.gate_up_proj
    assert isinstance(weights, ExpertWeights) and len(weights) == EXPERTS
    for expert, exact in enumerate(matrices):
        for index in (expert, torch.tensor(expert), expert - EXPERTS):
            assert weights[index].dtype == torch.bfloat16
            assert torch.equal(weights[index], exact.float().bfloat16())
    assert [torch.equal(a, b.float().bfloat16()) for a, b in zip(weights, matrices, strict=True)] == [True] * EXPERTS
    with pytest.raises(IndexError):
        weights[EXPERTS]
    assert torch.equal(weights.dequantize(), torch.stack(matrices).float().bfloat16())
    x = torch.randn(5, IN).bfloat16()
    dense = Experts(transposed)
    dense.gate_up_proj = nn.Parameter(torch.stack(matrices).float().bfloat16())
    for expert in range(EXPERTS):
        assert torch.equal(module.product(x, expert), dense.product(x, expert))


@each_scheme
def test_dequantize_in_float32_is_exact(scheme):
    module, matrices, _ = quantized_module(scheme, False)
    assert torch.equal(module.gate_up_proj.dequantize(torch.float32), torch.stack(matrices).float())


@each_layout
def test_state_dict_holds_the_packed_tensors_only(transposed):
    module, _, qweights = quantized_module(SCHEMES[1], transposed)
    names = {"gate_up_proj_packed", "gate_up_proj_scale", "gate_up_proj_zero_point", "gate_up_proj_shape"}
    state = module.state_dict()
    assert set(state) == names | {"down_proj"}
    assert torch.equal(state["gate_up_proj_packed"][2], ct.pack(qweights[2])["weight_packed"])
    assert set(expert_weights(module)) == {"gate_up_proj"} and expert_weights(nn.Linear(1, 1)) == {}


def test_weights_follow_copies_and_moves_of_their_module():
    module, matrices, _ = quantized_module(SCHEMES[0], False)
    twin = copy.deepcopy(module)
    twin.gate_up_proj_scale.data.mul_(2)
    assert torch.equal(twin.gate_up_proj[1], (2 * matrices[1]).float().bfloat16())
    assert torch.equal(module.gate_up_proj[1], matrices[1].float().bfloat16())
    twin.to("meta")
    assert twin.gate_up_proj[1].device.type == "meta"
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other, _, _ = quantized_module(SCHEMES[0], False)
    other.gate_up_proj_packed.data.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.gate_up_proj[1], matrices[1].float().bfloat16())


def test_weights_follow_the_dtype_of_their_module():
    module, matrices, _ = quantized_module(SCHEMES[0], False)
    module.to(torch.float32)
    assert module.gate_up_proj_scale.dtype == torch.float32
    assert module.gate_up_proj[0].dtype == torch.float32
    assert torch.equal(module.gate_up_proj[0], matrices[0].float())


@each_layout
@each_scheme
def test_restore_experts(scheme, transposed):
    module, matrices, _ = quantized_module(scheme, transposed)
    restore_experts(module, torch.float32)
    assert dict(module.named_parameters()).keys() == {"gate_up_proj", "down_proj"}
    assert isinstance(module.gate_up_proj, nn.Parameter) and expert_weights(module) == {}
    assert torch.equal(module.gate_up_proj, torch.stack(matrices).float())


@each_layout
@pytest.mark.parametrize("merged", [1, 2])
def test_pack_experts_quantizes_each_matrix_on_its_own(transposed, merged):
    """`weight_shape` is that of each of the `merged` tensors of a checkpoint, side by side."""
    scheme = Scheme(4, 32, False)
    dense = torch.randn(EXPERTS, *((IN, OUT) if transposed else (OUT, IN)))
    before = dense.clone()
    tensors = pack_experts(dense, scheme, transposed, merged, lambda w: quantize_nearest(w, scheme))
    assert torch.equal(dense, before) and tuple(tensors) == ct.suffixes(scheme)
    for expert in range(EXPERTS):
        expected = ct.pack(quantize_nearest(dense[expert].T if transposed else dense[expert], scheme))
        for suffix in ("weight_packed", "weight_scale", "weight_zero_point"):
            assert torch.equal(tensors[suffix][expert], expected[suffix])
        assert tensors["weight_shape"][expert].tolist() == [OUT // merged, IN] * merged

    module = Experts(transposed)
    quantize_experts(module, "gate_up_proj", scheme, torch.float32, merged)
    for suffix, tensor in tensors.items():
        parameter = getattr(module, packed_name("gate_up_proj", suffix))
        assert (parameter.shape, parameter.dtype) == (tensor.shape, tensor.dtype)
        parameter.copy_(tensor)
    assert torch.equal(module.gate_up_proj, torch.zeros_like(dense))  # the slot for a loader
    finish_experts(module, "gate_up_proj")
    step = tensors["weight_scale"].max()
    assert (module.gate_up_proj.dequantize() - dense).abs().max() <= step  # half, and half for the zero point
