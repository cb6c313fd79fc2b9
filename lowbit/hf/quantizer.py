"""The HfQuantizer: linears become LowbitLinear and fused experts stay quantized, on the fly or from a checkpoint.

On the fly, a dense tensor arrives under its own name, is quantized by `QuantizeOnLoad` and never stored. From a
checkpoint, the packed tensors of compressed-tensors load into the modules by name.
"""

import logging
import math
from collections import Counter
from pathlib import Path

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer

from lowbit.checkpoint.computed import ComputedTensor, as_loaded
from lowbit.checkpoint.layout import read_header
from lowbit.discovery import CheckpointNames, Site, choose, find_sites, named_in_config
from lowbit.errors import InputError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.config import LowbitConfig
from lowbit.hf.foreign import StoredModel, merges_experts
from lowbit.layers.experts import (
    QuantizedExperts,
    expert_weights,
    finish_experts,
    pack_experts,
    packed_name,
    quantize_experts,
    restore_experts,
)
from lowbit.layers.linear import LowbitLinear
from lowbit.layers.shared_product import share_products
from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import get_quantizer
from lowbit.system.memory import return_freed
from lowbit.transformers_api import (
    ignore_unexpected,
    keep_dimensions,
    keeps_matrices,
    original_sources,
    save_with,
    was_loaded,
    with_suffixes,
)

logger = logging.getLogger("lowbit")

# Codes (bytes) that layers unpack between two calls of `return_freed`: each call takes milliseconds, and what it
# returned has to be faulted in again
_UNPACKED_BETWEEN_RETURNS = 2**26


class QuantizeOnLoad(ConversionOps):
    """Takes dense tensors, of one parameter or of those that one tensor is split into, and gives the packed tensors of
    those that are quantized, under their full names."""

    def __init__(self, quantizer: "LowbitQuantizer"):
        self.hf_quantizer = quantizer

    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
        names = [full_layer_name] if len(input_dict) == 1 else list(input_dict)
        made = {}
        for name, tensor in zip(names, input_dict.values(), strict=True):
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            made.update(self._packed(name, tensor, model, missing_keys))
        return made

    def _packed(self, name: str, tensor: torch.Tensor, model, missing_keys) -> dict[str, torch.Tensor]:
        quantizer = self.hf_quantizer
        if name not in quantizer.chosen:
            return {name: tensor}
        site, scheme = quantizer.chosen[name]
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            # transformers swallows what is raised here
            quantizer.damaged.append(name)
        packed = quantizer.quantize(tensor.to(quantizer.dtype), site, scheme)
        module, leaf = _owner_and_leaf(model, name)
        missing_keys.discard(name)
        if site.kind == "experts":
            finish_experts(module, leaf)
            return {f"{site.parameter}{packed_name('', suffix)}": part for suffix, part in packed.items()}
        delattr(module, "weight")  # the placeholder
        return {f"{site.module}.{suffix}": part for suffix, part in packed.items()}


_PACKED = tuple(suffix.removeprefix("weight") for suffix in packed_format.PACKED_SUFFIXES)


def _is_of_packed(conversion) -> bool:
    return original_sources(conversion)[0].endswith(_PACKED)


def _owner_and_leaf(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    owner, _, leaf = parameter.rpartition(".")
    return model.get_submodule(owner), leaf


@register_quantizer("lowbit")
class LowbitQuantizer(HfQuantizer):
    requires_calibration = False
    quantization_config: LowbitConfig
    # lets the merges that transformers does for fused experts apply to each packed tensor
    serialized_names = {"weight": list(packed_format.PACKED_SUFFIXES)}  # noqa: RUF012

    def validate_environment(self, *args, **kwargs):
        if self.pre_quantized and self.quantization_config.source is None:
            raise InputError("this checkpoint says it is quantized but not how: load it with lowbit.load(folder)")

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.names = CheckpointNames(model)
        self.damaged, self.computing = [], []
        if self.pre_quantized:
            with torch.device("cpu"):  # it reads some tensors, and transformers is building a model on meta
                self.stored = StoredModel(model, self.names, kwargs["checkpoint_files"])
            self.chosen = {name: (found.site, found.scheme) for name, found in self.stored.sites.items()}
            ignore_unexpected(model, self.stored.idle)
        else:
            self.chosen, _ = choose(model, config.recipe)
        self.sites = find_sites(model)  # before they are replaced
        self.tensors = self.stored_tensors(kwargs["checkpoint_files"])
        if not self.chosen:
            raise InputError("nothing is quantized: no linear layer of the model matches the config")
        for site, scheme in self.chosen.values():
            owner, leaf = _owner_and_leaf(model, site.parameter)
            if site.kind == "experts":
                owner.is_transposed = site.transposed  # not all experts are marked
                quantize_experts(owner, leaf, scheme, self.dtype, self.names.merged(site.parameter))
                if self.pre_quantized:
                    finish_experts(owner, leaf)
            else:
                self._replace_linear(model, site, scheme, owner)
        if any(site.kind == "experts" for site, _ in self.chosen.values()):
            # packed experts are multiplied one by one: the other implementations take the whole parameter at once
            model.set_experts_implementation("eager")
        self.empty = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}

    def stored_tensors(self, files: list[str]) -> list[tuple[str, int]]:
        """Names and numbers of dimensions of what is loaded, a quantized weight as one matrix."""
        if self.pre_quantized:
            stored = self.stored.stored
            matrices = [(base if w.experts else f"{base}.weight", 2) for base, w in stored.weights.items()]
            return matrices + [(info.name, len(info.shape)) for info in stored.plain]
        headers = [read_header(Path(file)) for file in files if str(file).endswith(".safetensors")]
        stored = {info.name: info for header in headers for info in header}
        loaded = as_loaded(stored, self.names, self.chosen).values()
        self.computing = [info.conversion.converter for info in loaded if isinstance(info, ComputedTensor)]
        return [(info.name, len(info.shape)) for info in loaded]

    def _replace_linear(self, model, site: Site, scheme: Scheme, old: nn.Module) -> None:
        with torch.device("meta"):
            layer = LowbitLinear(
                site.in_features,
                site.out_features,
                scheme,
                old.bias is not None,
                self.dtype,
                self.quantization_config.backend,
                act_order=self.pre_quantized and self.stored.sites[site.parameter].act_order,
            )
            layer.transposed = site.transposed
            if not self.pre_quantized:
                layer.add_placeholder(torch.empty_like(old.weight))
        model.set_submodule(site.module, layer)

    def quantize(self, tensor: torch.Tensor, site: Site, scheme: Scheme) -> dict[str, torch.Tensor]:
        recipe = self.quantization_config.recipe

        def one(matrix):
            qweight, _ = get_quantizer(recipe.method).quantize(matrix, {}, scheme, recipe.options)
            return qweight

        if site.kind == "experts":
            return pack_experts(tensor, scheme, site.transposed, self.names.merged(site.parameter), one)
        return packed_format.pack(one(tensor.T.contiguous() if site.transposed else tensor))

    def param_needs_quantization(self, model, param_name, **kwargs):
        return not self.pre_quantized and param_name in self.chosen

    def get_quantize_ops(self):
        return QuantizeOnLoad(self)

    def update_weight_conversions(self, weight_conversions, *model):
        # the model is passed on where transformers passes it
        conversions = super().update_weight_conversions(weight_conversions, *model)
        # transformers would have packed tensors split and permuted like dense ones: those are stored as parameters
        conversions = [c for c in conversions if keeps_matrices(c) or not _is_of_packed(c)]
        self._conversions = [r for c in conversions for r in (c, *with_suffixes(c, _PACKED, self.chosen))]
        keep_dimensions(self._conversions)
        if not self.pre_quantized:
            return self._conversions
        return self.stored.conversions(self._conversions)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._check_and_cast(model)
        if self.damaged:
            raise InputError(f"{self.damaged[0]} holds NaN or infinite values: the checkpoint is damaged")
        linears, offloaded, unpacked = [], False, 0
        for name, module in model.named_modules():
            if has_offloaded_params(module):
                offloaded = True
                continue
            if isinstance(module, LowbitLinear):
                self._check_loaded(name, module, module.packed_shapes)
                for packed in module.packed_shapes:
                    _check_finite(f"{name}.{packed}", getattr(module, packed))
                linears.append(module)
            for parameter, weights in expert_weights(module).items():
                names = [packed_name(parameter, suffix) for suffix in packed_format.suffixes(weights.scheme)]
                self._check_loaded(name, module, names)
                for packed in names:
                    _check_finite(f"{name}.{packed}", getattr(module, packed))
                unpacked += math.prod(weights.shape)
            if isinstance(module, QuantizedExperts):
                module.prepare(self.quantization_config.backend)
        if self.quantization_config.fuse:
            if offloaded:  # all of it would come to the device only to see who shares what
                logger.info("linears that share an input multiply on their own: parts of the model are offloaded")
            else:
                share_products(model)
        for linear in linears:
            linear.prepare()
            unpacked += math.prod(linear.shape)
            if unpacked >= _UNPACKED_BETWEEN_RETURNS:
                unpacked = 0
                return_freed()
        return_freed()
        if not self.pre_quantized or not self.stored.is_native:
            # what is saved is compressed-tensors, whatever was loaded
            self._keep_expert_conversions(model)
            self.quantization_config.source = self.saved_config(model)
        self.stored = None
        return model

    def _check_and_cast(self, model) -> None:
        """Not every release of transformers looks at the shapes of what goes into a quantized model, and casts it."""
        for name, parameter in model.named_parameters():
            shape, dtype = self.empty.get(name, (parameter.shape, parameter.dtype))
            if parameter.shape != shape:
                raise InputError(f"{name} has shape {list(parameter.shape)} in the checkpoint, expected {list(shape)}")
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    def _check_loaded(self, name: str, module: nn.Module, parameters) -> None:
        """transformers fills a parameter that the checkpoint lacks with whatever is there; here it is an error."""
        held = dict(module.named_parameters(recurse=False))
        missing = [p for p in parameters if not was_loaded(held[p])]
        if "weight" in held and "weight" not in parameters:
            missing = ["weight"]
        if missing:
            raise InputError(
                f"{name}.{missing[0]} is not in the checkpoint: it is incomplete or does not belong to its config"
            )

    def _keep_expert_conversions(self, model) -> None:
        """Saving reverses the merges of packed experts, of which a dense or foreign checkpoint used none; what was
        computed and quantized stays under the names of its parameters."""
        used = [c for c in self._conversions if c.was_used() or _is_of_packed(c) or merges_experts(c)]
        computing = [original_sources(c) for c in self.computing]
        save_with(model, [c for c in used if original_sources(c) not in computing])

    def saved_config(self, model) -> dict:
        schemes = {name: scheme for name, (_, scheme) in self.chosen.items()}
        usual, _ = Counter(schemes.values()).most_common(1)[0]
        return packed_format.config(
            usual, *named_in_config(model, self.names, self.sites, schemes, self.tensors, usual)
        )

    def get_state_dict_and_metadata(self, model):
        for name, module in model.named_modules():
            if isinstance(module, LowbitLinear) and "weight_g_idx" in module.packed_shapes:
                raise InputError(
                    f"{name} has act-order, which compressed-tensors cannot hold: copy the folder it was loaded from"
                )
        self._follow_replaced_layers(model)
        return super().get_state_dict_and_metadata(model)

    def _follow_replaced_layers(self, model) -> None:
        """Layers may have been replaced since the model was loaded: what is saved has to say what is there now."""
        now = {name: scheme for name, scheme in _quantized_parameters(model).items() if name in self.sites}
        if now == {name: scheme for name, (_, scheme) in self.chosen.items()}:
            return
        self.chosen = {name: (self.sites[name], scheme) for name, scheme in now.items()}
        if self.chosen:
            self.quantization_config.source = self.saved_config(model)
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_compileable(self):
        return True

    def param_element_size(self, model, param_name, param):
        """Bytes per element of a placeholder, for `device_map="auto"`."""
        if self.param_needs_quantization(model, param_name):
            return self.chosen[param_name][1].bits / 8
        return param.element_size()

    def _dequantize(self, model, dtype=None):
        # saving a model leaves the dtype of its config as a name
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or self.dtype
        for name, module in list(model.named_modules()):
            restore_experts(module, dtype)
            if isinstance(module, LowbitLinear):
                model.set_submodule(name, dense_layer(module, dtype))
        return model


def dense_layer(layer: LowbitLinear, dtype: torch.dtype) -> nn.Module:
    """The layer of torch or transformers that holds the same weight, dequantized to `dtype`, and the same bias."""
    from transformers import Conv1D

    weight = layer.dequantize(dtype)
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


def _quantized_parameters(model: nn.Module) -> dict[str, Scheme]:
    """Parameter name -> scheme of all that is quantized; PEFT keeps a layer as the `base_layer` of its own."""
    found = {}
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")
        if isinstance(module, LowbitLinear):
            found[f"{name}.weight"] = module.scheme
        found |= {f"{name}.{parameter}": weights.scheme for parameter, weights in expert_weights(module).items()}
    return found


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinite values: the checkpoint is damaged, download or export it again")
