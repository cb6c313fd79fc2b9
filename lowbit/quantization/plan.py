"""What a run will write, to the byte, from config and safetensors headers alone."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType

import torch

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.computed import as_loaded
from lowbit.checkpoint.extras import judge
from lowbit.checkpoint.names import output_name
from lowbit.discovery import CheckpointNames, Site, choose, exceptions_and_ignored
from lowbit.errors import InputError, UsageError
from lowbit.folders.dense import DequantizedTensor
from lowbit.folders.opened import unclaimed
from lowbit.formats import get_format
from lowbit.numerics.exact import holds
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantizers import get_quantizer

_SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Step:
    """One tensor of the source and what becomes of it: quantized by `scheme`, or copied (`scheme` None)."""

    source: TensorInfo
    outputs: tuple[TensorInfo, ...]
    site: Site | None = None
    scheme: Scheme | None = None
    reason: str = ""  # why a weight matrix is copied
    transposed_on_load: bool = False  # its matrices are transposed while loading

    @property
    def transposed(self) -> bool:
        """Whether the source holds its matrices as [in_features, out_features]."""
        return self.site.transposed != self.transposed_on_load

    @property
    def is_exact(self) -> bool:
        """Whether the source holds integers that are on the grid that is asked for: they need no rounding."""
        source = self.source
        if self.scheme is None or not isinstance(source, DequantizedTensor) or source.weight.act_order:
            return False
        return holds(self.scheme, source.weight.scheme, source.weight.shape[1])

    @property
    def base(self) -> str:
        """The name that the output tensors share: the source's, without `.weight`."""
        return self.source.name.removesuffix(".weight")

    def output_name(self, suffix: str) -> str:
        return output_name(self.source.name, suffix)


def statistics(recipe: Recipe) -> tuple[str, ...]:
    """What has to be measured with data: what the method needs ("hessian", "missing"), and the ranges of inputs."""
    needs = get_quantizer(recipe.method).needs(recipe.options)
    return (*needs, "ranges") if recipe.is_static else needs


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    format_name: str
    steps: tuple[Step, ...]
    quantization_config: dict
    left: dict[str, tuple[Site, str]] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()  # tensors that nothing says the purpose of
    unclaimed: dict[str, str] = field(default_factory=dict)  # tensors that no module has -> what becomes of them

    @cached_property
    def quantized(self) -> list[Step]:
        return [step for step in self.steps if step.scheme is not None]

    @cached_property
    def converted(self) -> list[Step]:
        """What is converted exactly, as its source holds integers: of runs without data."""
        with_data = statistics(self.recipe) or self.recipe.smooth is not None
        return [] if with_data else [step for step in self.quantized if step.is_exact]

    @cached_property
    def outputs(self) -> list[TensorInfo]:
        return [info for step in self.steps for info in step.outputs]

    @property
    def sources(self) -> dict[str, TensorInfo]:
        """What is read of the source, by name."""
        return {step.source.name: step.source for step in self.steps}

    @property
    def fallbacks(self) -> list[Step]:
        """Quantized with another group size than asked, because theirs does not divide in_features."""
        asked = ((step, self.recipe.asked_for(*step.site.names, **step.site.part)) for step in self.quantized)
        return [step for step, scheme in asked if step.scheme.group_size != scheme.group_size]

    @property
    def dense(self) -> "Plan":
        """The same with nothing quantized."""
        return replace(self, steps=tuple(_copy(step.source) for step in self.steps))

    @property
    def total_parameters(self) -> int:
        return sum(step.source.numel for step in self.steps)

    @property
    def source_bytes(self) -> int:
        return sum(step.source.stored_bytes for step in self.steps)

    @property
    def output_bytes(self) -> int:
        return sum(info.nbytes for info in self.outputs)

    @property
    def quantized_share(self) -> float:
        """Part of the source's bytes that is quantized."""
        return sum(s.source.stored_bytes for s in self.quantized) / max(self.source_bytes, 1)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight that is quantized: codes, scales and zeros."""
        stored = sum(info.nbytes for step in self.quantized for info in step.outputs)
        return 8 * stored / max(sum(step.source.numel for step in self.quantized), 1)


def make_plan(reader: CheckpointReader, model, recipe: Recipe, format_name: str) -> Plan:
    """Plan the quantization of the checkpoint behind `reader`; `model` is its skeleton on the meta device.

    Raises InputError when the checkpoint is quantized already or nothing in it would be quantized.
    """
    stored = reader.quantization_config
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise InputError(f"{reader.folder} is quantized already ({method}): quantize the original model instead")
    fmt = get_format(format_name)
    if recipe.embeddings is not None and not fmt.EMBEDDINGS:
        raise UsageError(
            f"{format_name} has no quantized embeddings: leave --embeddings out, or write --format compressed-tensors"
        )
    chosen, left = choose(model, recipe)
    checkpoint_names = CheckpointNames(model)
    steps, fulfilled, elsewhere = [], {}, set()
    nobodys = unclaimed(model, checkpoint_names, reader.tensors.values())
    unknown = set(judge(reader, [name for name, for_others in nobodys.items() if not for_others])[1])
    left_out = _taken(unknown, fmt)
    if recipe.unclaimed == "drop":
        left_out |= dict.fromkeys({name for name, for_others in nobodys.items() if for_others} | unknown, "dropped")
    for info in as_loaded(reader.tensors, checkpoint_names, chosen).values():
        if info.name in left_out:
            continue
        parameter, direct = checkpoint_names.locate(info.name)
        step = _copy(info)
        if parameter in chosen:
            site, scheme = chosen[parameter]
            step = Step(info, (), site, scheme, transposed_on_load=checkpoint_names.transposes(info.name, info.shape))
            step = _quantize(step, direct, fmt, recipe.scheme)
        elif parameter in left:
            step = _copy(info, *left[parameter])
        elif len(info.shape) == 2 and parameter.endswith(".weight"):
            elsewhere.update(name.removesuffix(".weight") for name in (parameter, info.name))
        if step.site is not None:
            names = [parameter] if direct else checkpoint_names.computed(info.name)
            fulfilled.update(dict.fromkeys(names, step))
        steps.append(step)
    _check_complete(reader, chosen, fulfilled)
    if recipe.unclaimed == "quantize":
        steps = list(_like_others(steps, nobodys, fmt, recipe.scheme))
    of_others = {step.base: step.scheme for step in steps if step.scheme is not None and step.source.name in nobodys}
    # a tied head is left alone and not stored, and still has to be named
    named = [(site, None, None) for site, _ in left.values()]
    named += [(s.site, s.base, s.scheme) for s in steps if s.site is not None and s.base not in of_others]
    # and all that a tensor becomes which is split while loading
    named += [(chosen[name][0], None, step.scheme) for name, step in fulfilled.items() if name in chosen]
    exceptions, ignored = exceptions_and_ignored(model, named, elsewhere - of_others.keys(), recipe.scheme)
    exceptions |= {base: scheme for base, scheme in of_others.items() if scheme != recipe.scheme}
    config = fmt.config(recipe.scheme, exceptions, ignored)
    left_out |= dict.fromkeys(reader.left_out, "left out: transformers has no name for it")
    said = _said(steps, nobodys, left_out)
    return Plan(recipe, format_name, tuple(steps), config, left, frozenset(unknown), said)


def _taken(names: Iterable[str], fmt: ModuleType) -> dict[str, str]:
    """Those names of tensors that only quantized weights may have: readers would look for the rest of one."""
    suffixes = tuple(f".{suffix}" for suffix in fmt.SUFFIXES if suffix != "weight")
    return {
        name: f"left out: {fmt.METHOD} takes it for a part of a weight" for name in names if name.endswith(suffixes)
    }


def _like_others(steps: list[Step], nobodys: dict[str, bool], fmt: ModuleType, default: Scheme) -> Iterator[Step]:
    """The steps, with those of linears for other programs quantized as the ones of the same name in other layers."""
    others = {_in_layer(step.source.name): step for step in steps if step.scheme is not None}
    for step in steps:
        info = step.source
        like = others.get(_in_layer(info.name)) if nobodys.get(info.name) else None
        if like is None or len(like.source.shape) != len(info.shape):
            yield step
            continue
        rows, columns = reversed(info.shape[-2:]) if like.transposed else info.shape[-2:]
        kind, experts = ("experts", info.shape[0]) if len(info.shape) == 3 else ("linear", 0)
        site = Site(info.name, kind, rows, columns, like.transposed, experts)
        yield _quantize(Step(info, (), site, like.scheme.fitted(columns)), True, fmt, default)


def _in_layer(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `mlp.up_proj.weight`; names outside of layers stay what they are."""
    return re.sub(r"^.*\blayers\.\d+\.", "", name)


def _said(steps: list[Step], nobodys: dict[str, bool], left_out: dict[str, str]) -> dict[str, str]:
    """What becomes of each tensor that no module has."""
    done = {step.source.name: step.scheme for step in steps}
    schemes = {name: done[name] for name in nobodys.keys() - left_out.keys()}
    said = {name: f"quantized: {scheme.name}" if scheme else "copied" for name, scheme in schemes.items()}
    return dict(sorted((said | left_out).items()))


def _copy(info: TensorInfo, site: Site | None = None, reason: str = "") -> Step:
    return Step(info, (TensorInfo(info.name, info.dtype, info.shape),), site, None, reason)


def _quantize(step: Step, direct: bool, fmt: ModuleType, default: Scheme) -> Step:
    """A step without outputs, with those that quantizing gives, or the copy that it has to be."""
    info = step.source
    reason = _cannot(step, direct)
    if reason is None:
        out_features, in_features = reversed(info.shape[-2:]) if step.transposed else info.shape[-2:]
        reason = fmt.refuse(step.scheme, (out_features, in_features), default)
    if reason is None and len(info.shape) == 3 and not fmt.FUSED_EXPERTS:
        reason = f"its experts are stored as one tensor, which {fmt.METHOD} cannot hold"
    if reason:
        return _copy(info, step.site, reason)
    packed = fmt.pack(QuantWeight.meta(out_features, in_features, step.scheme, info.dtype))
    lead = info.shape[:-2]
    outputs = tuple(
        TensorInfo(output_name(info.name, suffix), tensor.dtype, (*lead, *tensor.shape))
        for suffix, tensor in packed.items()
    )
    return replace(step, outputs=outputs)


def _cannot(step: Step, direct: bool) -> str | None:
    info, site = step.source, step.site
    if info.dtype not in _SOURCE_DTYPES:
        return f"stored as {info.dtype}, expected bfloat16, float16 or float32"
    if not direct:
        return "computed from while loading"
    stored = (site.in_features, site.out_features) if step.transposed else (site.out_features, site.in_features)
    if info.shape[-2:] == stored and len(info.shape) == (3 if site.kind == "experts" else 2):
        return None
    # one expert of a fused parameter; gate and up are halves of it
    if site.kind == "experts" and len(info.shape) == 2 and not step.transposed and info.shape[1] == site.in_features:
        return None
    raise InputError(
        f"{info.name} has shape {list(info.shape)}, the model's config says {list(stored)}: they do not belong together"
    )


def _check_complete(reader: CheckpointReader, chosen: dict, fulfilled: dict) -> None:
    missing = [name for name in chosen if name not in fulfilled]
    if missing:
        raise InputError(
            f"{missing[0]} is not in {reader.folder}"
            + (f" (nor are {len(missing) - 1} more)" if len(missing) > 1 else "")
            + ": the checkpoint does not belong to its config, or a shard is missing from the index"
        )
    if not any(step.scheme for step in fulfilled.values()):
        reasons = Counter(step.reason for step in fulfilled.values() if step.site.parameter in chosen)
        reason = reasons.most_common(1)[0][0] if reasons else "no linear layer is left (check --ignore)"
        raise InputError(f"nothing to quantize in {reader.folder}: {reason}")
