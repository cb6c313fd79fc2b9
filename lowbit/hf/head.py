"""Quantizing the output embedding of a loaded model, whose checkpoint left it dense."""

import logging
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import CheckpointNames, find_sites
from lowbit.errors import InputError, UsageError
from lowbit.hf.config import LowbitConfig
from lowbit.hf.dense import DenseModel
from lowbit.hf.packed import PackedNames
from lowbit.hf.quantizer import LowbitQuantizer
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.scheme import HEAD_SCHEME, Scheme
from lowbit.quantizers import get_quantizer
from lowbit.transformers_api import tied_weights, untie

logger = logging.getLogger("lowbit")

AUTO = "auto"
# Weights of an output embedding from which on reading it takes time: fewer stay in a cache
_LARGE = 2**23
# What HEAD_SCHEME changes at most in the models of scripts/benchmarks/int8_head.py, in nats
AUTO_KL = 0.002


def added_scheme(model: PreTrainedModel) -> Scheme | None:
    """Of an output embedding that was quantized after loading."""
    return getattr(getattr(model, "hf_quantizer", None), "added_head", None)


def wanted_head(lm_head: str | Scheme | None) -> str | Scheme | None:
    """AUTO, a scheme, or None to leave it alone. Raises UsageError for what is no scheme."""
    return Scheme.parse(lm_head) if isinstance(lm_head, str) and lm_head != AUTO else lm_head


def set_head(model: PreTrainedModel, wanted: str | Scheme | None, folder: Path, backend: str | None = None) -> None:
    """See `quantize_head`; AUTO is HEAD_SCHEME for one on a CPU that is large, dense and can be quantized."""
    if isinstance(wanted, Scheme):
        quantize_head(model, wanted, folder, backend)
    elif wanted == AUTO and _is_large(model.get_output_embeddings()):
        try:
            quantize_head(model, HEAD_SCHEME, folder, backend)
        except UsageError as error:
            logger.info("the output embedding stays dense: %s", error)


def _is_large(head: nn.Module | None) -> bool:
    return type(head) is nn.Linear and head.weight.device.type == "cpu" and head.weight.numel() >= _LARGE


def large_head(config) -> bool:
    """Whether the output embedding of a model of these shapes is large: see `set_head`."""
    text = config.get_text_config()
    return text.vocab_size * text.hidden_size >= _LARGE


def quantize_head(model: PreTrainedModel, scheme: Scheme, folder: Path, backend: str | None = None) -> None:
    """Quantize the output embedding to `scheme`, or to a smaller group where that does not divide in_features.

    Where it was tied, the input embedding stays dense, and the two are tied no longer: saved, the model is one with a
    quantized head of its own. folder: that it was loaded from. Raises UsageError for a head that cannot be quantized,
    InputError for a damaged one.
    """
    quantizer = _quantizer_of(model, folder, backend)
    name, head = _dense_head(model, quantizer)
    weight = head.weight.detach()
    # a sum is finite where all numbers are, and takes a tenth of the time; where it is not, they may have been large
    if not torch.isfinite(weight.sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
        raise InputError(f"{name}.weight holds NaN or infinite values: the checkpoint is damaged")
    if model.get_input_embeddings().weight is head.weight:
        _untie(model, f"{name}.weight")
    scheme = scheme.fitted(head.in_features)
    qweight, _ = get_quantizer("rtn").quantize(weight, {}, scheme, {"scale_search": "minmax"})
    model.set_submodule(name, LowbitLinear.from_quantized(qweight, head.bias, backend))
    quantizer.packed.schemes[f"{name}.weight"] = quantizer.added_head = scheme
    quantizer.quantization_config.source = quantizer.packed.config(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]  # a module has tensors and modules
    model.config.quantization_config = quantizer.quantization_config


def _quantizer_of(model: PreTrainedModel, folder: Path, backend: str | None) -> LowbitQuantizer:
    """Returns the quantizer that the model was loaded with; a dense model gets a new one, so that `save_pretrained`
    writes it quantized."""
    found = getattr(model, "hf_quantizer", None)
    if found is None:
        config, names = LowbitConfig(backend=backend), CheckpointNames(model)
        source = DenseModel(names, CheckpointReader(folder).files, {}, config.recipe)
        found = LowbitQuantizer(config, pre_quantized=False)
        found.dtype, found.packed = model.dtype, PackedNames(names, find_sites(model), source.tensors, {})
    return found


def _dense_head(model: PreTrainedModel, quantizer: LowbitQuantizer) -> tuple[str, nn.Linear]:
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or f"{name}.weight" not in quantizer.packed.sites:
        raise UsageError(f"{type(model).__name__} has no output embedding that can be quantized")
    if isinstance(head, LowbitLinear):
        raise UsageError(f"the checkpoint holds its output embedding quantized, as {head.scheme.name}: pass no scheme")
    if head.weight.device.type == "meta":
        raise UsageError("the output embedding is offloaded: give it a place in device_map to quantize it")
    return cast(str, name), cast(nn.Linear, head)


def _untie(model: PreTrainedModel, weight: str) -> None:
    others = [name for name in tied_weights(model) if name != weight]
    if others:
        raise UsageError(f"the output embedding cannot be quantized: it is tied to {others[0]} too")
    untie(model)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
