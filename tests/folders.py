"""Model folders for tests: random checkpoints of a given size, tokenizers, and small edits that make them wrong."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from models import save_tiny
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
REFERENCE = ROOT / "lowbit" / "assets" / "reference"

VOCABULARY = 320
_TEXT = ["the quick brown fox jumps over the lazy dog and the dog sleeps under the old tree all day long\n"] * 8
_CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(folder, chat_template: str | None = _CHAT, bos: bool = False, vocabulary: int = VOCABULARY):
    """A byte-level BPE tokenizer: every text has tokens, none is unknown. bos: texts start with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )
    fast.save_pretrained(folder)
    return fast


def save_chat_model(folder, bos: bool = False, **overrides):
    """A tiny random llama with a tokenizer."""
    save_tiny(folder, **{"vocab_size": VOCABULARY, "max_position_embeddings": 256, **overrides})
    save_tokenizer(folder, bos=bos)
    return folder


def save_random_llama(folder, hidden: int, intermediate: int, layers: int, vocabulary: int = 512):
    """A bf16 checkpoint of any size in one file, without building the model."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    norms = ["model.norm.weight"]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{prefix}.mlp.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        norms += [f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"]
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors |= {name: torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path, data) -> None:
    Path(path).write_text(json.dumps(data), encoding="utf-8")


def edit_config(folder, **changes) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def edit_tensors(folder, change) -> None:
    """Rewrite model.safetensors after `change(dict of tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@contextmanager
def precious(folder: Path):
    """A folder of the user's with files in it, which must be as they were at the end."""
    (folder / "docs").mkdir(parents=True)
    for name in ("a", "docs/b"):
        (folder / name).write_text("precious")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder, hidden ones too; b"" for a folder. Of the report of a run
    only what the same run has again: not when it was, how long it took, and what was typed."""
    found = sorted(Path(folder).rglob("*"))
    return {p.relative_to(folder).as_posix(): b"" if p.is_dir() else _read(p) for p in found}


def _read(path) -> bytes:
    data = path.read_bytes() if path.exists() else b"a link to nothing"
    if path.name != "lowbit_report.json" or not data.startswith(b"{\n"):  # nor is it what a run writes
        return data
    report = json.loads(data)
    layers = [[layer.get(key) for key in ("name", "expert", "scheme", "bytes")] for layer in report["layers"]]
    return json.dumps([report["recipe"], report["parts"], report["left_alone"], layers]).encode()


def stored_tensors(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors package."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def data_bytes(folder) -> int:
    """Bytes of tensor data in the weight files: what is behind their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
    return total


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: NaN equals NaN, and fp8 needs no arithmetic."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return bytes(first.contiguous().view(-1).view(torch.uint8)) == bytes(second.contiguous().view(-1).view(torch.uint8))
