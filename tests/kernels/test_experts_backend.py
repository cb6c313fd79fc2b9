"""Fused experts on the grouped kernel, in triton's interpreter: transformers' modules and models against float64."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from models import relative_error, save_tiny, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from weights import unit

import lowbit
from lowbit import backends
from lowbit.backends import triton
from lowbit.errors import BackendError
from lowbit.layers.experts import (
    QuantizedExperts,
    finish_experts,
    pack_experts,
    packed_name,
    quantize_experts,
    restore_experts,
)
from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.scheme import Scheme

pytestmark = pytest.mark.slow

EXPERTS, HIDDEN = 4, 64
CONFIG = SimpleNamespace(
    num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, hidden_size=HIDDEN, hidden_act="silu",
    intermediate_size=96, moe_intermediate_size=32, moe_latent_size=None, mlp_hidden_act="relu2",
    swiglu_alpha=1.7, swiglu_limit=7.0, _experts_implementation="eager",
)  # fmt: skip


class NormedExperts(MixtralExperts):
    """With a norm after each expert, as Muse Spark has. 5.17 knows no such experts."""

    def __init__(self, config):
        super().__init__(config)
        self.has_post_expert_norm = True
        self.post_expert_norm = nn.RMSNorm(HIDDEN, eps=1e-5, elementwise_affine=False)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = torch.zeros_like(hidden_states)
        for token, slot in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)):
            expert = top_k_index[token, slot]
            gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
            out = self.down_proj[expert] @ (self.act_fn(gate) * up)
            y[token] += self.post_expert_norm(out) * top_k_weights[token, slot]
        return y


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", True)


def dense_module(experts_class, dtype):
    module = experts_class(copy.copy(CONFIG)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=HIDDEN**-0.5)
    return module


def quantized(experts_class, scheme, dtype, backend=None, only=None):
    """An experts module of transformers, quantized (or only the parameter `only` of it) and prepared."""
    module = dense_module(experts_class, dtype)
    for name, parameter in list(module.named_parameters()):
        if parameter.ndim == 3 and only in (None, name):
            weights = parameter.detach()
            packed = pack_experts(weights, scheme, module.is_transposed, 1, lambda w: quantize_nearest(w, scheme))
            quantize_experts(module, name, scheme, dtype)
            for suffix, tensor in packed.items():
                setattr(module, packed_name(name, suffix), nn.Parameter(tensor, requires_grad=False))
            finish_experts(module, name)
    return module.prepare(backend)


def restored(module, dtype):
    """A dense copy with the weights that the quantized module stands for, in its own class."""
    module = copy.deepcopy(module)
    restore_experts(module, dtype)
    assert not isinstance(module, QuantizedExperts)
    return module.to(dtype)


def routed(tokens, dtype, top_k=2):
    """(hidden states, top_k_index, top_k_weights)"""
    index = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN).to(dtype), index, torch.rand(tokens, top_k).softmax(-1).to(dtype)


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    *[(Qwen3MoeExperts, Scheme(bits, 32, sym), BF16) for bits, sym in ((2, False), (3, True), (4, True), (8, False))],
    *[(Qwen3MoeExperts, Scheme(bits, 32, sym), FP16) for bits, sym in ((2, True), (3, False), (4, False))],
    (MixtralExperts, Scheme(4, 32, False), BF16),
    (MixtralExperts, Scheme(8, -1), FP16),
    (GptOssExperts, Scheme(4, 32), BF16),
    (GptOssExperts, Scheme(8, 32, False), FP16),
    (NemotronHExperts, Scheme(4, 32), BF16),
    (NormedExperts, Scheme(4, 32), BF16),
]


@pytest.mark.parametrize(("experts_class", "scheme", "dtype"), CASES, ids=str)
def test_equals_float64_and_rounds_no_more_than_dense_experts(experts_class, scheme, dtype, nan_poison):
    module = quantized(experts_class, scheme, dtype)
    assert module.is_prepared and {w.backend for w in module._expert_weights.values()} == {"triton"}
    exact, eager = restored(module, torch.float64), restored(module, dtype)
    for tokens in (1, 24):  # two experts have one row, and two none; all have many
        x, index, weights = routed(tokens, dtype)
        with torch.no_grad():
            wanted = exact(x.double(), index, weights.double())
            y, dense = module(x, index, weights), eager(x, index, weights)
        assert y.shape == x.shape and y.dtype == dtype
        # five roundings one after another, of which each is at most a unit and most are less
        assert relative_error(y, wanted) < 3 * unit(dtype), tokens
    assert relative_error(y, wanted) < 1.02 * relative_error(dense, wanted)


def test_indices_beyond_the_experts_add_nothing(nan_poison):
    """As expert parallelism marks tokens of other machines' experts: the rest is as if they had no weight."""
    module = quantized(GptOssExperts, Scheme(4, 32), BF16)
    x, index, weights = routed(6, BF16)
    away = torch.rand(index.shape) < 0.4
    away[0] = True
    with torch.no_grad():
        y = module(x, index.masked_fill(away, EXPERTS), weights.masked_fill(away, 0))
        wanted = module(x, index, weights.masked_fill(away, 0))
    assert torch.equal(y, wanted) and not y[0].any() and y[1:].any()


def test_gradients_of_inputs_and_of_routing_weights():
    module = quantized(GptOssExperts, Scheme(4, 32), BF16)
    exact = restored(module, torch.float64)
    x, index, weights = routed(6, BF16)
    inputs = [x.requires_grad_(), weights.requires_grad_()]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = torch.randn(6, HIDDEN).to(BF16)
    module(x, index, weights).backward(grad)
    exact(doubles[0], index, doubles[1]).backward(grad.double())
    for tensor, double in zip(inputs, doubles, strict=True):
        assert relative_error(tensor.grad, double.grad) < 4 * unit(BF16)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        assert relative_error(getattr(module, name).grad, getattr(exact, name).grad) < 4 * unit(BF16)


def test_nothing_waits_for_the_device(monkeypatch):
    """The module is one graph, and the operator runs on meta tensors, which have no values to wait for."""
    from lowbit_kernels import ops, skinny

    module = quantized(Qwen3MoeExperts, Scheme(4, 32), BF16)
    x, index, weights = routed(3, BF16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, index, weights), module(x, index, weights))
    buffers = {name: tensor.to("meta") for name, tensor in module._expert_weights["gate_up_proj"].prepared().items()}
    monkeypatch.setattr(skinny, "_launch", lambda *args: None)
    rows = torch.empty(6, HIDDEN, dtype=BF16, device="meta")
    start = torch.empty(EXPERTS + 1, dtype=torch.int32, device="meta")
    form = (4, 32, True, BF16, 64)
    y = ops._experts(rows, buffers["weight"], buffers["meta"], start, None, *form)
    assert y.shape == (6, 64) and y.device.type == "meta"


# --- states ---


@pytest.mark.usefixtures("compiler")
def test_copies_and_moves():
    module = quantized(GptOssExperts, Scheme(4, 32, False), BF16)
    case = routed(2, BF16)
    state = module.state_dict()
    with torch.no_grad():
        expected = module(*case)
        twin = copy.deepcopy(module)
        assert twin.is_prepared and torch.equal(twin(*case), expected)
        assert twin.to(FP16).is_prepared and twin.down_proj_bias.dtype == FP16
        wide = twin.to(torch.float32)
        assert wide.is_prepared  # of native: triton has no float32
        assert relative_error(wide(case[0].float(), case[1], case[2].float()), expected) < 2 * unit(BF16)
        assert torch.equal(module(*case), expected)
        again = quantized(GptOssExperts, Scheme(4, 32, False), BF16)
        assert not torch.equal(again(*case), expected)
        again.load_state_dict(state)
        assert again.is_prepared and torch.equal(again(*case), expected)


def test_prepared_buffers_are_all_there_is():
    packed = quantized(MixtralExperts, Scheme(4, 32, False), BF16, backend="reference")
    assert not packed.is_prepared  # that backend has no experts
    state = packed.state_dict()
    prepared = copy.deepcopy(packed).prepare("triton")
    assert {name for name, _ in prepared.named_parameters()} == {"gate_up_proj_shape", "down_proj_shape"}
    kinds = ("weight", "meta", "scales_like")
    names = {f"{parameter}_{kind}" for parameter in ("gate_up_proj", "down_proj") for kind in kinds}
    assert {name for name, _ in prepared.named_buffers()} == names
    for other in (prepared, copy.deepcopy(prepared).unprepare()):
        found = other.state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert {name for name, _ in other.named_buffers()} == set()
    for expert in range(EXPERTS):
        assert torch.equal(prepared.down_proj[expert], packed.down_proj[expert])


def test_experts_without_a_backend_stay_packed(caplog, without_native):
    backends._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="lowbit")
    for scheme, dtype, reason in (
        (Scheme(4, 16), BF16, "passes over W4A16-G16 experts: group_size 16"),
        (Scheme(4, 32), torch.float32, "passes over W4A16-G32 experts: runs bfloat16 and float16"),
    ):
        modules = [quantized(Qwen3MoeExperts, scheme, dtype) for _ in range(2)]
        assert not any(module.is_prepared for module in modules)
        x, index, weights = routed(3, dtype)
        with torch.no_grad():
            assert torch.equal(modules[0](x, index, weights), restored(modules[0], dtype)(x, index, weights))
        assert [reason in record.getMessage() for record in caplog.records].count(True) == 1
        with pytest.raises(BackendError, match="backend triton cannot run"):
            quantized(Qwen3MoeExperts, scheme, dtype, backend="triton")
    alone = quantized(Qwen3MoeExperts, Scheme(4, 32), BF16, only="down_proj")
    assert not alone.is_prepared and isinstance(alone.gate_up_proj, nn.Parameter)


def test_kernels_for_experts_are_tried_first(monkeypatch, without_native):
    from lowbit_kernels import skinny

    run = skinny.launch_experts
    monkeypatch.setattr(skinny, "launch_experts", lambda *args, **options: run(*args, **options).mul_(1.1))
    triton._trial.cache_clear()
    assert not quantized(Qwen3MoeExperts, Scheme(4, 32), BF16).is_prepared
    assert triton.refuse(Scheme(4, 32), torch.device("cpu"), BF16, (64, 64)) is None
    triton._trial.cache_clear()


# --- whole models ---


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_model(name, tmp_path):
    """Loaded on the kernels it computes what its dequantized weights compute, and saves what it loaded."""
    # all experts for each token: rounding turns no router to another one
    whole = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_experts_per_tok": EXPERTS}
    source = save_tiny(tmp_path / "dense", name, FP16, **whole)
    lowbit.quantize(source, tmp_path / "quantized", scheme=Scheme(4, 32, False))
    model = lowbit.load(tmp_path / "quantized")
    modules = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(modules) == 1 and modules[0].is_prepared
    exact = copy.deepcopy(model).dequantize(torch.float64).double()
    dense = copy.deepcopy(model).dequantize(FP16)
    ids = token_ids(10).view(2, 5)
    wanted = logits(exact, ids)
    error, rounding = relative_error(logits(model, ids), wanted), relative_error(logits(dense, ids), wanted)
    assert error < 8 * unit(FP16) and error < 1.2 * rounding
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("quantized", "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
