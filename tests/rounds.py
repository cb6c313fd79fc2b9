"""The round that every architecture goes: quantize -> verify -> load -> generate -> save -> load, and its dequantized
weights."""

import re
from pathlib import Path

import torch
import transformers
from models import relative_error
from tiny import generated, logits
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.layers.experts import expert_weights
from lowbit.layers.linear import LowbitLinear

SCHEME = lowbit.Scheme(4, 32, True)
# What transformers calls the parts of a model that are not its language model
_NOT_LANGUAGE = re.compile(
    r"(^|\.)((vision|video|image|audio|speech|acoustic|semantic)_\w*(tower|model|encoder|embed|embedder|projection)|visual"
    r"|\w*(projector|connector|aligner|merger|qformer|resampler|resampler_model|vqmodel)|embed_(vision|audio)|vision_adapter"
    r"|embed_tokens_extend|image_to_text_projection|generation_(head|embeddings|aligner)|language_projection)\."
)
_HEADS = re.compile(r"(^|\.)(lm_head|predictions\.decoder)$")
# Encoders of images or sound with the name of a text encoder
_ENCODES_NO_TEXT = re.compile("Pix2Struct|PPFormulaNet|VisionEncoderDecoder|GraniteSpeech")
_ROUTERS = re.compile(r"(^|\.)(router|gate|classifier)$")
_FEWEST_OUTPUTS = 16  # a linear with less is a gate


def quantizable(model) -> dict[str, int]:
    """Elements of each matrix of the language model by parameter name: of linears and fused experts, without the output
    head and routers. Found by names and types, which lowbit does not look at."""
    head, found = model.get_output_embeddings(), {}
    no_text = _ENCODES_NO_TEXT.match(type(model).__name__)
    for name, module in model.named_modules():
        if module is head or _HEADS.search(name) or _NOT_LANGUAGE.search(f"{name}."):
            continue
        if no_text and name.removeprefix("model.").startswith("encoder"):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
            if outputs >= _FEWEST_OUTPUTS and not _ROUTERS.search(name):
                found[f"{name}.weight"] = module.weight.numel()
        elif "expert" in f"{name} {type(module).__name__}".lower():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    found[f"{name}.{leaf}"] = parameter.numel()
    return found


def quantized_share(wanted: dict[str, int], names) -> float:
    """The part of the elements `wanted` that the parameters `names` hold."""
    return sum(count for name, count in wanted.items() if name in names) / max(sum(wanted.values()), 1)


def _quantized_parameters(model) -> set[str]:
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LowbitLinear)}
    return linears | {f"{name}.{leaf}" for name, module in model.named_modules() for leaf in expert_weights(module)}


def _check_same(model, inputs, state: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """The tensors bit for bit; the logits nearly, for sums depend on how tensors are aligned in memory."""
    other = model.state_dict()
    assert other.keys() == state.keys(), f"other tensors: {sorted(other.keys() ^ state.keys())[:3]}"
    different = [name for name, tensor in state.items() if not torch.equal(tensor, other[name])]
    assert not different, f"{different[0]} and {len(different) - 1} more differ"
    error = relative_error(logits(model, inputs), expected)
    assert error < 1e-6, f"relative error {error:.1e} of the logits"


def round_trip(task: str, model, inputs: dict[str, torch.Tensor], folder: Path) -> dict:
    """task: the auto class of the model. Raises RuntimeError, naming the stage and what went wrong there; else facts
    about the round."""
    stage = "save"
    try:
        model.save_pretrained(folder / "dense")
        stage = "quantize"
        lowbit.quantize(folder / "dense", folder / "quantized", scheme=SCHEME)
        stage = "verify"
        failures = lowbit.verify(folder / "quantized", folder / "dense", run=False).failures
        assert not failures, failures[0]
        stage = "load"
        quantized = lowbit.load(folder / "quantized")
        share = quantized_share(quantizable(model), _quantized_parameters(quantized))
        actual, tokens = logits(quantized, inputs), generated(quantized, inputs)
        state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
        stage = "save and load again"
        quantized.save_pretrained(folder / "again")
        _check_same(lowbit.load(folder / "again"), inputs, state, actual)
        stage = "quantize while loading"
        config = lowbit.LowbitConfig(SCHEME.bits, SCHEME.group_size)
        fly = getattr(transformers, task).from_pretrained(folder / "dense", quantization_config=config)
        _check_same(fly, inputs, state, actual)
        stage = "save that"
        fly.save_pretrained(folder / "fly")
        _check_same(lowbit.load(folder / "fly"), inputs, fly.state_dict(), logits(fly, inputs))
        stage = "dequantize"
        error = relative_error(actual, logits(quantized.dequantize(), inputs))
        assert error < 1e-5, f"relative error {error:.1e}"
        assert torch.equal(generated(quantized, inputs), tokens), "other tokens are generated"
    except Exception as error:
        raise RuntimeError(f"{stage}: {type(error).__name__}: {error}") from error
    return {"share": share, "error": error, "to_original": relative_error(actual, logits(model, inputs))}
