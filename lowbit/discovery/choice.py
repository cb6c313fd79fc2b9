"""Which of a model's weight matrices a recipe quantizes, and why the others are left alone."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from torch import nn

from lowbit.discovery.sites import Site, expert_parameters, find_sites, head_of
from lowbit.errors import InputError, UsageError
from lowbit.numerics.scheme import Recipe, Scheme, names_module

# Gates with fewer outputs than this (shared-expert gates, value heads) hold no bytes worth saving and steer the model
_FEWEST_OUTPUTS = 16


def choose(model: nn.Module, recipe: Recipe) -> tuple[dict[str, tuple[Site, Scheme]], dict[str, tuple[Site, str]]]:
    """What `recipe` quantizes, and what it leaves alone: parameter name -> (Site, Scheme) and -> (Site, reason).

    Raises UsageError for a pattern of the recipe that changes nothing.
    """
    sites = find_sites(model)
    default_reasons = _left_alone(model, sites, recipe)
    chosen, left = {}, {}
    for name, site in sites.items():
        if site.kind == "embedding" and recipe.embeddings is None:
            continue  # nobody asks for it, and no reader expects it
        pattern = recipe.ignored_by(*site.names)
        if pattern is not None:
            left[name] = (site, f"ignored by {pattern!r}")
        elif name in default_reasons:
            left[name] = (site, default_reasons[name])
        else:
            scheme = recipe.asked_for(*site.names, **site.part).fitted(site.in_features)
            # inputs of fused experts stay as they are: no kernel of ours multiplies integers by a stack of matrices;
            # an embedding has none
            chosen[name] = (site, scheme.weight_only if site.kind in ("experts", "embedding") else scheme)
    _check_patterns(model, recipe, [site for site, _ in chosen.values()], left)
    return chosen, left


def _left_alone(model: nn.Module, sites: dict[str, Site], recipe: Recipe) -> dict[str, str]:
    """Parameter name -> why it is not quantized. Raises UsageError for a head that shall be and is tied."""
    reasons = {}
    if recipe.lm_head and (head_of(model) is None or model.config.get_text_config().tie_word_embeddings):
        raise UsageError("the output embedding cannot be quantized: the model has none of its own (tied weights)")
    if not recipe.lm_head:
        heads = {head_of(module) for module in model.modules()} - {None}  # also of a model inside of the model
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
        elif parameters := expert_parameters(module):
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


def _task_heads(model: nn.Module) -> list[str]:
    """Modules that make scores, or labels, of what comes out of the model proper: where others have their output
    embedding."""
    body = getattr(model, "base_model", model)
    if body is model or head_of(model) is not None:
        return []
    inside = {*body.modules()}
    return [name for name, module in model.named_modules() if name and module not in inside]


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
