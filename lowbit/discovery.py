"""Which weights of a model can be quantized, found from its modules: no table of architectures.

A `Site` is one weight matrix: that of an `nn.Linear`, of GPT-2's `Conv1D` (stored transposed), or a fused 3-D
parameter of an experts module (one matrix per expert). Sites are found on a model without data and then matched to
checkpoint names through the same renaming rules that transformers applies when it loads.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn
from torch.func import functional_call

from lowbit.errors import InputError, LowbitError, UsageError, first_line
from lowbit.guards.model_size import no_larger_than
from lowbit.guards.records import shown
from lowbit.numerics.scheme import Recipe, Scheme, names_module
from lowbit.transformers_api import CheckpointNames, build

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
    routed: bool = False  # experts that are called with hidden states, the experts of each token and their weights
    is_head: bool = False  # the output embedding

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
    if getattr(found, "can_generate", lambda: True)() or _head_of(skeleton(config, trust_remote_code)) is not None:
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


def _is_linear(module: nn.Module) -> bool:
    """An nn.Linear, or a subclass of it that computes the same: tried on a small weight."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    x, weight = torch.arange(6.0, device="cpu").view(2, 3), torch.arange(12.0, device="cpu").view(4, 3).sin()
    parameters = {"weight": weight} | ({} if module.bias is None else {"bias": torch.arange(4.0, device="cpu")})
    try:
        with torch.no_grad():
            return torch.allclose(functional_call(module, parameters, (x,)), nn.functional.linear(x, **parameters))
    except Exception:  # whatever else it wants, it is more than a linear
        return False


def _expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters of a module that holds experts: one that counts as many of them, by whatever name, as their
    first dimension is long."""
    kind = type(module).__name__.lower()
    counts = {value for name, value in vars(module).items() if "expert" in name + kind and type(value) is int}
    found = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return found if counts & {p.shape[0] for p in found.values()} else {}


def _is_transposed(module: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Whether experts are stored as [in_features, out_features]. transformers marks most; elsewhere the last parameter
    tells, which puts out what the first one takes in."""
    first, last = parameters[0], parameters[-1]
    by_shape = first.shape[1] == last.shape[2] and first.shape[2] != last.shape[1]
    return getattr(module, "is_transposed", by_shape)


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every weight matrix of the model that a format could hold, by parameter name, in module order."""
    from transformers import Conv1D

    sites, head = {}, _head_of(model)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if _is_linear(module):
            sites[prefix + "weight"] = Site(
                prefix + "weight", "linear", module.out_features, module.in_features, is_head=module is head
            )
        elif isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            sites[prefix + "weight"] = Site(prefix + "weight", "conv1d", columns, rows, transposed=True)
        elif parameters := _expert_parameters(module):
            transposed, routed = _is_transposed(module, list(parameters.values())), hasattr(module, "is_transposed")
            for leaf, parameter in parameters.items():
                experts, rows, columns = parameter.shape
                out_features, in_features = (columns, rows) if transposed else (rows, columns)
                sites[prefix + leaf] = Site(
                    prefix + leaf, "experts", out_features, in_features, transposed, experts, routed
                )
    return sites


def _language_model(model: nn.Module, sites: dict[str, Site]) -> Callable[[str], bool]:
    """Tells of a parameter whether it belongs to the language model, rather than to what sees, hears or projects.

    transformers says what each model inside of the model takes in. Where one takes no text, the language model is what
    holds the input embeddings and the layers behind them, and the decoder, without the parts in which such a one is.
    """
    names = {module: name for name, module in model.named_modules()}
    towers = [f"{name}." for module, name in names.items() if name and _takes_no_text(module, model.config)]
    if not towers:
        return lambda parameter: True
    lists = [f"{name}." for module, name in names.items() if isinstance(module, nn.ModuleList) and len(module)]
    layers = [name for name in lists if any(site.startswith(name) for site in sites)]
    decoder = names.get(model.get_decoder(), "")
    try:
        root = names.get(model.get_input_embeddings(), "")
    except NotImplementedError:  # what transformers raises for a model that it does not know them of
        root = decoder

    def holds(name: str, parts: list[str]) -> bool:
        return any(part.startswith(f"{name}.") for part in parts)

    while root and not holds(root, layers):
        root = root.rpartition(".")[0]
    while (parent := root.rpartition(".")[0]) and not holds(parent, towers):
        root = parent
    roots = [root] if not decoder or f"{root}.".startswith(f"{decoder}.") else [root, decoder]
    inside = tuple(f"{name}." if name else "" for name in roots)
    outside = tuple(
        f"{start}{tower[len(start) :].partition('.')[0]}."
        for start in inside for tower in towers if tower.startswith(start)
    )  # fmt: skip
    return lambda parameter: parameter.startswith(inside) and not parameter.startswith(outside)


def _takes_no_text(module: nn.Module, config) -> bool:
    modalities = getattr(module, "input_modalities", "text")
    if "text" not in ([modalities] if isinstance(modalities, str) else modalities):
        return True
    own = getattr(module, "config", None)
    return own is not None and any(own is getattr(config, name, None) for name in ("vision_config", "audio_config"))


def _routers(model: nn.Module, sites: dict[str, Site]) -> set[str]:
    """Linears with an output for each of the experts beside them, which are fused or a list of modules. They may be
    alone in a module of their own."""
    counts: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        block = name.rpartition(".")[0]
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
            counts.setdefault(block, set()).add(len(module))
        elif parameters := _expert_parameters(module):
            counts.setdefault(block, set()).update(p.shape[0] for p in parameters.values())
    alone: dict[str, list[str]] = {}
    for site in sites.values():
        alone.setdefault(site.module.rpartition(".")[0], []).append(site.parameter)
    found = set()
    for site in sites.values():
        owner = site.module.rpartition(".")[0]
        blocks = {owner} if len(alone[owner]) > 1 else {owner, owner.rpartition(".")[0]}
        if site.kind == "linear" and any(site.out_features in counts.get(block, ()) for block in blocks):
            found.add(site.parameter)
    return found


def _head_of(module: nn.Module) -> nn.Module | None:
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


def _task_heads(model: nn.Module) -> list[str]:
    """Modules that make scores, or labels, of what comes out of the model proper: where others have their output
    embedding."""
    body = getattr(model, "base_model", model)
    if body is model or _head_of(model) is not None:
        return []
    inside = {*body.modules()}
    return [name for name, module in model.named_modules() if name and module not in inside]


def _left_alone(model: nn.Module, sites: dict[str, Site], recipe: Recipe) -> dict[str, str]:
    """Parameter name -> why it is not quantized. Raises UsageError for a head that shall be and is tied."""
    reasons = {}
    if recipe.lm_head and (_head_of(model) is None or model.config.get_text_config().tie_word_embeddings):
        raise UsageError("the output embedding cannot be quantized: the model has none of its own (tied weights)")
    if not recipe.lm_head:
        heads = {_head_of(module) for module in model.modules()} - {None}  # also of a model inside of the model
        reasons = {f"{name}.weight": "output embedding" for name, module in model.named_modules() if module in heads}
        reasons |= {f"{name}.weight": "output of the model" for name in _task_heads(model)}
    in_language, routers = _language_model(model, sites), _routers(model, sites)
    for site in sites.values():
        if site.parameter in routers:
            reasons[site.parameter] = "router"
        elif site.kind == "linear" and site.out_features < _FEWEST_OUTPUTS:
            reasons[site.parameter] = f"gate with {site.out_features} outputs"
        elif not recipe.include_vision and site.parameter not in reasons and not in_language(site.parameter):
            reasons[site.parameter] = "outside of the language model"
    return reasons


def choose(model: nn.Module, recipe: Recipe) -> tuple[dict[str, tuple[Site, Scheme]], dict[str, tuple[Site, str]]]:
    """What `recipe` quantizes, and what it leaves alone: parameter name -> (Site, Scheme) and -> (Site, reason).

    Raises UsageError for a pattern of the recipe that changes nothing.
    """
    sites = find_sites(model)
    default_reasons = _left_alone(model, sites, recipe)
    chosen, left = {}, {}
    for name, site in sites.items():
        pattern = recipe.ignored_by(*site.names)
        if pattern is not None:
            left[name] = (site, f"ignored by {pattern!r}")
        elif name in default_reasons:
            left[name] = (site, default_reasons[name])
        else:
            scheme = recipe.asked_for(*site.names, is_head=site.is_head).fitted(site.in_features)
            # the inputs of fused experts stay as they are: no kernel of ours multiplies integers by a stack of matrices
            chosen[name] = (site, scheme.weight_only if site.kind == "experts" else scheme)
    _check_patterns(model, recipe, [site for site, _ in chosen.values()], left)
    return chosen, left


def _check_patterns(model: nn.Module, recipe: Recipe, chosen: list[Site], left: dict[str, tuple[Site, str]]) -> None:
    """Raise UsageError for the first pattern that changes nothing: it protects only if it names a module (also one that
    is never quantized), and overrides only if it is the first to name one that is quantized."""
    if not recipe.ignore and not recipe.overrides:
        return
    known = [name for name, _ in model.named_modules() if name]
    known += [name for site in (*chosen, *(site for site, _ in left.values())) for name in site.names]
    for pattern in recipe.ignore:
        if not any(names_module(pattern, name) for name in known):
            raise UsageError(f"ignore: {pattern!r} names no module of the model{_nearest(pattern, known)}")
    used = {recipe.overridden_by(*site.names) for site in chosen}
    for pattern, _ in recipe.overrides:
        if pattern in used:
            continue
        for site in chosen:
            if any(names_module(pattern, name) for name in site.names):
                earlier = recipe.overridden_by(*site.names)
                raise UsageError(f"override {pattern!r} changes nothing: {earlier!r} before it names the same modules")
        for site, reason in left.values():
            if any(names_module(pattern, name) for name in site.names):
                raise UsageError(f"override {pattern!r} changes nothing: {site.module} is left alone ({reason})")
        linears = [name for site in chosen for name in site.names]
        raise UsageError(f"override {pattern!r} names no linear layer of the model{_nearest(pattern, linears)}")


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The names that are most like a pattern: whole ones, or of their last part, whichever it is like."""
    text = re.sub(r"[^\w.]|^re:", "", pattern.replace(r"\d", "0")).strip(".")
    candidates = dict.fromkeys(names)
    if "." not in text:
        candidates = dict.fromkeys(name.rpartition(".")[2] for name in candidates)
    found = get_close_matches(text, candidates, n=3, cutoff=0.4) or list(candidates)[:3]
    return f"; the nearest names are {', '.join(found)}"


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The repeated layers that hold most of the model's quantizable weights, and their name: layers, not experts, since
    a list inside of another one's children is never the outermost. Raises InputError for a model without."""
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} has an encoder and a decoder, and calibration goes through a decoder alone: "
            "use --method rtn"
        )
    sites = find_sites(model)
    in_language = _language_model(model, sites)
    sites = {name: site for name, site in sites.items() if in_language(name)}
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


def also_named(names: CheckpointNames, sites: dict[str, Site]) -> Callable[[str], tuple[str, ...]]:
    """What finds the names that a config may know a stored weight by, besides the one it is stored under."""

    def find(base: str) -> tuple[str, ...]:
        found = (sites.get(names.locate(name)[0]) for name in (f"{base}.weight", base))
        return next(((site.module,) for site in found if site is not None), ())

    return find


def exceptions_and_ignored(
    model: nn.Module,
    named: Iterable[tuple[Site, str | None, Scheme | None]],
    elsewhere: set[str],
    default: Scheme,
) -> tuple[dict[str, Scheme], list[str]]:
    """What a config says of modules. named: of linears, each a site, its name in the checkpoint if it is stored, its
    scheme if it is quantized. elsewhere: names of other matrices: what is no linear here may be one in another engine
    (routers of experts), and stays dense there if it is named."""
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    exceptions, ignored = {}, dict.fromkeys(sorted(elsewhere - embeddings))
    for site, base, scheme in named:
        # a module may have another name in the checkpoint than in memory, and readers look for either
        names = [site.module] if base is None else [site.module, base]
        if scheme is None:
            ignored.update(dict.fromkeys(names))
        elif scheme != default or model.get_submodule(_owner(site)) is head:  # servers find a head by its name only
            exceptions.update(dict.fromkeys(names, scheme))
    return exceptions, list(ignored)


def _owner(site: Site) -> str:
    return site.parameter.rpartition(".")[0]


def named_in_config(
    model: nn.Module,
    names: CheckpointNames,
    sites: dict[str, Site],
    schemes: dict[str, Scheme],
    tensors,
    default: Scheme,
) -> tuple[dict[str, Scheme], list[str]]:
    """`exceptions_and_ignored` for a model whose quantized parameters have `schemes`. sites: of all linears.
    tensors: (name, number of dimensions) of what is stored, a quantized weight as one matrix."""
    named, elsewhere, seen = [], set(), set()
    for name, dimensions in tensors:
        base, parameter = name.removesuffix(".weight"), names.locate(name)[0]
        if parameter in sites:
            named.append((sites[parameter], base, schemes.get(parameter)))
            seen.add(parameter)
        elif dimensions == 2 and base != name:
            elsewhere |= {base, parameter.removesuffix(".weight")}
    named += [(site, None, schemes.get(parameter)) for parameter, site in sites.items() if parameter not in seen]
    return exceptions_and_ignored(model, named, elsewhere, default)
