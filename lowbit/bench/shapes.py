"""Shapes of well-known models: what speed depends on, and nothing else of them."""

from lowbit.errors import UsageError

# What each shape says, in this order
_DENSE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def _dense(*numbers, **more) -> dict:
    return dict(zip(_DENSE, numbers, strict=True)) | more


# name -> (model type of transformers, fields of its config)
SHAPES = {
    "llama-3.2-1b": ("llama", _dense(2048, 8192, 16, 32, 8, 64, 128256, 131072, True)),
    "llama-3.1-8b": ("llama", _dense(4096, 14336, 32, 32, 8, 128, 128256, 131072, False)),
    "llama-3.1-70b": ("llama", _dense(8192, 28672, 80, 64, 8, 128, 128256, 131072, False)),
    "qwen3-0.6b": ("qwen3", _dense(1024, 3072, 28, 16, 8, 128, 151936, 40960, True)),
    "qwen3-8b": ("qwen3", _dense(4096, 12288, 36, 32, 8, 128, 151936, 40960, False)),
    "mistral-7b": ("mistral", _dense(4096, 14336, 32, 32, 8, 128, 32768, 32768, False, sliding_window=None)),
    "gemma-2-2b": ("gemma2", _dense(2304, 9216, 26, 8, 4, 256, 256000, 8192, True, sliding_window=4096)),
    "phi-4": ("phi3", _dense(5120, 17920, 40, 40, 10, 128, 100352, 16384, False, sliding_window=None)),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        _dense(2048, 6144, 48, 32, 4, 128, 151936, 40960, False, moe_intermediate_size=768, num_experts=128,
               num_experts_per_tok=8, norm_topk_prob=True),
    ),
    "tiny": ("llama", _dense(128, 256, 2, 4, 2, 32, 512, 256, True)),
}  # fmt: skip


def config_of(name: str, layers: int | None = None):
    """The transformers config of a model of these shapes, with fewer `layers` if asked. Raises UsageError."""
    from transformers import AutoConfig

    if name not in SHAPES:
        raise UsageError(f"shapes {name!r} are not known; allowed: {', '.join(SHAPES)}")
    model_type, numbers = SHAPES[name]
    most = numbers["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= most:
        raise UsageError(f"layers is {layers}; {name} has 1 to {most}")
    # special tokens of other vocabularies are the defaults
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **{**numbers, **special, "num_hidden_layers": layers or most})
