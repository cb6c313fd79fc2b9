"""What each of several processes has of the weights of a model, by the tensor parallel plan of transformers.

The plan names modules and how they are divided: "colwise" (outputs), "rowwise" (inputs), experts by either side or each
whole. What it does not name, every process has whole. A plan that cannot be followed is refused before anything is
loaded.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lowbit.discovery import Site, find_sites, heads_in
from lowbit.errors import InputError, UsageError
from lowbit.hf.packed import QuantizedSite
from lowbit.numerics.scheme import PER_CHANNEL
from lowbit.parallel import EXPERTS, INPUTS, OUTPUTS, Part, Ranks
from lowbit.transformers_api import expert_parallel_plan, generic_name, tensor_parallel_plan

AUTO, BY_EXPERT = "auto", "experts"
Wanted = str | Mapping[str, str]

# Styles of linears -> (what is divided, whether the other side is whole on each process: inputs that come whole,
# outputs that are put together again)
_LINEAR = {
    "colwise": (OUTPUTS, False),
    "colwise_gather_output": (OUTPUTS, True),
    "colwise_rep": (OUTPUTS, True),
    "rowwise": (INPUTS, False),
    "rowwise_split_input": (INPUTS, True),
    "rowwise_rep": (INPUTS, True),
}
# Of parameters of experts -> (the dimension that is divided as they are stored, pieces that are divided by themselves)
_OF_EXPERTS = {
    "colwise": (OUTPUTS, 1),
    "rowwise": (INPUTS, 1),
    "packed_colwise": (OUTPUTS, 2),
    "packed_rowwise": (INPUTS, 2),
    "grouped_gemm": (EXPERTS, 1),
}
# Of modules with experts: their parameters have rules of their own
_EXPERT_MODULES = ("moe_tp_experts", "ep_dispatch_experts", "ep_router")
# What changes nothing where a model only runs, or is a matter of memory alone (tables of embeddings stay whole)
_WHOLE = (
    "embedding_rowwise", "embedding_colwise", "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj",
    "local_params", "ep_router",
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """What one process has of a weight [N, K] or [E, N, K]: `part` of its dimension `dim` (OUTPUTS, INPUTS, EXPERTS).

    whole_side: inputs come whole and are cut here, or outputs are put together again.
    """

    site: Site
    part: Part
    dim: int
    whole_side: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out_features, in_features) of this process."""
        sides = [self.site.experts, self.site.out_features, self.site.in_features]
        sides[self.dim] = self.part.length(sides[self.dim])
        return sides[0], sides[1], sides[2]


@dataclass(frozen=True)
class Shares:
    """Of one process. weights: by parameter. vectors: parameters of one number for each head or output, which are no
    weights of products, and what is kept of them."""

    ranks: Ranks
    weights: dict[str, Share]
    vectors: dict[str, Part]

    def of_linear(self, module: str) -> Share | None:
        return self.weights.get(f"{module}.weight")

    def of_experts(self, module: str) -> dict[str, Share]:
        """Parameter of a module with experts -> its share."""
        return {
            share.site.parameter.rpartition(".")[2]: share
            for share in self.weights.values()
            if share.site.kind == "experts" and share.site.parameter.rpartition(".")[0] == module
        }


def styles_of(model: nn.Module, wanted: Wanted) -> dict[str, str]:
    """Generic names of modules and parameters -> how they are divided. wanted: AUTO for the plan of transformers,
    BY_EXPERT for that and experts as its plan of expert parallelism says, or rules that take the place of its own.

    Raises UsageError where there is no plan.
    """
    if isinstance(wanted, str) and wanted not in (AUTO, BY_EXPERT):
        raise UsageError(f"tp_plan is {wanted!r}: expected {AUTO!r}, {BY_EXPERT!r}, or a dict of rules")
    plan = {generic_name(name): style for name, style in tensor_parallel_plan(model).items()}
    if wanted == BY_EXPERT:
        experts = expert_parallel_plan(model)
        if not experts:
            raise UsageError(f"{type(model).__name__} has no plan of transformers for experts: pass tp_plan={AUTO!r}")
        plan |= {generic_name(name): style for name, style in experts.items()}
    if not isinstance(wanted, str):
        plan |= {generic_name(name): style for name, style in wanted.items()}
    if not plan:
        raise UsageError(f"{type(model).__name__} has no tensor parallel plan in transformers: run it in one process")
    return plan


def shares_of(
    model: PreTrainedModel, wanted: Wanted, ranks: Ranks, quantized: Mapping[str, QuantizedSite] | None = None
) -> Shares:
    """Parameter -> what this process has of it, for those that are divided. quantized: those that are.

    Raises InputError, with the numbers, where the plan cannot be followed.
    """
    styles, sites = styles_of(model, wanted), find_sites(model)
    problems: list[str] = []
    shares = {name: share for name, site in sites.items() if (share := _share(styles, site, ranks)) is not None}
    for name, share in shares.items():
        problems += _problems(model, share, (quantized or {}).get(name), ranks.world)
    vectors = _vectors(model, styles, ranks)
    problems += _unknown(model, styles, sites, vectors)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")
    # what is put together again can as well be whole on each
    shares = {name: share for name, share in shares.items() if not _is_odd(share)}
    if not shares:
        hint = f"; tp_plan={BY_EXPERT!r} divides its experts" if expert_parallel_plan(model) else ""
        raise InputError(f"the plan of transformers divides nothing of {type(model).__name__}{hint}")
    return Shares(ranks, shares, vectors)


def _vectors(model: nn.Module, styles: Mapping[str, str], ranks: Ranks) -> dict[str, Part]:
    return {
        name: Part(ranks.rank, ranks.world)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and styles.get(generic_name(name)) == "colwise"
    }


def _share(styles: Mapping[str, str], site: Site, ranks: Ranks) -> Share | None:
    style = styles.get(generic_name(site.module))
    if style is None or style in _WHOLE or site.kind == "embedding":
        return None
    if site.kind != "experts":
        known = _LINEAR.get(style)
        return known and Share(site, Part(ranks.rank, ranks.world), *known)
    if style not in _OF_EXPERTS:
        return None
    dim, pieces = _OF_EXPERTS[style]
    if site.transposed and dim != EXPERTS:
        dim = INPUTS if dim == OUTPUTS else OUTPUTS
    return Share(site, Part(ranks.rank, ranks.world, pieces), dim)


def _is_odd(share: Share) -> bool:
    """Whether outputs are put together again and are too odd a number for equal parts: vocabularies often are."""
    return share.dim == OUTPUTS and share.whole_side and share.site.out_features % share.part.size > 0


def _problems(model: PreTrainedModel, share: Share, found: QuantizedSite | None, world: int) -> Iterator[str]:
    """Why a weight cannot be divided so."""
    site, name, dim = share.site, share.site.module, share.dim
    length = {EXPERTS: site.experts, OUTPUTS: site.out_features, INPUTS: site.in_features}[dim]
    side = {EXPERTS: "experts", OUTPUTS: "out_features", INPUTS: "in_features"}[dim]
    if dim == EXPERTS and not site.routed:
        yield f"{name} is not called with the experts of each token: its experts cannot be divided"
    heads = 0 if share.whole_side or dim == EXPERTS else heads_in(model, site, outputs=dim == OUTPUTS)
    if heads % world:
        yield f"{name} has {heads} heads: {world} processes cannot share them equally"
    if length % (world * share.part.pieces):
        if not _is_odd(share):
            pieces = f" in {share.part.pieces} pieces" if share.part.pieces > 1 else ""
            yield f"{name} has {length} {side}{pieces}: {world} processes cannot share them equally"
        return
    if found is None or dim != INPUTS:
        return
    group, part = found.scheme.group_size, share.part.length(length)
    if group != PER_CHANNEL and part % group:
        hint = f"; tp_plan={BY_EXPERT!r} leaves experts whole" if site.kind == "experts" else ""
        yield (
            f"{name} has {part} of {length} in_features on each of {world} processes, expected whole groups of "
            f"{group}{hint}"
        )
    if found.act_order:
        yield f"{name} has act-order: its inputs, which {world} processes would share, belong to groups all over"


def _unknown(
    model: nn.Module, styles: Mapping[str, str], sites: Mapping[str, Site], vectors: Collection[str]
) -> Iterator[str]:
    """Modules and parameters that the plan divides in a way which is not known here."""
    linears = {site.module for site in sites.values() if site.kind in ("linear", "conv1d")}
    owners = {site.parameter.rpartition(".")[0] for site in sites.values() if site.kind == "experts"}
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for name in names:
        style = styles.get(generic_name(name))
        known = (
            style is None
            or style in _WHOLE
            or (name in owners and style in _EXPERT_MODULES)
            or (name in linears and style in _LINEAR)
            or (name.rpartition(".")[0] in owners and style in _OF_EXPERTS)  # biases go with their matrices
            or name in vectors
        )
        if not known:
            yield f"{name} is {style!r} in the plan of transformers: lowbit divides no such module"
