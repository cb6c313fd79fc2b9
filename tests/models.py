"""Tiny random models of many architectures, from their transformers configs."""

import torch
import transformers

from lowbit.transformers_api import cache_argument

_SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# config class -> what differs from _SMALL
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
    "gpt_oss": ("GptOssConfig", {**_EXPERTS, "layer_types": ["sliding_attention", "full_attention"]}),
}


def tiny_config(name: str, **overrides):
    class_name, changes = ARCHITECTURES[name]
    return getattr(transformers, class_name)(**{**_SMALL, **changes, **overrides})


def tiny_model(name: str = "llama", dtype=torch.float32, seed: int = 0, **overrides):
    """A random model whose logits depend on every layer: weights larger than the tiny default initialisation."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def save_tiny(folder, name: str = "llama", dtype=torch.float32, max_shard_size="5GB", **overrides):
    tiny_model(name, dtype, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def token_ids(count: int = 24, vocabulary: int = 128) -> torch.Tensor:
    return torch.randint(3, vocabulary, (1, count), generator=torch.Generator().manual_seed(1))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def as_cache(model, cache) -> dict:
    """Keywords that hand `cache` to a model or its `generate`, by the name of the installed transformers."""
    return {cache_argument(model): cache}
