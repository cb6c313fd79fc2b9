"""Random models in the shapes of others: their sizes, and that they run as the quantized weights say."""

import pytest
import torch
from models import relative_error, token_ids

from lowbit.bench.bytes_moved import model_bytes
from lowbit.bench.random_model import check_memory, dense_model, quantized_model, weight_bytes
from lowbit.bench.shapes import SHAPES, config_of
from lowbit.errors import InputError, UsageError
from lowbit.layers.experts import QuantizedExperts
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.scheme import Scheme

# Parameters as their publishers count them, in billions
PUBLISHED = {
    "llama-3.2-1b": 1.24, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "qwen3-0.6b": 0.596, "qwen3-8b": 8.19,
    "mistral-7b": 7.25, "gemma-2-2b": 2.61, "phi-4": 14.7, "qwen3-30b-a3b": 30.5,
}  # fmt: skip
SCHEME = Scheme(4, 32)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_shapes_have_the_published_number_of_parameters(name):
    billions = weight_bytes(config_of(name), None, torch.bfloat16) / 2e9
    assert billions == pytest.approx(PUBLISHED[name], rel=0.005)


def test_a_quantized_model_computes_what_its_codes_say():
    config = config_of("tiny")
    model = quantized_model(config, SCHEME, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, LowbitLinear)]
    # q, k and v share a product, and gate and up
    assert {layer.prepared_shape[0] for layer in layers} == {256, 512, 128}
    assert len(layers) == 14 and {layer.scheme for layer in layers} == {SCHEME}
    dense = dense_model(config, dtype=torch.float32)
    dense.load_state_dict({f"{name}.weight": module.dequantize() for name, module in model.named_modules()
                           if isinstance(module, LowbitLinear)}, strict=False)  # fmt: skip
    ids = token_ids()
    actual, expected = model(ids).logits, dense(ids).logits
    assert expected.isfinite().all() and relative_error(actual, expected) < 1e-5
    assert expected.std() > 1e-3


def test_tied_embeddings_stay_one_tensor():
    model = dense_model(config_of("tiny"), dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model_bytes(model) == pytest.approx(weight_bytes(config_of("tiny"), None, torch.bfloat16), rel=0.001)


def test_a_quantized_head_is_not_tied():
    model = quantized_model(config_of("tiny"), SCHEME, dtype=torch.float32, lm_head=Scheme(8, 32))
    head = model.lm_head
    assert isinstance(head, LowbitLinear) and head.scheme == Scheme(8, 32) and head.shape == (512, 128)
    assert model(token_ids()).logits.isfinite().all()


def test_experts_are_quantized_too():
    config = config_of("qwen3-30b-a3b", 1)
    config.update({"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
                   "vocab_size": 128})  # fmt: skip
    model = quantized_model(config, SCHEME, dtype=torch.float32)
    assert sum(isinstance(module, QuantizedExperts) for module in model.modules()) == 1
    assert model(token_ids()).logits.isfinite().all()


def test_a_70b_model_does_not_fit():
    config = config_of("llama-3.1-70b")
    with pytest.raises(InputError, match=r"weights take 39.5 GB W4A16-G128, and 24.0 GB are free: pass --layers N"):
        check_memory(config, Scheme(), torch.bfloat16, 24 * 10**9)
    with pytest.raises(InputError, match=r"141.1 GB unquantized"):
        check_memory(config, None, torch.bfloat16, 80 * 10**9)
    check_memory(config, Scheme(), torch.bfloat16, 40 * 10**9)


@pytest.mark.parametrize("layers", [0, 33])
def test_no_such_number_of_layers(layers):
    with pytest.raises(UsageError, match=f"layers is {layers}; llama-3.1-8b has 1 to 32"):
        config_of("llama-3.1-8b", layers)
