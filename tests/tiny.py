"""Tiny models of any model type of transformers: the default config, shrunk by what its fields are called.

Fields that must agree with each other get the same value by the same rule, and sizes are such that groups of 16 fit.
Of the layers, one of each kind is kept.
"""

import re
from collections.abc import Callable, Iterator

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# The auto classes of what writes text, and what their default configs take to write as one of them
TASKS = {
    "AutoModelForCausalLM": {"is_decoder": True},
    "AutoModelForSeq2SeqLM": {},
    "AutoModelForImageTextToText": {},
}
# Default configs that describe no model that works, or sizes that no rule guesses
_STUBBORN = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "falcon_h1": {"mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},  # a slot for each of its cycles
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (32, 32)},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}
# What is changed where the model does not work, one after the other
ATTEMPTS = (
    {},
    {"rope": {"mrope_section": [2, 3, 3]}},
    {"rope": {"mrope_section": [2, 1, 1]}},
    {"rope": {"mrope_section": [3, 3, 2]}},
    {"layers": 4},
    {"layers": 8},
)
_MOST_PARAMETERS = 20_000_000
VOCABULARY = 128
FIRST_SPECIAL = 100  # token ids from here on stand for images and the like

_LAYERS = (
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|layers|depth|num_blocks|num_layers_per_stack"
)

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = r"\w*(kv|key_value)_?\w*heads|num_query_groups"
# What the models of some default configs cannot do without
_WHERE_NONE = {
    "head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 96, "sliding_window": 16, "default_language": "en_XX",
}  # fmt: skip


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda old: min(old, limit)


# Pattern of whole field names -> the value, or a function of the default value; the first that matches counts
_RULES = {
    r"\w*(kernel|conv_|stride|merge|temporal|buckets|max_distance|mult)\w*": _at_most(64),
    r"\w*vocab_size\w*|num_embeddings|codebook_size|\w*group_vocab": _at_most(VOCABULARY),
    r"\w*(position_embeddings|_positions|max_seq_len|n_ctx|context_length|model_max_length)": _at_most(128),
    r"(\w*_)?(image|crop|img)_size": _at_most(32),
    r"patch_size": _at_most(8),
    r"\w*(experts_per_tok(en)?|moe_topk|moe_k|moe_top_k)": _at_most(2),
    r"\w*(shared_experts|zero_expert_num)": _at_most(1),
    r"\w*experts": _at_most(4),
    r"n_group|topk_group|num_expert_group|n_groups|\w*mamba_n_?groups": _at_most(1),
    r"num_\w*key_heads": _at_most(2),
    r"\w*heads|n_head": _at_most(4),
    r"(mamba_)?expand": _at_most(1),
    r"qk_head_dim": _at_most(32),
    r"\w*(head_dim|rotary_dim|d_head|headdim|dim_head|kv_channels|d_kv|head_size)": _at_most(16),
    r"\w*(d_state|state_size)": _at_most(16),
    r"\w*(window(_size|_len)?)": _at_most(16),
    r"\w*rank": _at_most(32),
    r"\w*(intermediate_size\w*|ffn_dim|mlp_dim|ffn_hidden_size|feed_forward_size|n_inner|d_?ff|dim_ff|expert_dim)":
        _at_most(96),
    r"first_k_dense_replace|num_dense_layers|num_global_layers|num_kv_shared_layers|\w*layer_offset": _at_most(1),
    r"\w*(period|interval|frequency|every_n_layers|sparse_step|sliding_window_pattern)": _at_most(2),
    r"\w*(size|dim|width|features|channels?|d_model|n_embd|dimension|length|size_\w+|dim_\w+|topk|num_centroids|d_ssm)":
        _at_most(64),
    r"(num_\w*tokens|n_latents|query_num)\w*|\w*layers|num_patches": _at_most(4),
}  # fmt: skip


def tiny_config(model_type: str, layers: int = 2, **changes) -> PreTrainedConfig:
    """layers: at least so many. changes: fields to set otherwise, also of its sub-configs that have them."""
    return _shrunk(CONFIG_MAPPING[model_type](), layers, {**_STUBBORN.get(model_type, {}), **changes})


def model_types() -> Iterator[tuple[str, str]]:
    """(auto class, model type) of every model of transformers that writes text."""
    for task in TASKS:
        # some model types are another one's under a second name
        for name in dict.fromkeys(config.model_type for config in getattr(transformers, task)._model_mapping):
            yield task, name


def tiny_skeleton(task: str, model_type: str, **changes):
    """A model on the meta device. Raises whatever transformers does, ValueError for one that is not small."""
    with torch.device("meta"):
        config = tiny_config(model_type, **TASKS[task], **changes)
        model = getattr(transformers, task).from_config(config)
    size = sum(p.numel() for p in model.parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"the smallest one has {size:,} parameters")
    return model


def tiny_model_that_runs(task: str, model_type: str):
    """A random float32 model that has run, and the inputs it took. Raises the first error if no attempt gives one."""
    first = None
    for attempt in ATTEMPTS:
        try:
            config = tiny_skeleton(task, model_type, **attempt).config
            torch.manual_seed(0)
            model = getattr(transformers, task).from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(std=parameter.shape[-1] ** -0.5)
        except Exception as error:
            first = first or error
            continue
        for inputs in _inputs(config):
            try:
                logits(model, inputs)
                generated(model, inputs)
                return model, inputs
            except Exception as error:
                first = first or error
    raise first


def _shrunk(config: PreTrainedConfig, layers: int, changes: dict) -> PreTrainedConfig:
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depth = next((v for n, v in fields.items() if re.fullmatch(_LAYERS, n) and type(v) is int), 0)
    kept = _one_of_each_kind([v for v in fields.values() if _is_per_layer(v, depth)], depth, layers)
    made = {}
    for name, old in fields.items():
        if name in changes:
            made[name] = changes[name]
        elif isinstance(old, PreTrainedConfig):
            made[name] = _shrunk(old, layers, changes)
        elif old is None and name in _WHERE_NONE:
            made[name] = _WHERE_NONE[name]
        elif name == "rope_parameters" and old:
            made[name] = _rope({**old, **changes.get("rope", {})})
        elif isinstance(old, list | tuple):
            made[name] = _list(name, old, depth, kept)
        elif type(old) is int and re.search(r"(token|start|end|patch|newline)_(id|index)$", name):
            made[name] = old if old < 3 else FIRST_SPECIAL + len(made) % (VOCABULARY - FIRST_SPECIAL)
        elif type(old) is int and re.fullmatch(_LAYERS, name):
            made[name] = len(kept)
        elif type(old) is int and re.fullmatch(_KV_HEADS, name):
            shared = old < next((v for n, v in fields.items() if n in _HEADS), old)
            made[name] = min(old, 2) if shared else 4
        elif type(old) is int and old > 1:
            made[name] = _by_rule(name, old)
    return type(config)(**made)


def _by_rule(name: str, old: int) -> int:
    for pattern, value in _RULES.items():
        if re.fullmatch(pattern, name):
            return value(old)
    return old


def _is_per_layer(value, depth: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == depth > 2 and list(value) != list(range(depth))


def _one_of_each_kind(lists: list, depth: int, layers: int) -> list[int]:
    """Numbers of the first layer of each kind, and of more if they are less than `layers`."""
    kinds = {}
    for number, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(repr(kind), number)
    others = [number for number in range(max(depth, layers)) if number not in kinds.values()]
    return sorted([*kinds.values(), *others[: max(layers - len(kinds), 0)]])


def _list(name: str, old, depth: int, kept: list[int]):
    new = old
    numbers = bool(old) and all(type(number) is int for number in old)
    if numbers and re.search("layer|idx|indexes|indices", name) and not _is_per_layer(old, depth):
        return sorted({min(number, len(kept) - 1) for number in old})  # numbers of layers
    if numbers and re.search("dim|size|channels", name) and max(old) > 64:
        new = [max(number * 64 // max(old), 4) for number in old]
    return [new[number % depth] for number in kept] if _is_per_layer(old, depth) else new


def _rope(parameters: dict) -> dict:
    """One factor for each frequency of a head: a head has 16 dimensions."""
    made = {}
    for name, value in parameters.items():
        made[name] = _rope(value) if isinstance(value, dict) else value[:8] if isinstance(value, list) else value
    return made


def _inputs(config: PreTrainedConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Text, and text with an image, for the models that insist on one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, FIRST_SPECIAL, (1, 12), generator=generator)
    text = {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {})}
    yield text
    side = next((c.image_size for c in vars(config).values() if isinstance(getattr(c, "image_size", None), int)), None)
    if side is not None:
        yield {**text, "pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generated(model, inputs: dict[str, torch.Tensor], tokens: int = 8) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **start)
