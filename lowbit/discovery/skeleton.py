"""The model that a config describes, without memory."""

from contextlib import nullcontext

import torch
from torch import nn

from lowbit.discovery.sites import head_of
from lowbit.errors import InputError, LowbitError, first_line
from lowbit.guards.model_size import no_larger_than
from lowbit.guards.records import shown
from lowbit.transformers_api import build


def model_class(config, trust_remote_code: bool = False):
    """The class of transformers that a config names, else the auto class of what writes text that knows the config."""
    import transformers

    architecture = str((getattr(config, "architectures", None) or [""])[0])
    remote = trust_remote_code and getattr(config, "auto_map", None)
    if not remote and (named := getattr(transformers, architecture, None)) is not None:
        return named
    for auto, mapping in (
        (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
        (transformers.AutoModelForSeq2SeqLM, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in mapping:
            return auto
    return transformers.AutoModelForCausalLM


def require_language_head(config, folder, trust_remote_code: bool = False) -> None:
    """Raise InputError for a model that gives no logits over a vocabulary: one for embeddings or classification, say.

    Whatever generates, or measures the text that a model expects, asks this before any weights are loaded.
    """
    found = model_class(config, trust_remote_code)
    if getattr(found, "can_generate", lambda: True)() or head_of(skeleton(config, trust_remote_code)) is not None:
        return
    raise InputError(
        f"{folder} has no language head: {found.__name__} gives no logits over a vocabulary, and writes no text "
        "(expected a model such as those named ...ForCausalLM)"
    )


def skeleton(config, trust_remote_code: bool = False, device="meta", dtype=None, tensors=None) -> nn.Module:
    """The model that a transformers config describes, on the meta device: modules and shapes, no memory.

    tensors: `TensorInfo` of the weight files that the config belongs to. Raises InputError for a model that
    transformers cannot build, or that is larger than what they can hold.
    """
    found = model_class(config, trust_remote_code)
    try:
        with (
            nullcontext() if device is None else torch.device(device),
            nullcontext() if tensors is None else no_larger_than(tensors),
        ):
            return build(found, config, dtype, trust_remote_code)
    except LowbitError:
        raise
    except Exception as error:  # sizes that make no sense fail anywhere
        name = shown((getattr(config, "architectures", None) or [config.model_type])[0])
        raise InputError(f"transformers cannot build {name}: {first_line(error)}") from None
