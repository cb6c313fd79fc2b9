"""The hooks by which transformers loads and saves quantized models: linears become LowbitLinear, fused experts stay
quantized, on the fly or from a checkpoint.

On the fly, a dense tensor arrives under its own name, is quantized by `QuantizeOnLoad` and never stored. From a
checkpoint, the packed tensors of compressed-tensors load into the modules by name.
"""

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantizer

from lowbit.discovery import CheckpointNames, choose, find_sites
from lowbit.errors import InputError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.config import LowbitConfig
from lowbit.hf.dense import DenseModel, QuantizeOnLoad
from lowbit.hf.divided import CutPacked, cut_dense
from lowbit.hf.foreign import StoredModel
from lowbit.hf.modules import (
    check_and_cast,
    check_loaded,
    dequantize_modules,
    expected_of,
    prepare_modules,
    replace_modules,
)
from lowbit.hf.packed import PackedNames, QuantizedSite
from lowbit.hf.shares import Shares, shares_of
from lowbit.hf.tied import tied_to_quantized, untie_from_table, untie_quantized
from lowbit.layers.inputs import choose_inputs
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.scheme import Scheme
from lowbit.parallel import Ranks
from lowbit.transformers_api import ignore_unexpected


@register_quantizer("lowbit")
class LowbitQuantizer(HfQuantizer):
    """source: while a model loads, the checkpoint. packed: the names of what is quantized, which saving needs too.
    added_head: the scheme of an output embedding that was quantized after loading. shares: what this process has of
    the weights, where several share them; cut: what makes it, while a model loads."""

    requires_calibration = False
    quantization_config: LowbitConfig
    # lets the merges that transformers does for fused experts apply to each packed tensor
    serialized_names = {"weight": list(packed_format.PACKED_SUFFIXES)}  # noqa: RUF012
    source: DenseModel | StoredModel
    packed: PackedNames
    dtype: torch.dtype
    added_head: Scheme | None = None
    cut: CutPacked

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shares = Shares(Ranks.alone(), {}, {})

    def validate_environment(self, *args, **kwargs):
        if self.pre_quantized and self.quantization_config.source is None:
            raise InputError("this checkpoint says it is quantized but not how: load it with lowbit.load(folder)")

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        names, sites = CheckpointNames(model), find_sites(model)
        self.source = self._open(model, names, kwargs["checkpoint_files"])
        chosen = self.source.sites
        if not chosen:
            raise InputError("nothing is quantized: no linear layer of the model matches the config")
        if isinstance(self.source, StoredModel):
            chosen |= tied_to_quantized(model, self.source, sites)
        self.packed = PackedNames(names, sites, self.source.tensors, {p: found.scheme for p, found in chosen.items()})
        ignore_unexpected(model, self.source.idle)
        config = self.quantization_config
        if config.tp_plan is not None:
            self.shares = shares_of(model, config.tp_plan, Ranks(), chosen)
        self.cut = CutPacked(chosen, self.shares)
        replace_modules(model, chosen, names, self.dtype, config.backend, not self.pre_quantized, self.shares.weights)
        self._expected = expected_of(model)

    def _open(self, model: nn.Module, names: CheckpointNames, files: list[str] | None) -> DenseModel | StoredModel:
        if self.pre_quantized:
            with torch.device("cpu"):  # it reads some tensors, and transformers is building a model on meta
                return StoredModel(model, names, self.quantization_config.folder or files or ())
        recipe = self.quantization_config.recipe
        chosen = {name: QuantizedSite(*of) for name, of in choose(model, recipe)[0].items()}
        heads = {} if recipe.embeddings is None else untie_from_table(model, find_sites(model), recipe.embeddings)
        return DenseModel(names, files or (), chosen | heads, recipe)

    def param_needs_quantization(self, model, param_name, **kwargs):
        return not self.pre_quantized and param_name in self.packed.schemes

    def param_element_size(self, model, param_name, param):
        """Bytes per element of a placeholder, for `device_map="auto"`."""
        if self.param_needs_quantization(model, param_name):
            return self.packed.schemes[param_name].bits / 8
        return param.element_size()

    def get_quantize_ops(self):
        assert isinstance(self.source, DenseModel)  # nothing else has parameters that need quantization
        return QuantizeOnLoad(self.source, self.dtype, self.cut.cut)

    def update_weight_conversions(self, weight_conversions, *model):
        # the model is passed on where transformers passes it
        conversions = super().update_weight_conversions(weight_conversions, *model)
        return self.cut.in_conversions(self.source.conversions(self.packed.conversions(conversions)))

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        check_and_cast(model, self._expected)
        if self.source.damaged:
            raise InputError(f"{self.source.damaged[0]} holds NaN or infinite values: the checkpoint is damaged")
        check_loaded(model)
        untie_quantized(model, self.source.sites)
        if self.shares.weights:
            cut_dense(model, self.shares)
        prepare_modules(model, config.backend, config.fuse)
        choose_inputs(model, config.exact)
        if not self.source.is_native:
            # what is saved is compressed-tensors, whatever was loaded
            self.packed.save_merged(model, self.source.computed_from)
            config.source = self.packed.config(model)
        del self.source, self._expected, self.cut
        return model

    def get_state_dict_and_metadata(self, model):
        if self.shares.weights:
            raise InputError(f"{self.shares.ranks.world} processes share this model: load it in one to save it")
        for name, module in model.named_modules():
            if isinstance(module, LowbitLinear) and "weight_g_idx" in module.packed_shapes:
                raise InputError(
                    f"{name} has act-order, which compressed-tensors cannot hold: copy the folder it was loaded from"
                )
        if self.packed.follow(model):  # what is saved has to say what is there now
            if self.packed.schemes:
                self.quantization_config.source = self.packed.config(model)
            elif hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
        return super().get_state_dict_and_metadata(model)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_compileable(self):
        return True

    def _dequantize(self, model, dtype=None):
        # saving a model leaves the dtype of its config as a name
        dequantize_modules(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or self.dtype)
        return model
