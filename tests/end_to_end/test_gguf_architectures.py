"""GGUF files of architectures that transformers reads by its newer rules, and of those that it does not read."""

import gguf
import numpy as np
import pytest
import torch
from gguf_files import add_vocabulary, quantized, theirs, write_gguf
from models import relative_error, tiny_model, token_ids
from transformers import AutoModelForCausalLM, Lfm2Config, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

import lowbit
from lowbit.errors import InputError
from lowbit.folders import gguf as opening
from lowbit.layers.linear import LowbitLinear

_QWEN = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                        "mrope_section": [4, 2, 2], "mrope_interleaved": True},
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32}  # fmt: skip
_LFM = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False, "pad_token_id": 0, "conv_L_cache": 3,
}  # fmt: skip


def qwen_settings(config) -> dict:
    made = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "full_attention_interval": 4, "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim, "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim, "rope.freq_base": 1e4,
        "rope.dimension_sections": [4, 2, 2, 0], "rope.dimension_count": config.head_dim // 2,
    }  # fmt: skip
    if hasattr(config, "num_experts"):
        return made | {
            "expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        }  # fmt: skip
    return made | {"feed_forward_length": config.intermediate_size}


def lfm_settings(config) -> dict:
    return {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": [0, config.num_key_value_heads],
        "attention.layer_norm_rms_epsilon": config.norm_eps, "vocab_size": config.vocab_size,
        "shortconv.l_cache": config.conv_L_cache, "rope.freq_base": 1e6,
    }  # fmt: skip


# architecture -> (config, the metadata that llama.cpp's converter derives from it)
MODELS = {
    "qwen35": (Qwen3_5TextConfig(**_QWEN), qwen_settings),
    "qwen35moe": (Qwen3_5MoeTextConfig(**_QWEN, **_EXPERTS), qwen_settings),
    "lfm2": (Lfm2Config(**_LFM), lfm_settings),
}


def stored(model, architecture: str) -> dict[str, np.ndarray]:
    """Random tensors under the names of the gguf package, in the shapes that llama.cpp's converter gives them: what
    becomes of them is for transformers to say, which is compared."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    rng, made = np.random.default_rng(0), {}
    for key, tensor in model.state_dict().items():
        base, dot, suffix = key.rpartition(".")
        if suffix not in ("weight", "bias"):
            base, dot, suffix = key, "", ""
        shape = tuple(size for place, size in enumerate(tensor.shape) if size > 1 or place != 1)
        if key.endswith("shared_expert_gate.weight"):
            shape = shape[1:]
        if key.endswith("dt_bias"):
            base, dot, suffix = key.replace("dt_bias", "dt_proj"), ".", "bias"
        found = names.get_name(base)
        if key.endswith("gate_up_proj"):
            block = key.split(".")[2]
            for part in ("gate", "up"):
                half = shape[0], shape[1] // 2, shape[2]
                made[f"blk.{block}.ffn_{part}_exps.weight"] = rng.normal(size=half, scale=half[-1] ** -0.5)
            continue
        assert found is not None, key
        values = rng.normal(size=shape, scale=shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        name = found + dot + suffix if dot or not key.endswith("down_proj") else f"{found}.weight"
        made[name] = -np.exp(values) if key.endswith("A_log") else values
    return {name: values.astype(np.float32) for name, values in made.items()}


def written(path, architecture: str, kind: str):
    config, settings = MODELS[architecture]
    model = AutoModelForCausalLM.from_config(config)
    file = gguf.GGUFWriter(path, architecture)
    for key, value in settings(config).items():
        add = {float: file.add_float32, list: file.add_array}.get(type(value), file.add_uint32)
        add(f"{architecture}.{key}", value)
    add_vocabulary(file, config.vocab_size)
    for name, values in stored(model, architecture).items():
        plain = values.ndim < 2 or values.shape[-1] % 32 or ("conv" in name and "proj" not in name)
        chosen = gguf.GGMLQuantizationType["F32" if plain or "ffn_gate_inp" in name else kind]
        file.add_tensor(name, values if chosen.name == "F32" else quantized(values, chosen), raw_dtype=chosen)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "cache_root", lambda: tmp_path / "cache")


@pytest.mark.parametrize("architecture", MODELS)
def test_newer_rules_of_transformers(architecture, tmp_path):
    """Tensors that it computes, and rows and inputs in another order: all are those that transformers makes of them,
    and integers run packed wherever only rows were moved."""
    file = written(tmp_path / "model.gguf", architecture, "Q8_0")
    model, expected = lowbit.load(file, dtype=torch.float32), theirs(file)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowbitLinear)}
    assert layers
    state = expected.state_dict()
    for name, parameter in model.named_parameters():
        if name in state:
            assert torch.equal(parameter, state[name]), name
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.float32), state[f"{name}.weight"]), name
    with torch.no_grad():
        assert relative_error(model(token_ids()).logits, expected(token_ids()).logits) < 1e-5
    lowbit.quantize(file, tmp_path / "made", scheme="W8A16-G32")
    assert lowbit.verify(tmp_path / "made", reference=file).ok


def test_architectures_that_transformers_does_not_read_are_named(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama", b"wombt"))
    with pytest.raises(
        InputError, match="of architecture 'wombt': GGUF model with architecture wombt is not supported"
    ):
        lowbit.load(file)


def test_parameters_that_transformers_finds_nothing_for_are_named(tmp_path):
    """Of gpt-oss it knows the config, and no tensors of experts."""
    model = tiny_model("gpt_oss")
    config, path = model.config, tmp_path / "model.gguf"
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == "gpt-oss")
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    file = gguf.GGUFWriter(path, "gpt-oss")
    for key in ("context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        file.add_uint32(f"gpt-oss.{key}", 64)
    file.add_uint32("gpt-oss.block_count", config.num_hidden_layers)
    file.add_uint32("gpt-oss.expert_count", 4)
    add_vocabulary(file, config.vocab_size)
    for key, tensor in model.state_dict().items():
        base, dot, suffix = key.rpartition(".")
        base, end = (base, dot + suffix) if suffix in ("weight", "bias") else (key, "")
        if (name := names.get_name(base)) is not None:
            file.add_tensor(name + end, tensor.float().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with pytest.raises(InputError, match=r"of architecture 'gpt-oss'.*could be made of: take the original model"):
        lowbit.load(path)
