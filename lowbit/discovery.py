"""Which weights of a model can be quantized, found from its modules: no table of architectures.

A `Site` is one weight matrix: that of an `nn.Linear`, of GPT-2's `Conv1D` (stored transposed), or a fused 3-D
parameter of an experts module (one matrix per expert). Sites are found on a model without data and then matched to
checkpoint names through the same renaming rules that transformers applies when it loads.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.errors import InputError, UsageError, first_line
from lowbit.scheme import Recipe, Scheme

# Gates with fewer outputs than this (shared-expert gates, value heads) hold no bytes worth saving and steer the model
_FEWEST_OUTPUTS = 16


@dataclass(frozen=True)
class Site:
    """A weight matrix of a model: `parameter` is its name in the model, `module` the name that configs know it by."""

    parameter: str
    kind: str  # "linear", "conv1d" or "experts"
    out_features: int
    in_features: int
    transposed: bool = False  # stored as [in_features, out_features]
    experts: int = 0

    @property
    def module(self) -> str:
        return self.parameter.removesuffix(".weight")

    @property
    def names(self) -> tuple[str, ...]:
        """What a recipe or a config may call it. Fused experts are also known by the names of their unfused linears."""
        if self.kind != "experts":
            return (self.module,)
        owner, _, leaf = self.parameter.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj")}.get(leaf, (leaf,))
        return (self.parameter, owner, *(f"{owner}.0.{part}" for part in parts))


def skeleton(config, trust_remote_code: bool = False, device="meta", dtype=None) -> nn.Module:
    """The model that a transformers config describes, on the meta device: modules and shapes, no memory."""
    import transformers

    architecture = (getattr(config, "architectures", None) or [None])[0]
    model_class = getattr(transformers, str(architecture or ""), None)
    chosen = {} if dtype is None else {"dtype": dtype}
    try:
        with nullcontext() if device is None else torch.device(device):
            if model_class is not None:
                return model_class._from_config(config, **chosen)
            auto = transformers.AutoModelForCausalLM
            return auto.from_config(config, trust_remote_code=trust_remote_code, **chosen)
    except Exception as error:  # sizes that make no sense fail anywhere
        name = architecture or config.model_type
        raise InputError(f"transformers cannot build {name}: {first_line(error)}") from None


def _is_experts(module: nn.Module) -> bool:
    """transformers marks fused experts with the layout of their parameters."""
    return hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every weight matrix of the model that a format could hold, by parameter name, in module order."""
    from transformers.pytorch_utils import Conv1D

    sites = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward):
            sites[prefix + "weight"] = Site(prefix + "weight", "linear", module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            sites[prefix + "weight"] = Site(prefix + "weight", "conv1d", columns, rows, transposed=True)
        elif _is_experts(module):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    experts, rows, columns = parameter.shape
                    out_features, in_features = (columns, rows) if module.is_transposed else (rows, columns)
                    sites[prefix + leaf] = Site(
                        prefix + leaf, "experts", out_features, in_features, module.is_transposed, experts
                    )
    return sites


def _left_alone(model: nn.Module, sites: dict[str, Site], lm_head: bool) -> dict[str, str]:
    """Parameter name -> why it is not quantized. Raises UsageError for a head that shall be and is tied."""
    reasons = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if lm_head and (head is None or model.config.get_text_config().tie_word_embeddings):
        raise UsageError("the output embedding cannot be quantized: the model has none of its own (tied weights)")
    expert_counts = {}
    for name, module in model.named_modules():
        if head is not None and module is head and not lm_head:
            reasons[f"{name}.weight"] = "output embedding"
        if _is_experts(module):
            expert_counts[name.rpartition(".")[0]] = module.num_experts
    for site in sites.values():
        parent = site.module.rpartition(".")[0]
        if site.kind == "linear" and site.out_features == expert_counts.get(parent):
            reasons[site.parameter] = "router"
        elif site.kind == "linear" and site.out_features < _FEWEST_OUTPUTS:
            reasons[site.parameter] = f"gate with {site.out_features} outputs"
    return reasons


def choose(model: nn.Module, recipe: Recipe) -> tuple[dict[str, tuple[Site, Scheme]], dict[str, tuple[Site, str]]]:
    """What `recipe` quantizes, and what it leaves alone: parameter name -> (Site, Scheme) and -> (Site, reason)."""
    sites = find_sites(model)
    default_reasons = _left_alone(model, sites, recipe.lm_head)
    chosen, left = {}, {}
    for name, site in sites.items():
        pattern = recipe.ignored_by(*site.names)
        if pattern is not None:
            left[name] = (site, f"ignored by {pattern!r}")
        elif name in default_reasons:
            left[name] = (site, default_reasons[name])
        else:
            chosen[name] = (site, recipe.asked_for(site.module).fitted(site.in_features))
    return chosen, left


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The repeated layers that hold most of the model's quantizable weights, and their name: layers, not experts, since
    a list inside of another one's children is never the outermost."""
    sites = find_sites(model)
    best, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            inside = [site for site in sites.values() if site.parameter.startswith(f"{name}.")]
            weights = sum(site.out_features * site.in_features * max(site.experts, 1) for site in inside)
            if weights > most:  # an inner list holds less than the outer one, which comes first
                best, most = (name, module), weights
    if best is None:
        raise InputError(
            f"{type(model).__name__} has no list of decoder layers, which calibration goes through: use --method rtn"
        )
    return best


class CheckpointNames:
    """Translates checkpoint tensor names into parameter names of `model`, as transformers does while loading."""

    def __init__(self, model: nn.Module):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_source = {source: c for c in self._converters for source in c.source_patterns}
        self.state = model.state_dict()  # of the model's parameters
        self._prefix = model.base_model_prefix

    def locate(self, name: str) -> tuple[str, bool]:
        """(parameter name, direct). Direct: the tensor is the parameter, or is merged into it as the matrix of one
        expert. Other tensors are computed from while loading, and cannot be quantized before that."""
        from transformers.core_model_loading import rename_source_key

        renamed, source = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if renamed not in self.state and name in self.state:
            return name, True
        if source is None:
            return renamed, True
        operations = {type(operation).__name__ for operation in self._by_source[source].operations}
        return renamed, "MergeModulelist" in operations and operations <= {"MergeModulelist", "Concatenate"}

    def expert(self, name: str) -> tuple[int, int] | None:
        """(expert, part) of a tensor that is merged into a fused parameter: part counts the tensors of one expert that
        are concatenated there (gate 0, up 1). None for any other tensor."""
        from transformers.core_model_loading import rename_source_key

        _, source = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if source is None or not (number := re.search(r"\.(\d+)" + re.escape(source.rpartition("*")[2]) + "$", name)):
            return None
        return int(number[1]), self._by_source[source].source_patterns.index(source)

    def merged(self, parameter: str) -> int:
        """How many checkpoint tensors of one expert are concatenated in a fused parameter (1: stored alone)."""
        for converter in self._converters:
            targets = converter.target_patterns
            if len(targets) == 1 and parameter.endswith(targets[0]) and len(converter.source_patterns) > 1:
                return len(converter.source_patterns)
        return 1

    def by_expert(self, parameter: str) -> bool:
        """Whether a fused parameter is stored as tensors of each expert, not as it is."""
        targets = [target for converter in self._converters for target in converter.target_patterns]
        return any(parameter.endswith(target) for target in targets)
