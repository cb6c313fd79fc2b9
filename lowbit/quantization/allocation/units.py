"""What is allocated: units, each with the schemes that it may have and the bytes that each of them takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lowbit.discovery import CheckpointNames, find_sites
from lowbit.errors import InputError, UsageError
from lowbit.numerics.scheme import Scheme
from lowbit.quantization.allocation.engines import ranks_that_take
from lowbit.quantization.opened import Source
from lowbit.quantization.plan import Plan, Step, make_plan
from lowbit.serving import RANKS, fused_units, modules_of

# What a unit may be stored as, unless a format or an engine cannot: from the 2.25 to the 8.5 bits that are of use
CANDIDATES = tuple(
    Scheme(bits, group, sym)
    for bits, sym, groups in (
        (2, False, (32, 64, 128)),
        (3, False, (32, 64, 128)),
        (3, True, (64, 128)),
        (4, False, (32, 64, 128)),
        (4, True, (32, 64, 128)),
        (5, False, (32, 128)),
        (5, True, (32, 128)),
        (6, True, (32, 128)),
        (8, True, (32, 128)),
    )
    for group in groups
)


@dataclass(frozen=True)
class Unit:
    """Modules that have one scheme together, because engines make one matrix of them.

    modules: their names. weights: how many numbers they hold. bytes: what the unit takes up, by the schemes that it may
    have; schemes that do not fit are not in it. None stands for leaving it dense.
    """

    modules: tuple[str, ...]
    weights: int
    bytes: Mapping[Scheme | None, int]

    @property
    def name(self) -> str:
        """What its modules have in common, and its kind."""
        return f"{self.modules[0].rpartition('.')[0]}.{self.kind}".lstrip(".")

    @property
    def largest(self) -> "Unit":
        """The same with its largest scheme alone."""
        scheme = max(self.bytes, key=lambda scheme: self.bytes[scheme])
        return replace(self, bytes={scheme: self.bytes[scheme]})

    @property
    def kind(self) -> str:
        """The last parts of the names of its modules."""
        return "+".join(module.rpartition(".")[2] for module in self.modules)


# Unit.modules -> the scheme of the unit, None: it stays dense
Allocation = Mapping[tuple[str, ...], Scheme | None]


def find_units(
    start: Source,
    runnable: nn.Module,
    format_name: str,
    schemes: Sequence[Scheme],
    engine: str | None = None,
    gpus: int = 1,
    bytes_of: Callable[[Step], int] = lambda step: sum(info.nbytes for info in step.outputs),
    open_head: bool = False,
) -> list[Unit]:
    """The units of a model, in the order of its modules.

    Args:
        start: The checkpoint and its model; what is quantized, and what is left alone. Overrides stay as they are.
        runnable: A skeleton in bfloat16, which runs without numbers (`serving.fused_units`).
        format_name: Of the files.
        schemes: What a unit may have.
        engine: It has to take every unit; None: no engine in particular.
        gpus: Tensor parallelism over up to so many is kept where a unit has any scheme that allows it.
        bytes_of: What a weight takes up, in files or elsewhere.
        open_head: The output embedding may be quantized, or stay dense.

    Returns:
        Units that have at least one scheme. What no scheme can quantize is no unit.

    Raises:
        UsageError: An engine that is not in the table, or takes none of the schemes.
        InputError: Nothing can be quantized.
    """
    joined = fused_units(runnable, find_sites(runnable))
    found: dict[str, _Stored] = {}
    failure: Exception | None = None
    for scheme in schemes:
        asked = replace(start.recipe, scheme=scheme, lm_head=scheme if open_head or start.recipe.lm_head else None)
        try:
            plan = make_plan(start.reader, start.model, asked, format_name)
        except InputError as error:  # of a format that has no such scheme
            failure = error
            continue
        ranks = _ranks(plan, runnable, joined, engine, gpus)
        for module, (stored, weights, bytes) in _bytes_of(plan, bytes_of).items():
            if ranks[module]:
                found.setdefault(module, _Stored(weights, {}, {})).add(stored, bytes, ranks[module])
    if not found:
        names = ", ".join(scheme.name for scheme in schemes)
        raise failure or UsageError(
            f"{engine} takes nothing of this model as {names}: see the engines of `lowbit plan`"
        )
    groups = _groups(joined, found)
    units = [_unit(modules, [found[module] for module in modules]) for modules in groups]
    heads = _dense_heads(start, runnable) if open_head else {}
    return [_with_dense(unit, heads) for unit in units if unit.bytes]


def _dense_heads(start: Source, runnable: nn.Module) -> dict[str, int]:
    """Output embedding -> its bytes as it is stored."""
    heads = {name: site.module for name, site in find_sites(runnable).items() if site.is_head}
    names = CheckpointNames(start.model)
    located = {names.locate(name)[0]: info.nbytes for name, info in start.reader.tensors.items()}
    return {module: located[name] for name, module in heads.items() if name in located}


def _with_dense(unit: Unit, heads: Mapping[str, int]) -> Unit:
    """The same, which may stay dense where it is the output embedding."""
    dense = [heads[module] for module in unit.modules if module in heads]
    return replace(unit, bytes={**unit.bytes, None: sum(dense)}) if dense else unit


@dataclass
class _Stored:
    """A module: its weights; by scheme its bytes, and the numbers of GPUs that an engine takes it on."""

    weights: int
    bytes: dict[Scheme, int]
    ranks: dict[Scheme, frozenset[int]]

    def add(self, scheme: Scheme, bytes: int, ranks: frozenset[int]) -> None:
        self.bytes[scheme], self.ranks[scheme] = bytes, ranks


def _bytes_of(plan: Plan, bytes_of: Callable[[Step], int]) -> dict[str, tuple[Scheme, int, int]]:
    """Module -> scheme, weights and bytes of what `plan` chooses a scheme for: its own, not one that the user named."""
    found: dict[str, tuple[Scheme, int, int]] = {}
    for step in plan.quantized:
        if step.site.kind != "embedding" and plan.recipe.overridden_by(*step.site.names) is None:
            _, weights, bytes = found.get(step.site.module, (None, 0, 0))
            found[step.site.module] = step.scheme, weights + step.source.numel, bytes + bytes_of(step)
    return found


def _ranks(
    plan: Plan, runnable: nn.Module, joined: list[tuple[str, ...]], engine: str | None, gpus: int
) -> dict[str, frozenset[int]]:
    """Module -> the numbers of GPUs on which an engine takes it as it is planned; none: it does not take it."""
    chosen = {step.site.parameter: (step.site, step.scheme) for step in plan.quantized}
    taken = ranks_that_take(engine, plan.format_name, modules_of(runnable, chosen), joined)
    return {module: frozenset(size for size in sizes if size <= gpus) for module, sizes in taken.items()}


def most_gpus(config) -> int:
    """The largest number of GPUs that verdicts are about and that attention heads can be shared by equally."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None) or 1
    return max(size for size in RANKS if heads % size == 0)


def _groups(joined: list[tuple[str, ...]], found: Mapping[str, _Stored]) -> list[tuple[str, ...]]:
    """All modules in their order, those that are joined together."""
    of = {name: tuple(m for m in names if m in found) for names in joined for name in names}
    return list(dict.fromkeys(of.get(module, (module,)) for module in found))


def _unit(modules: tuple[str, ...], stored: list[_Stored]) -> Unit:
    """With the schemes that all its modules have, on as many GPUs as any of them allows."""
    common = [scheme for scheme in stored[0].bytes if all(scheme in other.bytes for other in stored)]
    ranks = {scheme: frozenset.intersection(*(each.ranks[scheme] for each in stored)) for scheme in common}
    most = max((len(sizes) for sizes in ranks.values()), default=0)
    bytes = {scheme: sum(each.bytes[scheme] for each in stored) for scheme in common if len(ranks[scheme]) == most}
    return Unit(modules, sum(each.weights for each in stored), bytes)
