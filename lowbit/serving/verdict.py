"""The modules of a checkpoint held against the table: the first that an engine refuses, what it has, what is needed."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from lowbit.numerics.scheme import BITS, PER_CHANNEL, Activations
from lowbit.serving.rules import COLUMN, PACKED, ROW, RULES, Kernel, Module, Rule


@dataclass(frozen=True)
class Verdict:
    """tensor_parallel: number of GPUs -> why the engine refuses the checkpoint on so many, None if it takes it.

    kernels: those that run the modules on one GPU, with how many modules each. capability: least compute capability of
    the GPU, None if none is needed. run: known from a run, not only from reading. note: what to know besides.
    """

    engine: str
    version: str
    tensor_parallel: Mapping[int, str | None]
    kernels: Mapping[str, int]
    capability: tuple[int, int] | None
    run: bool
    note: str

    @property
    def reason(self) -> str | None:
        """Why the engine refuses the checkpoint whatever the number of GPUs: on one."""
        return self.tensor_parallel[1]

    @property
    def ok(self) -> bool:
        return self.reason is None


def verdicts(
    format: str,
    modules: Mapping[str, Module],
    left: Iterable[str] = (),
    units: Iterable[tuple[str, ...]] = (),
    dtype: str = "bfloat16",
    capability: tuple[int, int] | None = None,
) -> list[Verdict]:
    """One verdict for each engine that reads `format`.

    modules: name -> what is quantized (`modules_of`). left: names of linears that stay dense. units: names that engines
    merge (`fused_units`). dtype: of the checkpoint. capability: of the GPU it shall run on, None: any that will do.
    """
    left, units = set(left), list(units)
    return [_judge(rule, modules, left, units, dtype, capability) for rule in RULES if rule.format == format]


# What holds of any engine: groups and words are not cut
_ANY_ENGINE = (Kernel("", BITS, BITS, activations=(None,)),)


def modules_taken(
    engine: str | None, format: str, modules: Mapping[str, Module], units: Iterable[tuple[str, ...]]
) -> dict[int, set[str]]:
    """Size of tensor parallelism -> names of the modules that an engine takes, each for itself.

    engine: as in the table, in small letters; None: no engine in particular. The other arguments are those of
    `verdicts`.
    """
    of_any = Rule("", "", format, _ANY_ENGINE, _ANY_ENGINE, act_order=True, fused_experts=True)
    rule = next((r for r in RULES if r.format == format and r.engine.lower() == engine), of_any)
    joined = _joined(units, modules) if rule.fuses else {}

    def taken(name: str, size: int) -> bool:
        return _kernel(rule, name, joined.get(name, [name]), modules, size, None)[1] is None

    return {size: {name for name in modules if taken(name, size)} for size in rule.ranks}


def _joined(units: Iterable[tuple[str, ...]], modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Linears that become one -> all the names of it."""
    linears = [[name for name in unit if name in modules and not modules[name].expert] for unit in units]
    return {name: names for names in linears if len(names) > 1 for name in names}


def _judge(rule: Rule, modules, left, units, dtype, capability) -> Verdict:
    mixed, joined = [], {}
    if rule.fuses:
        mixed = list(_mixed(units, modules, left))
        joined = _joined(units, modules)
    chosen: dict[str, Kernel] = {}  # on one GPU
    sizes = {}
    for size in rule.ranks:
        found = [*mixed]
        for name in modules:
            kernel, problem = _kernel(rule, name, joined.get(name, [name]), modules, size, capability)
            if problem is not None:
                found.append(problem)
            elif size == 1:
                chosen[name] = kernel
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        sizes[size] = found[0] + more if found else None
    needed = [kernel.capability for kernel in chosen.values() if kernel.capability]
    notes = [rule.note] if rule.note else []
    if dtype not in rule.dtypes:
        notes.append(f"computes in {' or '.join(rule.dtypes)}: {dtype} is converted")
    kernels = Counter(kernel.name for kernel in chosen.values() if kernel.name)
    return Verdict(rule.engine, rule.version, sizes, kernels, max(needed, default=None), rule.run, "; ".join(notes))


def _mixed(units, modules: Mapping[str, Module], left: set[str]) -> Iterator[str]:
    """Units of which a part is dense, or whose parts have several schemes."""
    for unit in units:
        schemes = {modules[name].scheme.name: name for name in unit if name in modules}
        dense = [name for name in unit if name in left]
        if dense and schemes:
            quantized = next(iter(schemes.values()))
            yield f"{dense[0]} is dense and {quantized} is not: they become one matrix, quantize all of it or nothing"
        elif len(schemes) > 1:
            (first, name), (second, other), *_ = schemes.items()
            yield f"{name} is {first} and {other} is {second}: they become one matrix, which needs one scheme"


def _kernel(rule, name, joined, modules, size, capability) -> tuple[Kernel | None, str | None]:
    """The kernel that runs the module `name`, merged with others of `joined`, on each of `size` ranks, or why not."""
    module = modules[name]
    where = f"{name} ({module.scheme.name}, {module.out_features}x{module.in_features})"
    if module.act_order and module.scheme.group_size != PER_CHANNEL and not rule.act_order:
        return None, f"{where} has groups in the order of activations, needed: the natural order, g_idx[k] = k // group"
    if module.fused and not rule.fused_experts:
        return None, f"{where} is stored as one tensor of all experts, needed: tensors of each expert"
    if module.embedding:
        return _of_embedding(rule, where, module, modules)
    parts = [_on_rank(modules[other], size) for other in joined]
    part, problem = parts[joined.index(name)]
    if rule.by_plan:
        problem = (_off_plan(module, size) if size > 1 and module.split else None) or problem
    else:
        problem = problem or _partial_words(rule, module, part, len(joined) > 1)
    if problem is not None:
        return None, f"{where} {problem}"
    whole = replace(part, out_features=sum(other.out_features for other, _ in parts))
    kernels = rule.experts if module.expert else rule.linear
    taken = {activations: None for kernel in kernels for activations in kernel.activations}
    if module.scheme.activations not in taken:
        return None, f"{where} has {_inputs(module.scheme.activations)}, needed: {' or '.join(map(_inputs, taken))}"
    reasons = []
    for kernel in (kernel for kernel in kernels if module.scheme.activations in kernel.activations):
        reason = _unfit(kernel, whole, capability)
        if reason is None:
            return kernel, None
        reasons.append(f"{kernel.name} needs {reason}".lstrip())
    return None, f"{where}{f' on each of {size} ranks' if size > 1 else ''}: {'; '.join(reasons)}"


def _of_embedding(rule: Rule, where: str, module: Module, modules) -> tuple[Kernel | None, str | None]:
    """The kernel that looks up rows of an embedding, or why none does. Ranks share the rows, padded as they need it."""
    if not rule.embeddings:
        return None, f"{where} is an embedding, needed: a dense one"
    if module.tied and not rule.tied_embeddings:
        return None, f"{where} is the table of the output embedding too, needed: a head of its own"
    other = next((name for name, each in modules.items() if each.scheme != module.scheme), None)
    if rule.one_scheme and other is not None:
        return None, f"{where} is an embedding and {other} is {modules[other].scheme.name}, needed: one scheme for all"
    reasons = []
    for kernel in rule.embeddings:
        if (reason := _unfit(kernel, module, None)) is None:
            return kernel, None
        reasons.append(f"{kernel.name} needs {reason}".lstrip())
    return None, f"{where}: {'; '.join(reasons)}"


def _inputs(activations: Activations | None) -> str:
    if activations is None:
        return "inputs in floating point"
    kind = "symmetric" if activations.sym else "asymmetric"
    return f"{kind} {'static' if activations.static else 'dynamic'} inputs"


def _on_rank(module: Module, size: int) -> tuple[Module, str | None]:
    """What one of `size` ranks holds of `module`, and why it cannot be divided so."""
    side = {COLUMN: "out_features", ROW: "in_features"}.get(module.split) if size > 1 else None
    if side is None:
        return module, None
    length, group = getattr(module, side), module.scheme.group_size
    part = replace(module, **{side: length // size})
    if length % (size * (module.merged if module.split == COLUMN else 1)):
        return part, f"has {length} {side}, needed: a number that {size} ranks can share equally"
    if module.split == ROW and group != PER_CHANNEL and part.in_features % group:
        return (
            part,
            f"has {part.in_features} in_features on each of {size} ranks, needed: whole groups of {group}",
        )
    return part, None


def _off_plan(module: Module, size: int) -> str | None:
    """Why `size` ranks cannot have what the plan of transformers says."""
    if not module.planned:
        return "is divided by no plan of transformers, needed: one of tensor parallelism"
    if module.heads % size:
        return f"has {module.heads} heads, needed: a number that {size} ranks can share equally"
    if module.act_order and module.split == ROW:
        return "has groups in the order of activations, needed: the natural order, where ranks share inputs"
    return None


def _partial_words(rule: Rule, module: Module, part: Module, joined: bool) -> str | None:
    """Where a matrix is cut or joined inside of an int32 word that holds several codes or zero points."""
    for side in PACKED[rule.format](module.scheme):
        length = getattr(part, side)
        if side == "out_features":
            length //= module.merged
        cut = length != getattr(module, side)
        if (cut or (joined and side == "out_features")) and length * module.scheme.bits % 32:
            codes = 32 // math.gcd(32, module.scheme.bits)
            return f"is cut into parts of {length} {side}, needed: whole int32 words, a multiple of {codes}"
    return None


def _unfit(kernel: Kernel, part: Module, capability) -> str | None:
    """What `kernel` needs and does not find in `part`, None if it runs it."""
    scheme = part.scheme
    bits, kind = (kernel.sym, "symmetric") if scheme.sym else (kernel.asym, "asymmetric")
    if not bits:
        return f"weights that are not {kind}"
    if scheme.bits not in bits:
        return f"{' or '.join(map(str, bits))} bits where weights are {kind}"
    if kernel.groups is not None and scheme.group_size not in kernel.groups:
        return f"group_size {' or '.join(map(str, kernel.groups))}"
    for side, multiple in (("in_features", kernel.in_multiple), ("out_features", kernel.out_multiple)):
        if getattr(part, side) % multiple:
            return f"{side} a multiple of {multiple}, found {getattr(part, side)}"
    if kernel.whole_words and part.in_features * scheme.bits % 32:
        return f"rows of whole int32 words, found {part.in_features} codes of {scheme.bits} bits"
    hidden = part.out_features if part.split == ROW else part.in_features
    if part.expert and hidden % kernel.hidden:
        return f"a hidden size that is a multiple of {kernel.hidden}, found {hidden}"
    if capability is not None and kernel.capability is not None and capability < kernel.capability:
        return "compute capability {}.{}, found {}.{}".format(*kernel.capability, *capability)
    return None
