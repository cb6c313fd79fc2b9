"""What a config has to say of the modules of a quantized model."""

from collections.abc import Callable, Iterable

from torch import nn

from lowbit.discovery.sites import Site
from lowbit.numerics.scheme import Scheme
from lowbit.transformers_api import CheckpointNames


def known_as(names: CheckpointNames, sites: dict[str, Site]) -> Callable[[str], tuple[tuple[str, ...], str]]:
    """What finds the names that a config may know a stored weight by, besides the one it is stored under, and the class
    of its module."""

    def find(base: str) -> tuple[tuple[str, ...], str]:
        found = (sites.get(names.locate(name)[0]) for name in (f"{base}.weight", base))
        return next((((site.module,), site.class_name) for site in found if site is not None), ((), "Linear"))

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
        if site.kind == "embedding":
            if scheme is not None:
                # by their class, as llm-compressor writes it: vLLM gives most embeddings no name to look for
                exceptions[site.class_name] = scheme
                ignored.update(dict.fromkeys(sorted(embeddings - {site.module})))
        elif scheme is None:
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
