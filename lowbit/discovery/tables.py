"""The input embedding of a model as something to quantize, and the output embeddings that are tied to it."""

from collections.abc import Mapping

from torch import nn

from lowbit.discovery.sites import Site
from lowbit.errors import UsageError
from lowbit.numerics.scheme import Scheme
from lowbit.transformers_api import tied_weights


def table_and_heads(model: nn.Module, sites: Mapping[str, Site]) -> tuple[Site, list[str]]:
    """(the input embedding, the parameters of output embeddings that are tied to it). sites: as `find_sites` has them.

    Raises UsageError for a table that cannot be quantized: there is none, or it is tied to more than output embeddings.
    """
    table = next((site for site in sites.values() if site.kind == "embedding"), None)
    if table is None:
        raise UsageError(f"{type(model).__name__} has no input embedding that can be quantized: leave embeddings out")
    ties = tied_weights(model)
    heads = [name for name, target in ties.items() if target == table.parameter]
    if table.parameter in ties or any(name not in sites or not sites[name].is_head for name in heads):
        other = ties.get(table.parameter) or next(n for n in heads if n not in sites or not sites[n].is_head)
        raise UsageError(f"{table.parameter} is tied to {other}, which needs it dense: leave embeddings out")
    return table, heads


def head_beside(embeddings: Scheme) -> Scheme:
    """The scheme of an output embedding that was tied to a table of this one, where nothing else is asked for."""
    # SmolLM2-135M, all else in 8 bits, groups of 64: a table of 4 bits has a mean KL of 0.025 with a head of 8 bits,
    # and of 0.28 with one of 4
    return Scheme(8, embeddings.group_size)
