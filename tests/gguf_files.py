"""GGUF files as llama.cpp's converter writes them, by the gguf package alone: its names, its quantization, its writer.

What the converter does to tensors is written down here again (convert_hf_to_gguf.py): rows of Llama's queries and keys
in another order, Gemma's norms with 1 added, the experts of a layer in one tensor.
"""

import re
from pathlib import Path

import gguf
import numpy as np
import torch
from models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.folders.locate import resolve

# model type -> the name of its architecture in such a file
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3", "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe", "gpt2": "gpt2",
}  # fmt: skip
# All experts are used: which are chosen would change with the smallest error
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "head_dim": 64, "num_experts_per_tok": 4, "norm_topk_prob": True,
}  # fmt: skip


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of the converter."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def stored(model, name: str) -> dict[str, np.ndarray]:
    """float32: the tensors of a model by their names in a GGUF file."""
    config = model.config.get_text_config()
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == ARCHITECTURES[name])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    made, tied = {}, config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if key == "lm_head.weight" and tied:
            continue
        base, dot, suffix = key.rpartition(".")
        if suffix not in ("weight", "bias"):  # the experts of a layer
            base, dot, suffix = key, ".", "weight"
        if name == "llama" and re.search(r"[qk]_proj", key):
            values = permuted(values, config.num_attention_heads if "q_proj" in key else config.num_key_value_heads)
        if name == "gemma3" and key.endswith("norm.weight"):
            values = values + 1
        if name == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", key):
            values = values.T
        if key.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_exps", "up_exps"), np.split(values, 2, axis=1), strict=True):
                made[f"blk.{re.search(r'layers.(.+?)[.]', key)[1]}.ffn_{part}.weight"] = half
            continue
        if key.endswith("shared_expert_gate.weight"):
            values = values[0]
        made[names.get_name(base) + dot + suffix] = np.ascontiguousarray(values)
    return made


def settings(config, architecture: str) -> dict:
    """The metadata of the architecture."""
    made = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "attention.head_count": config.num_attention_heads,
    }  # fmt: skip
    if architecture == "gpt2":
        return made | {"feed_forward_length": 4 * config.hidden_size, "attention.layer_norm_epsilon": 1e-5}
    made |= {
        "feed_forward_length": config.intermediate_size, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "rope.freq_base": 10000.0,
    }  # fmt: skip
    if hasattr(config, "num_experts"):
        made |= {
            "expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", 0),
        }  # fmt: skip
    if architecture == "gemma3":
        made["attention.sliding_window"] = config.sliding_window
    return made


def write_gguf(path: Path, name: str = "llama", kinds=lambda name: "Q8_0", model=None, change=None, **writer) -> Path:
    """A GGUF file of a tiny model.

    Args:
        kinds: Name of a matrix in the file -> the name of its type; all else is F32.
        change: Called with the tensors {name: (bytes or numbers, type)} before they are written.
        writer: Keywords of `GGUFWriter`.
    """
    model = tiny_model(name, **SIZES) if model is None else model
    config, architecture = model.config.get_text_config(), ARCHITECTURES[name]
    file = gguf.GGUFWriter(path, architecture, **writer)
    file.add_name("tiny")
    file.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for key, value in settings(config, architecture).items():
        adder = file.add_float32 if isinstance(value, float) else file.add_uint32
        adder(f"{architecture}.{key}", value)
    add_vocabulary(file, config.vocab_size)
    tensors = {}
    for key, values in stored(model, name).items():
        kind = gguf.GGMLQuantizationType[kinds(key) if values.ndim > 1 and "ffn_gate_inp" not in key else "F32"]
        tensors[key] = (values if kind.name == "F32" else quantized(values, kind), kind)
    if change is not None:
        change(tensors)
    for key, (values, kind) in tensors.items():
        file.add_tensor(key, values, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def quantized(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """As the package quantizes; of types that it only decodes, random codes with small scales."""
    if kind.name == "F16":
        return values.astype(np.float16)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values, kind)


# Where types of blocks have float16 numbers; all others at their start
_SCALES = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def random_blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    rng = np.random.default_rng(len(values))
    count, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (values.size // count, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    if kind.name == "IQ1_M":  # in the high nibbles of four words
        parts = scale.view(np.uint16) >> np.array([0, 4, 8, 12]) & 0xF
        blocks[:, 49::2] = blocks[:, 49::2] & 0xF | parts << 4
        return blocks.reshape(*values.shape[:-1], -1)
    for at in _SCALES.get(kind.name, [0]):
        blocks[:, at : at + 2] = scale
    return blocks.reshape(*values.shape[:-1], -1)


def add_vocabulary(file: gguf.GGUFWriter, size: int) -> None:
    """Byte-level, of as many tokens as the model has."""
    kinds = gguf.TokenType
    special = ["<pad>", "<s>", "</s>"]
    letters = ["ab", *(chr(code) for code in range(33, 127))][: size - len(special)]
    letters += [f"[PAD{number}]" for number in range(size - len(special) - len(letters))]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list([*special, *letters])
    file.add_token_types([int(kinds.CONTROL)] * len(special) + [int(kinds.NORMAL)] * len(letters))
    file.add_token_merges(["a b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_pad_token_id(0)


def theirs(path: Path, dtype=torch.float32):
    """The model as transformers reads it, which decodes all of it; with our config, as its own misses some settings."""
    config = AutoConfig.from_pretrained(resolve(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, config=config)
    return read.eval()
