"""The modules of a quantized model: put in the place of dense ones, checked and prepared once they are loaded, and
made dense again."""

import logging
import math
from collections.abc import Mapping
from typing import cast

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel

from lowbit.discovery import CheckpointNames, Site
from lowbit.errors import InputError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.packed import QuantizedSite
from lowbit.hf.shares import Share
from lowbit.layers.embedding import QuantizedEmbedding, quantize_embedding, restore_embedding
from lowbit.layers.experts import (
    QuantizedExperts,
    expert_weights,
    finish_experts,
    packed_name,
    quantize_experts,
    restore_experts,
)
from lowbit.layers.linear import LowbitLinear
from lowbit.layers.shared_product import share_products
from lowbit.layers.workspace import Workspace
from lowbit.system.memory import return_freed
from lowbit.transformers_api import was_loaded

logger = logging.getLogger("lowbit")

# Codes (bytes) that layers unpack between two calls of `return_freed`: each call takes milliseconds, and what it
# returned has to be faulted in again
_UNPACKED_BETWEEN_RETURNS = 2**26


def replace_modules(
    model: PreTrainedModel,
    sites: Mapping[str, QuantizedSite],
    names: CheckpointNames,
    dtype: torch.dtype,
    backend: str | None,
    placeholders: bool,
    shares: Mapping[str, Share],
) -> None:
    """Put quantized modules, which are empty, in the place of those of `sites`. placeholders: they keep a dense
    parameter until something has loaded it. shares: by parameter, what this process has of those that are divided."""
    for name, found in sites.items():
        owner, _, leaf = found.site.parameter.rpartition(".")
        module = model.get_submodule(owner)
        shape = shares[name].shape if name in shares else _whole(found.site)
        if found.site.kind == "experts":
            module.is_transposed = found.site.transposed  # type: ignore[assignment]  # not all experts are marked
            quantize_experts(module, leaf, found.scheme, dtype, names.merged(found.site.parameter), shape)
            if not placeholders:
                finish_experts(module, leaf)
        elif found.site.kind == "embedding":
            quantize_embedding(cast(nn.Embedding, module), found.scheme, dtype, placeholders)
        else:
            model.set_submodule(
                found.site.module, _empty_linear(found, shape[1:], module, dtype, backend, placeholders)
            )
    if any(found.site.kind == "experts" for found in sites.values()):
        # packed experts are multiplied one by one: the other implementations take the whole parameter at once
        model.set_experts_implementation("eager")


def _whole(site: Site) -> tuple[int, int, int]:
    return site.experts, site.out_features, site.in_features


def _empty_linear(
    found: QuantizedSite,
    shape: tuple[int, int],
    dense: nn.Module,
    dtype: torch.dtype,
    backend: str | None,
    placeholder: bool,
) -> LowbitLinear:
    """shape: (out_features, in_features) of what this process has of it. Biases load whole."""
    site, (out_features, in_features) = found.site, shape
    with torch.device("meta"):
        layer = LowbitLinear(in_features, out_features, found.scheme, False, dtype, backend, act_order=found.act_order)
        if dense.bias is not None:
            layer.bias = nn.Parameter(torch.empty(site.out_features, dtype=dtype), requires_grad=False)
        layer.transposed = site.transposed
        if placeholder:
            layer.add_placeholder(torch.empty_like(dense.get_parameter("weight")))
    return layer


Expected = dict[str, tuple[torch.Size, torch.dtype]]


def expected_of(model: nn.Module) -> Expected:
    """The shape and dtype of each parameter, before a checkpoint is loaded."""
    return {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}


def check_and_cast(model: nn.Module, expected: Expected) -> None:
    """Not every release of transformers looks at the shapes of what goes into a quantized model, and casts it."""
    for name, parameter in model.named_parameters():
        shape, dtype = expected.get(name, (parameter.shape, parameter.dtype))
        if parameter.shape != shape:
            raise InputError(f"{name} has shape {list(parameter.shape)} in the checkpoint, expected {list(shape)}")
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def check_loaded(model: nn.Module) -> None:
    """Raise InputError unless every packed tensor came from the checkpoint, and is finite."""
    for name, module in model.named_modules():
        if has_offloaded_params(module):
            continue
        packed = list(module.packed_shapes) if isinstance(module, LowbitLinear | QuantizedEmbedding) else []
        for parameter, weights in expert_weights(module).items():
            packed += [packed_name(parameter, suffix) for suffix in packed_format.suffixes(weights.scheme)]
        if packed:
            _check_module(name, module, packed)


def _check_module(name: str, module: nn.Module, packed: list[str]) -> None:
    """transformers fills a parameter that the checkpoint lacks with whatever is there; here it is an error."""
    held = dict(module.named_parameters(recurse=False))
    missing = [parameter for parameter in packed if not was_loaded(held[parameter])]
    if "weight" in held and "weight" not in packed:  # the placeholder
        missing = ["weight"]
    if missing:
        raise InputError(
            f"{name}.{missing[0]} is not in the checkpoint: it is incomplete or does not belong to its config"
        )
    for parameter in packed:
        if held[parameter].is_floating_point() and not held[parameter].isfinite().all():
            what = f"{name}.{parameter} holds NaN or infinite values"
            raise InputError(f"{what}: the checkpoint is damaged, download or export it again")


def prepare_modules(model: nn.Module, backend: str | None, fuse: bool) -> None:
    """Lay out what is loaded for the backends that run it. fuse: linears that share an input share one product."""
    linears, offloaded, unpacked, workspace = [], False, 0, Workspace()
    for module in model.modules():
        if has_offloaded_params(module):
            offloaded = True
        elif isinstance(module, LowbitLinear):
            linears.append(module)
        elif isinstance(module, QuantizedEmbedding):
            module.prepare()
        elif isinstance(module, QuantizedExperts):
            unpacked += sum(math.prod(weights.shape) for weights in expert_weights(module).values())
            module.prepare(backend)
    if fuse and offloaded:  # all of it would come to the device only to see who shares what
        logger.info("linears that share an input multiply on their own: parts of the model are offloaded")
    elif fuse:
        share_products(model, workspace)
    for linear in linears:
        linear.prepare(workspace)
        unpacked += math.prod(linear.shape)
        if unpacked >= _UNPACKED_BETWEEN_RETURNS:
            unpacked = 0
            return_freed()
    del workspace
    return_freed()


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Put dense modules back, of the weights that the codes stand for."""
    for name, module in list(model.named_modules()):
        restore_experts(module, dtype)
        restore_embedding(module, dtype)
        if isinstance(module, LowbitLinear):
            model.set_submodule(name, dense_layer(module, dtype))


def dense_layer(layer: LowbitLinear, dtype: torch.dtype) -> nn.Module:
    """The layer of torch or transformers that holds the same weight, dequantized to `dtype`, and the same bias."""
    from transformers import Conv1D

    weight = layer.dequantize(dtype)
    dense: Conv1D | nn.Linear
    with torch.device("meta"):
        if layer.transposed:
            dense = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return dense
