"""Everything that lowbit uses of transformers beyond its documentation, and every difference between its releases.

Nothing else in lowbit spells these names (tests/test_layers.py). `python -m pytest tests/test_transformers_api.py` says
in a minute, under any release, which of them it has taken away.
"""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from lowbit.upstream import UpstreamName

TESTED = "5.17 to 5.24"


def _name(path: str, purpose: str) -> UpstreamName:
    return UpstreamName(f"transformers.{path}", purpose, TESTED)


# What other modules import from here: looked up at that moment, so that commands which do without import nothing
IMPORTED = {
    name: _name(f"{module}:{name}", purpose)
    for module, purpose, names in (
        ("core_model_loading", "rename and merge tensors while a checkpoint loads",
         ("WeightRenaming", "MergeModulelist", "SplitModulelist", "rename_source_key")),
        ("core_model_loading", "load one layer of a checkpoint at a time", ("convert_and_load_state_dict_in_model",)),
        ("modeling_utils", "load one layer of a checkpoint at a time", ("LoadStateDictConfig",)),
        ("conversion_mapping", "know which tensors of a checkpoint become which parameters",
         ("get_model_conversion_mapping",)),
        ("cli.serving.server", "serve requests", ("build_server",)),
        ("cli.serving.model_manager", "serve requests", ("ModelManager",)),
        ("cli.serving.chat_completion", "serve requests", ("ChatCompletionHandler",)),
        ("cli.serving.completion", "serve requests", ("CompletionHandler",)),
        ("cli.serving.response", "serve requests", ("ResponseHandler",)),
        ("cli.serving.utils", "serve requests",
         ("GenerationState", "Modality", "_StreamError", "get_response_template", "response_events_to_chunks")),
        ("integrations.ggml", "know how transformers reads a GGUF file",
         ("GGUF_CONFIG_DEFAULTS_MAPPING", "GGUF_CONFIG_MAPPING")),
        ("integrations.gguf.utils", "know how transformers reads a GGUF file",
         ("is_gguf_arch_supported", "get_gguf_conversion_mapping")),
        ("modeling_gguf_pytorch_utils", "know how transformers reads a GGUF file",
         ("TENSOR_PROCESSORS", "TensorProcessor", "get_gguf_hf_weights_map")),
        ("integrations.gguf.gguf_tokenizer_mapping", "name the pre-tokenizer of a GGUF file",  # from 5.23 on
         ("GGUF_PRE_TOKENIZER_SPLITS",)),
    )
    for name in names
}  # fmt: skip

# Attributes of documented classes that the functions below read or write
ATTRIBUTES = {
    name.rpartition(".")[2]: _name(name, purpose)
    for name, purpose in (
        ("PreTrainedConfig._attn_implementation", "know whether attention takes the mask of a static cache"),
        ("PreTrainedModel._can_compile_fullgraph", "know which models run with a static cache"),
        ("PreTrainedModel._is_stateful", "know which models keep a state that cannot be taken back"),
        ("PreTrainedModel._from_config", "build a model of a class that no auto class has"),
        ("PreTrainedModel._tp_plan", "know how linears are split over GPUs"),
        ("PreTrainedModel._ep_plan", "know which experts are divided over GPUs"),
        ("PreTrainedModel.all_tied_weights_keys", "know which weights are tied"),
        ("PreTrainedModel._keys_to_ignore_on_load_missing", "know which parameters no checkpoint holds"),
        ("PreTrainedModel._keys_to_ignore_on_load_unexpected", "know which tensors of a checkpoint carry nothing"),
        ("experts._apply_gate", "multiply by quantized experts"),
        ("StaticLayer.cumulative_length", "set back a static cache"),
        ("WeightConverter._original_source_patterns", "rename packed tensors as dense ones are renamed"),
        ("WeightConverter._original_target_patterns", "rename packed tensors as dense ones are renamed"),
    )
}


def use(name: str):
    """What one of `IMPORTED` stands for. Raises MissingNameError."""
    return IMPORTED[name].imported()


def __getattr__(name: str):
    if name not in IMPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return use(name)


# Generation


def attention_of(config) -> str:
    """The implementation of attention that a model of this config runs: "sdpa", "eager", ..."""
    return ATTRIBUTES["_attn_implementation"].of(config)


def supports_static_cache(model) -> bool:
    """Whether the authors of a model say that it runs with a static cache."""
    return ATTRIBUTES["_can_compile_fullgraph"].of(model)


def is_stateful(model) -> bool:
    """Whether a model keeps a state, as of a recurrence, that cannot be set back to an earlier token."""
    return ATTRIBUTES["_is_stateful"].of(model)


def cache_argument(model) -> str | None:
    """The keyword by which the forward of a model takes its key-value cache, None if it takes none: `cache` from
    transformers 5.24 on, `past_key_values` before. A forward that takes any keyword (PEFT's) hands it on to a model of
    transformers, which takes that of `GenerationMixin`."""
    from transformers import GenerationMixin

    parameters = inspect.signature(model.forward).parameters
    accepted = [parameters]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepted.append(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
    names = ("cache", "past_key_values")
    return next((name for taken in accepted for name in names if name in taken), None)


def length_tensor(layer) -> torch.Tensor | None:
    """The tensor in which a layer of a static cache keeps the number of its positions, None for a layer of another
    kind."""
    from transformers import StaticLayer

    return ATTRIBUTES["cumulative_length"].of(layer) if isinstance(layer, StaticLayer) else None


def counts_in_python(layer) -> bool:
    """Whether a layer of a static cache also counts in Python, where a captured step would stay at one position."""
    return hasattr(layer, "cumulative_length_int")


# transformers would register a subclass of a cache layer in place of one that has a type of layers of its own
UNREGISTERED_CACHE_LAYER = {"_layer_type": None}


# Building and loading


def build(model_class, config, dtype: torch.dtype | None = None, trust_remote_code: bool = False):
    """A model of a class, or of an auto class, on the device of the surrounding context, in `dtype` or that of the
    config."""
    chosen = {} if dtype is None else {"dtype": dtype}
    if hasattr(model_class, "from_config"):
        return model_class.from_config(config, trust_remote_code=trust_remote_code, **chosen)
    return ATTRIBUTES["_from_config"].of(model_class)(config, **chosen)


def tied_weights(model) -> dict[str, str]:
    """Names of parameters that are tied -> of those that they are tied to."""
    return ATTRIBUTES["all_tied_weights_keys"].of(model)


def untie(model) -> None:
    """What is saved or moved from here on has no tied weights."""
    tie(model, {})


def tie(model, names: dict[str, str]) -> None:
    """Let the parameters `names` be those that they stand for, and no others be tied: a checkpoint that is loaded next
    may hold one of the two alone."""
    model.all_tied_weights_keys = dict(names)


def tensor_parallel_plan(model) -> dict[str, str]:
    """Patterns of module names ("model.layers.*.mlp.up_proj") -> how they are split ("colwise", ...)."""
    return ATTRIBUTES["_tp_plan"].of(model) or {}


def expert_parallel_plan(model) -> dict[str, str]:
    """The same of experts that are divided among processes, each of them whole."""
    return ATTRIBUTES["_ep_plan"].of(model) or {}


def generic_name(name: str) -> str:
    """The name of a module as such plans spell it: numbers between dots are `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def ignored_if_missing(model) -> Iterable[str]:
    """Regexes of parameters that no checkpoint holds: they are computed."""
    return ATTRIBUTES["_keys_to_ignore_on_load_missing"].of(model) or ()


def ignored_if_unexpected(model) -> Iterable[str]:
    """Regexes of checkpoint tensors that the model has no use for."""
    return ATTRIBUTES["_keys_to_ignore_on_load_unexpected"].of(model) or ()


def ignore_unexpected(model, patterns: Iterable[str]) -> None:
    """Let a model be loaded from a checkpoint with tensors that match one of the regexes."""
    model._keys_to_ignore_on_load_unexpected = {*ignored_if_unexpected(model), *patterns}


def mark_loaded(thing):
    """Leave a parameter, or what stands in for one, out of transformers' initialisation of weights. Returns it."""
    thing._is_hf_initialized = True
    return thing


def was_loaded(parameter: torch.Tensor) -> bool:
    """Whether transformers has filled a parameter from the checkpoint."""
    return getattr(parameter, "_is_hf_initialized", False)


def load_tensors(model, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device):
    """Load checkpoint tensors as `from_pretrained` does: renamed, experts merged, cast.

    Returns (tensor -> what went wrong with it, [(tensor, shape found, shape expected)]).
    """
    from transformers.utils import logging

    mapping = use("get_model_conversion_mapping")(model)
    loading = use("LoadStateDictConfig")(dtype=dtype, device_map={"": device}, weight_mapping=mapping)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        info, _ = use("convert_and_load_state_dict_in_model")(model, tensors, loading)
    finally:
        if shown:
            logging.enable_progress_bar()
    return info.conversion_errors, info.mismatched_keys


# Experts that transformers runs through an interface of its own


def experts_have_gate(module) -> bool | None:
    """Whether experts have a gate beside each up projection; None for a module without that interface."""
    return getattr(module, "has_gate", None)


def gated(module, rows: torch.Tensor) -> torch.Tensor:
    """What experts make of the product [T, 2 N] with gate and up: [T, N]."""
    return ATTRIBUTES["_apply_gate"].of(module)(rows)


def normed(module, rows: torch.Tensor) -> torch.Tensor:
    """What experts make of the product with the down projection: some norm it, in releases after 5.17."""
    return module.post_expert_norm(rows) if getattr(module, "has_post_expert_norm", False) else rows


# Conversions: what becomes of the tensors of a checkpoint while it loads


def _operations(conversion) -> set[str]:
    return {type(operation).__name__ for operation in getattr(conversion, "operations", ())}


def merges_matrices(conversion) -> bool:
    """Whether a conversion merges the matrices of experts into one parameter, each as it is stored."""
    operations = _operations(conversion)
    return "MergeModulelist" in operations and operations <= {"MergeModulelist", "Concatenate"}


def keeps_matrices(conversion) -> bool:
    """Whether each matrix that a conversion gives is stored as it is, transposed perhaps."""
    return merges_matrices(conversion) or _operations(conversion) <= {"Transpose"}


def original_sources(conversion) -> list[str]:
    """The patterns of checkpoint tensors that a conversion takes, as they were written down."""
    return ATTRIBUTES["_original_source_patterns"].of(conversion)


def with_suffixes(conversion, suffixes: Iterable[str], parameters: Iterable[str]) -> list:
    """For a mere renaming of a `*.weight` that gives one of `parameters`: renamings that do the same to names with each
    suffix."""
    WeightRenaming = use("WeightRenaming")
    if type(conversion) is not WeightRenaming:
        return []
    sources, targets = original_sources(conversion), ATTRIBUTES["_original_target_patterns"].of(conversion)
    if not sources[0].endswith(".weight") or not any(name.endswith(targets[0]) for name in parameters):
        return []
    made = [WeightRenaming([s + suffix for s in sources], [t + suffix for t in targets]) for suffix in suffixes]
    for renaming in made:
        renaming.scope_prefix, renaming.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return made


@cache
def _merge_class() -> type:
    class Split(use("SplitModulelist")):
        """transformers 5.17 drops all dimensions of length 1 when it splits experts: it would save [N, 1] scales as
        [N]."""

        def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
            parts = {}
            for source, tensors in input_dict.items():
                tensor = tensors[0] if isinstance(tensors, list) else tensors
                names = self.get_target_patterns(input_dict, source, target_patterns, tensor.shape[self.dim])
                parts.update(zip(names, tensor.unbind(self.dim), strict=True))
            return parts

    class MergeModulelist(use("MergeModulelist")):  # of the same name, by which `_operations` knows it
        @property
        def reverse_op(self):
            return Split(self.dim)

    return MergeModulelist


def keep_dimensions(conversions: Iterable) -> None:
    """Let the merges of experts among `conversions` be saved with all dimensions that they were loaded with."""
    from transformers import WeightConverter

    plain = use("MergeModulelist")
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            conversion.operations = [
                _merge_class()(operation.dim) if type(operation) is plain else operation
                for operation in conversion.operations
            ]


def save_with(model, conversions: list) -> None:
    """Saving a model reverses these conversions."""
    model._weight_conversions = conversions or None


@dataclass(frozen=True)
class Conversion:
    """What transformers computes while loading.

    sources: names of checkpoint tensors -> the patterns of `converter` that they match, in its order. parameters: what
    is computed from them.
    """

    model: nn.Module
    converter: object
    sources: dict[str, str]
    parameters: tuple[str, ...]

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters by name, from all of the sources by name. Raises whatever the operations raise."""
        patterns, targets = self.converter.source_patterns, self.converter.target_patterns
        made = {pattern: [tensors[n] for n, p in self.sources.items() if p == pattern] for pattern in patterns}
        made = {pattern: found for pattern, found in made.items() if found}
        for operation in self.converter.operations:
            made = operation.convert(
                made,
                source_patterns=patterns,
                target_patterns=targets,
                full_layer_name=self.parameters[0],
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        return {
            self.parameters[0].replace(targets[0], target): part[0] if isinstance(part, list) else part
            for target, part in made.items()
        }


def _natural(name: str) -> list:
    """Sorts names as transformers does: numbers in them by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def is_converted_gguf(architecture: str) -> bool:
    """Whether transformers reads GGUF files of an architecture by its newer loader."""
    return use("is_gguf_arch_supported")(architecture)


class CheckpointNames:
    """Translates checkpoint tensor names into parameter names of `model`, as transformers does while loading."""

    def __init__(self, model: nn.Module):
        from transformers import WeightConverter

        mapping = use("get_model_conversion_mapping")(model)
        self._model = model
        self._renamings = [entry for entry in mapping if isinstance(entry, use("WeightRenaming"))]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._merging = [entry for entry in self._converters if merges_matrices(entry)]
        self._by_source = {source: c for c in self._converters for source in c.source_patterns}
        self.state = model.state_dict()  # of the model's parameters
        self._found: dict[str, tuple[str, str | None]] = {}
        self._prefix = model.base_model_prefix

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(parameter name, the pattern of the converter that takes the tensor or None)"""
        if name not in self._found:  # asked for several times of each of up to hundreds of thousands
            rename = use("rename_source_key")
            self._found[name] = rename(name, self._renamings, self._converters, self._prefix, self.state)
        return self._found[name]

    def locate(self, name: str) -> tuple[str, bool]:
        """(parameter name, direct). Direct: the tensor is the parameter, or is merged into it as the matrix of one
        expert, or is transposed. Parameters are computed from other tensors while loading: see `conversions`."""
        renamed, source = self._renamed(name)
        if renamed not in self.state and name in self.state:
            return name, True
        if source is None:
            return renamed, True
        return renamed, keeps_matrices(self._by_source[source])

    def transposes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether matrices of a tensor of this shape are transposed while loading."""
        renamed, source = self._renamed(name)
        operation = None if source is None else self._by_source[source].operations[0]
        if type(operation).__name__ != "Transpose":
            return False
        return not operation.check_dims or tuple(self.state[renamed].shape) != shape

    def computed(self, name: str) -> list[str]:
        """All parameters that are computed from a tensor which `locate` calls not direct: the parts of one, say."""
        renamed, source = self._renamed(name)
        first, *others = self._by_source[source].target_patterns
        return [renamed, *(renamed.replace(first, other) for other in others)]

    def conversions(self, names: Iterable[str]) -> list[Conversion]:
        """How parameters are computed from those of the checkpoint tensors `names` that `locate` calls not direct."""
        groups: dict[str, dict[str, str]] = {}
        for name in sorted(names, key=_natural):
            if not self.locate(name)[1]:
                renamed, source = self._renamed(name)
                groups.setdefault(renamed, {})[name] = source
        made = []
        for sources in groups.values():
            name, source = next(iter(sources.items()))
            made.append(Conversion(self._model, self._by_source[source], sources, tuple(self.computed(name))))
        return made

    def expert(self, name: str) -> tuple[int, int] | None:
        """(expert, part) of a tensor that is merged into a fused parameter: part counts the tensors of one expert that
        are concatenated there (gate 0, up 1). None for any other tensor."""
        _, source = self._renamed(name)
        if source is None or not (number := re.search(r"\.(\d+)" + re.escape(source.rpartition("*")[2]) + "$", name)):
            return None
        return int(number[1]), self._by_source[source].source_patterns.index(source)

    def merged(self, parameter: str) -> int:
        """How many checkpoint tensors of one expert are concatenated in a fused parameter (1: stored alone)."""
        return next((len(c.source_patterns) for c in self._merging if parameter.endswith(c.target_patterns[0])), 1)

    def parts_of_experts(self, parameter: str) -> list[str]:
        """What the tensors of one expert are called from which a fused parameter is merged, with {} for its number, in
        the order in which they lie in it; none, where it is stored as it is."""
        for converter in self._merging:
            if parameter.endswith(target := converter.target_patterns[0]):
                owner = parameter.removesuffix(target)
                return [owner + source.replace("*", "{}") for source in converter.source_patterns]
        return []

    def by_expert(self, parameter: str) -> bool:
        """Whether a fused parameter is stored as tensors of each expert, not as it is."""
        return any(parameter.endswith(converter.target_patterns[0]) for converter in self._merging)
