"""Quantizing a checkpoint: plan it, quantize it with data or without, write it."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.report_file import save_report
from lowbit.checkpoint.writer import StagedFolder, parse_size
from lowbit.discovery import skeleton
from lowbit.errors import UsageError
from lowbit.folders.locate import check_apart, load_config, recorded_name, resolve
from lowbit.numerics.dtypes import is_dtype
from lowbit.numerics.scheme import ACTIVATION_RANGES, HEAD_SCHEME, Recipe, Scheme
from lowbit.quantization.calibrated.job import clear_finished
from lowbit.quantization.calibrated.options import Calibration, needs_data, require_data_method
from lowbit.quantization.calibrated.ranks import Ranks
from lowbit.quantization.calibrated.reporting import Reporting, silent
from lowbit.quantization.calibrated.run import calibrate
from lowbit.quantization.plan import Plan, make_plan
from lowbit.quantization.report import Report
from lowbit.quantization.write import Progress, write_checkpoint
from lowbit.quantizers import checked_options
from lowbit.system.memory import peak_memory
from lowbit.verification.checks import check_structure

logger = logging.getLogger("lowbit")


def quantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    scheme: str | Scheme = "W4A16",
    group_size: int | None = None,
    sym: bool | None = None,
    method: str = "rtn",
    options: dict | None = None,
    overrides: Mapping[str, str | Scheme] | Iterable[tuple[str, str | Scheme]] = (),
    ignore: Iterable[str] = (),
    lm_head: bool | str | Scheme | None = False,
    include_vision: bool = False,
    smooth: float | str | None = None,
    activation_range: str | None = None,
    dataset=None,
    num_samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    redo: str | None = None,
    max_memory: str | int | None = None,
    format: str = "compressed-tensors",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    command: str | None = None,
    on_plan: Callable[[Plan], Progress | None] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Report:
    """Quantize a checkpoint into `output_dir`, a folder that transformers, vLLM and lowbit load.

    model: a folder, a Hub id, or "reference" (the embedded model). scheme: a Scheme or a name such as "W4A16";
    group_size and sym override what the scheme says. overrides: (pattern, scheme) for the modules it names, or a
    dict of them.
    ignore: patterns of modules to leave alone. A pattern is a regex from the start of their names, or words of them
    ("down_proj", "mlp"), and an error where it changes nothing. Routers are always left alone, the output embedding
    unless lm_head (its scheme, or True for W8A16-G128), and what a model sees, hears or projects with unless
    include_vision. smooth: scale the inputs of linears for smaller errors, and fold the scales into what is before
    them; a SmoothQuant alpha from 0 to 1, or "auto", which searches it by module. activation_range: how schemes with
    static activations find the range of a linear's inputs in the calibration: "mse" (default), "minmax" or
    "percentile".
    dry_run: plan and report, write nothing. command: the shell command that this is, for the report. on_plan: called
    with the Plan, may return a progress callback. announce: called with lines a user should read.

    Methods and schemes that need data ("gptq", "W8A8-STATIC"), and all of them with smooth, go through the model layer
    by layer with the calibration samples: dataset (a name of `datasets`, a file, "self", or token ids [samples,
    seqlen]), num_samples, seqlen, seed. What they have finished is kept beside the output until it is whole: the same
    call again after a kill goes on from there. redo: regex of modules whose layers, and all that depend on them, are
    done again. max_memory: bytes, or "8GB", that activations held between the steps of a layer must fit into with all
    else; default half of what is free. Under `torchrun` all processes call this, share the work, and get the report;
    the first one writes.

    Raises UsageError (options that cannot work), InputError (the checkpoint), OutputError (the output folder).
    """
    recipe = make_recipe(
        scheme, group_size, sym, method, options, overrides, ignore, lm_head, include_vision, smooth, activation_range
    )
    require_data_method(
        recipe, dataset=dataset, num_samples=num_samples, seqlen=seqlen, seed=seed, redo=redo, max_memory=max_memory
    )
    memory = None if max_memory is None else parse_size(max_memory)
    calibration = Calibration(dataset, num_samples, seqlen, seed, redo, memory, trust_remote_code)
    shard_bytes = parse_size(max_shard_size)
    started = time.perf_counter()
    source = resolve(model, revision)
    target = Path(os.path.abspath(output_dir))
    check_apart(source, target)
    reader = CheckpointReader(source)
    config = load_config(source, trust_remote_code)
    built = skeleton(config, trust_remote_code, tensors=reader.tensors.values())
    plan = make_plan(reader, built, recipe, format)
    reader = reader.with_tensors(plan.sources)
    for name, reason in list(plan.unknown.items())[:1]:
        more = f" (and {len(plan.unknown) - 1} more such tensors)" if len(plan.unknown) > 1 else ""
        logger.warning("%s of %s is left out%s: %s", name, source, more, reason)
    report = Report.of(plan, recorded_name(model), source, command)
    if dry_run:
        if on_plan:
            on_plan(plan)
        return report
    ranks, job = Ranks(), None
    try:
        if ranks.first:
            clear_finished(target)
        with StagedFolder(target, overwrite) if ranks.first else nullcontext() as staged:
            progress = on_plan(plan) if on_plan and ranks.first else None
            if needs_data(plan.recipe):
                reporting = Reporting(report, progress or silent, announce if ranks.first else silent)
                job = calibrate(reader, config, plan, target, overwrite, calibration, ranks, reporting)
            if ranks.first:
                write_checkpoint(reader, plan, staged, shard_bytes, report, progress, job.made if job else _nothing)
            report.seconds += time.perf_counter() - started
            report.peak_memory = max(report.peak_memory, peak_memory())
            if ranks.first:
                save_report(staged.path, report.to_dict())
                check_structure(staged.path, trust_remote_code)
                if job is not None:
                    job.about_to_move(staged.path)
                staged.commit()
        ranks.wait()  # the first one has read all that the job holds
        if job is not None and ranks.first:
            job.finish()
        ranks.wait()
    finally:
        if job is not None:
            job.close()
        ranks.close()
    return report


def _nothing(step) -> None:
    return None


def make_recipe(
    scheme, group_size, sym, method, options, overrides=(), ignore=(), lm_head=False, include_vision=False, smooth=None,
    activation_range=None,
) -> Recipe:  # fmt: skip
    """A Recipe from what a user types; raises UsageError for anything that is not allowed."""
    if is_dtype(scheme):
        raise UsageError(f"{scheme} is a dtype, which nothing is quantized to: lowbit.convert_dtype converts to it")
    base = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    asked = {"group_size": group_size, "sym": sym}
    base = replace(base, **{field: value for field, value in asked.items() if value is not None})
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    head = Scheme.parse(lm_head) if isinstance(lm_head, str) else {True: HEAD_SCHEME, False: None}.get(lm_head, lm_head)
    options, ranges = checked_options(method, options or {}), activation_range or ACTIVATION_RANGES[0]
    recipe = Recipe(base, method, options, overrides, ignore, head, include_vision, smooth, ranges)
    if activation_range is not None and not recipe.is_static:
        raise UsageError(f"activation_range is of static schemes, such as W8A8-STATIC, not of {base.name}")
    return recipe
