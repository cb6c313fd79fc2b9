"""What quantizing a model would give and take, before any weight is read: from its config and its headers."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lowbit.checkpoint.writer import file_bytes, parse_size
from lowbit.discovery import find_sites, skeleton
from lowbit.folders.dense import as_dense
from lowbit.folders.locate import open_headers, resolve
from lowbit.options import (
    DataOptions,
    HeadOption,
    RecipeOptions,
    SourceOptions,
    TargetOptions,
    keywords,
    takes_options,
)
from lowbit.quantization.allocation.allocate import Wanted, allocate, budget_of
from lowbit.quantization.allocation.engines import check_engine
from lowbit.quantization.calibrated.options import Calibration, require_data_method
from lowbit.quantization.calibrated.reporting import Announce, silent
from lowbit.quantization.forecast import forecast
from lowbit.quantization.opened import opened
from lowbit.quantization.plan import Plan, make_plan
from lowbit.quantization.recipe import make_recipe
from lowbit.quantization.running import running
from lowbit.serving import Verdict, fused_units, modules_of, verdicts


@dataclass(frozen=True)
class Preview:
    """output_bytes: of all tensors that will be written, as in the report of the run; file_bytes: of the weight files,
    headers and all. Both are exact. bits_per_weight: of the quantized weights, with scales and zeros.

    modules: {"name", "scheme", "shape" [out_features, in_features], "bytes"} of what will be quantized. converted: how
    many of them are integers already, which their schemes hold: they are not rounded again. unclaimed: tensors that
    no module of the model has -> what becomes of them. fallbacks: name -> scheme,
    where the group that was asked for does not divide in_features. skipped: name -> why it stays as it is.
    peak_ram_bytes, disk_bytes, seconds: of the run, on this machine; seconds are good to a factor of two.
    engines: which take the result, on how many GPUs: `lowbit.serving.Verdict`. allocation: how schemes were chosen for
    a budget, None without one. memory: bytes that running takes, where --fit or --context asks for it: "peak", which is
    "weights", "cache" and "working", and "context", "batch", "kv_cache" that it is of.
    """

    source: str
    format: str
    source_bytes: int
    output_bytes: int
    file_bytes: int
    parameters: int
    bits_per_weight: float
    quantized_share: float
    peak_ram_bytes: int
    disk_bytes: int
    seconds: float
    modules: list[dict]
    converted: int
    unclaimed: dict[str, str]
    fallbacks: dict[str, str]
    skipped: dict[str, str]
    engines: list[dict]
    allocation: dict | None = None
    memory: dict | None = None

    def to_dict(self) -> dict:
        return asdict(self)


@takes_options
def plan(
    model: str | Path,
    *,
    recipe: RecipeOptions,
    head: HeadOption,
    samples: DataOptions,
    files: TargetOptions,
    source: SourceOptions,
    announce: Announce | None = None,
) -> Preview:
    """What `lowbit.quantize` with these arguments would write and need.

    With a budget, schemes are chosen as `lowbit.quantize` chooses them, which takes the weights and the data set.

    Args:
        model: A folder, a GGUF file, a Hub id, or "reference". A model on the Hub is not downloaded, but for a budget.
        announce: Told what goes on while schemes are chosen.

    Returns:
        Sizes, schemes, memory, time, and the engines that take the result.

    Raises:
        UsageError, InputError: Where `lowbit.quantize` would raise them before it reads a weight.
    """
    asked = make_recipe(recipe, head)
    check_engine(recipe.engine, files.format)
    if not recipe.budgets:
        require_data_method(asked, samples)
    shard_bytes = parse_size(files.max_shard_size)
    place = resolve(model, source.revision) if recipe.budgets else model
    stored, config = open_headers(place, source.revision, source.trust_remote_code)
    headers = as_dense(stored, source.trust_remote_code)
    start, allocated = opened(headers, config, asked, source.trust_remote_code), None
    if recipe.budgets:
        budget = budget_of(recipe, start, files, source.trust_remote_code)
        wanted = Wanted(budget, files.format, shard_bytes, recipe.engine)
        data = Calibration(**keywords(samples), trust_remote_code=source.trust_remote_code)
        allocated = allocate(start, wanted, data, announce or silent)
        start = replace(start, recipe=allocated.recipe)
    planned = make_plan(start.reader, start.model, start.recipe, files.format)
    memory = None
    if files.asked or recipe.fit is not None:
        memory = running(start, files, recipe.engine, source.trust_remote_code).memory(planned)
    size = file_bytes(planned.outputs, shard_bytes)
    # engines are asked about a model that can run without numbers
    runnable = skeleton(start.config, source.trust_remote_code, dtype=torch.bfloat16)
    ahead = forecast(planned, runnable, size, samples.num_samples, samples.seqlen)
    return Preview(
        source=str(model),
        format=files.format,
        source_bytes=planned.source_bytes,
        output_bytes=planned.output_bytes,
        file_bytes=size,
        parameters=planned.total_parameters,
        bits_per_weight=planned.bits_per_weight,
        quantized_share=planned.quantized_share,
        peak_ram_bytes=ahead.peak_ram_bytes,
        disk_bytes=ahead.disk_bytes,
        seconds=ahead.seconds,
        modules=[_module(step) for step in planned.quantized],
        converted=len(planned.converted),
        unclaimed=planned.unclaimed,
        fallbacks={step.source.name: step.scheme.name for step in planned.fallbacks},
        skipped={step.source.name: step.reason for step in planned.steps if step.site and not step.scheme}
        | {name: done for name, done in planned.unclaimed.items() if done.startswith("left out")},
        engines=[_engine(verdict) for verdict in _verdicts(planned, runnable)],
        allocation=allocated and allocated.facts,
        memory=memory,
    )


def _module(step) -> dict:
    *experts, rows, columns = step.source.shape
    shape = [*experts, columns, rows] if step.transposed else [*experts, rows, columns]
    stored = sum(info.nbytes for info in step.outputs)
    return {"name": step.base, "scheme": step.scheme.name, "shape": shape, "bytes": stored}


def _verdicts(planned: Plan, model) -> list[Verdict]:
    ours = [step for step in planned.quantized if step.source.name not in planned.unclaimed]
    chosen = {step.site.parameter: (step.site, step.scheme) for step in ours}
    left = [site.module for site, _ in planned.left.values()]
    left += [step.site.module for step in planned.steps if step.site is not None and step.scheme is None]
    dtypes = {step.source.dtype for step in planned.quantized}
    dtype = str(max(dtypes, key=lambda found: found.itemsize)).removeprefix("torch.")
    return verdicts(planned.format_name, modules_of(model, chosen), left, fused_units(model, find_sites(model)), dtype)


def _engine(verdict: Verdict) -> dict:
    needed = None if verdict.capability is None else "{}.{}".format(*verdict.capability)
    return {
        "engine": verdict.engine,
        "version": verdict.version,
        "ok": verdict.ok,
        "reason": verdict.reason,
        "tensor_parallel": {str(size): reason for size, reason in verdict.tensor_parallel.items()},
        "kernels": dict(verdict.kernels),
        "compute_capability": needed,
        "run_by_us": verdict.run,
        "note": verdict.note,
    }
