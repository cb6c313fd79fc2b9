"""Quantizing a checkpoint: plan it, quantize it with data or without, write it."""

import logging
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.report_file import save_report
from lowbit.checkpoint.writer import StagedFolder, parse_size
from lowbit.errors import UsageError
from lowbit.folders.dense import as_dense
from lowbit.folders.locate import check_apart, load_config, recorded_name, resolve
from lowbit.numerics.scheme import Recipe
from lowbit.options import (
    CalibrationOptions,
    FileOptions,
    HeadOption,
    RecipeOptions,
    RunOptions,
    SourceOptions,
    TargetOptions,
    keywords,
    takes_options,
)
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.allocation.allocate import Wanted, allocate, budget_of
from lowbit.quantization.allocation.engines import check_engine
from lowbit.quantization.calibrated.job import clear_finished
from lowbit.quantization.calibrated.options import Calibration, needs_data, require_data_method
from lowbit.quantization.calibrated.reporting import Reporting, silent
from lowbit.quantization.calibrated.run import calibrate
from lowbit.quantization.opened import opened
from lowbit.quantization.plan import Plan, make_plan
from lowbit.quantization.recipe import make_recipe
from lowbit.quantization.report import Report
from lowbit.quantization.write import write_checkpoint
from lowbit.system.memory import peak_memory
from lowbit.verification.checks import check_structure

logger = logging.getLogger("lowbit")


@takes_options
def quantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    recipe: RecipeOptions,
    head: HeadOption,
    calibration: CalibrationOptions,
    files: TargetOptions,
    source: SourceOptions,
    run: RunOptions,
) -> Report:
    """Quantize a checkpoint into `output_dir`, a folder that transformers, vLLM and lowbit load.

    A pattern of ignore or overrides that changes nothing is an error. Routers are always left alone, the output
    embedding unless lm_head, and what a model sees, hears or projects with unless include_vision.

    An input embedding is rounded to nearest, whatever the method.

    Methods and schemes that need data ("gptq", "W8A8-STATIC"), and all of them with smooth, go through the model layer
    by layer with the calibration samples; dataset may be token ids too, a tensor [samples, seqlen]. What they have
    finished is kept beside the output until it is whole: the same call again after a kill goes on from there. Under
    `torchrun` all processes call this, share the work, and get the report; the first one writes.

    Args:
        model: A folder, a GGUF file, a Hub id, or "reference" (the embedded model).
        output_dir: The folder to write, which appears whole or not at all.

    Returns:
        What was done, as `lowbit_report.json` in the folder holds it.

    Raises:
        UsageError: Options that do not exist or cannot work.
        InputError: The checkpoint is damaged, or of no model that can be quantized.
        OutputError: The output folder cannot be written.
    """
    asked = make_recipe(recipe, head)
    if files.asked and recipe.fit is None:
        raise UsageError(f"{files.asked[0]} says what is to fit: pass --fit 24GB too, or see `lowbit plan`")
    check_engine(recipe.engine, files.format)
    data = checked_calibration(asked, calibration, source.trust_remote_code, bool(recipe.budgets))
    shard_bytes = parse_size(files.max_shard_size)  # what cannot be done is said before the model is opened
    folder, target = resolve(model, source.revision), Path(os.path.abspath(output_dir))
    check_apart(folder, target)
    dense = read_dense(folder, source.trust_remote_code), load_config(folder, source.trust_remote_code)
    if recipe.budgets:
        start = opened(*dense, asked, source.trust_remote_code)
        budget = budget_of(recipe, start, files, source.trust_remote_code)
        wanted = Wanted(budget, files.format, shard_bytes, recipe.engine)
        ranks = Ranks()  # one process measures, for all
        try:
            allocated = ranks.of_first(lambda: allocate(start, wanted, data, run.announce or silent))
            facts = {"allocation": allocated.facts}
            return quantize_dense(
                recorded_name(model), *dense, target, allocated.recipe, data, files, run, **facts
            )  # fmt: skip
        finally:
            ranks.close()
    return quantize_dense(recorded_name(model), *dense, target, asked, data, files, run)


def checked_calibration(
    recipe: Recipe, asked: CalibrationOptions, trust_remote_code: bool, for_budget: bool = False
) -> Calibration:
    """What a recipe is calibrated with, or what its schemes are chosen on for a budget. Raises UsageError."""
    if not for_budget:
        require_data_method(recipe, asked)
    memory = None if asked.max_memory is None else parse_size(asked.max_memory)
    return Calibration(**{**keywords(asked), "max_memory": memory}, trust_remote_code=trust_remote_code)


def quantize_dense(
    name: str, reader: CheckpointReader, config, target: Path, recipe: Recipe, data: Calibration, files: FileOptions,
    run: RunOptions, **facts,
) -> Report:  # fmt: skip  # many parameters: the model by two, the output by two, what is done by the others
    """Quantize a checkpoint of plain weights.

    Args:
        name: What the report calls it.
        reader, config: The checkpoint, and the transformers config of its model.
        target: The folder to write.
        recipe, data: How, and what it is calibrated with.
        files, run: As of `quantize`.
        **facts: Further fields of the report.

    Returns, Raises:
        As `quantize`.
    """
    started = time.perf_counter()
    start = opened(reader, config, recipe, data.trust_remote_code)
    plan = make_plan(start.reader, start.model, start.recipe, files.format)
    for tensor in sorted(plan.unknown)[:1]:
        more = f" (and {len(plan.unknown) - 1} more such tensors)" if len(plan.unknown) > 1 else ""
        done = plan.unclaimed[tensor]
        logger.warning("%s of %s%s is unknown to the model: %s", tensor, reader.folder, more, done)
    if plan.converted:
        logger.warning(
            "%d of %d weights are integers that their schemes hold: they are converted exactly, not rounded again",
            len(plan.converted), len(plan.quantized),
        )  # fmt: skip
    report = replace(Report.of(plan, name, reader.folder, run.command), **facts)
    if run.dry_run:
        if run.on_plan:
            run.on_plan(plan)
        return report
    report.seconds = time.perf_counter() - started
    shard_bytes = parse_size(files.max_shard_size)
    reader = start.reader.with_tensors(plan.sources)
    _write(reader, start.config, plan, target, shard_bytes, data, run, report)
    return report


def read_dense(folder: Path, trust_remote_code: bool) -> CheckpointReader:
    """The checkpoint in a folder as one of plain weights, with a WARNING where they are not what was trained."""
    stored = CheckpointReader(folder)
    dense = as_dense(stored, trust_remote_code)
    if dense is not stored or any(info.is_encoded for info in stored.tensors.values()):
        logger.warning("%s is quantized already (%s): the error of that stays", stored.place, stored.method)
    return dense


def _write(
    reader: CheckpointReader, config, plan: Plan, target: Path, shard_bytes: int, data: Calibration, run: RunOptions,
    report: Report,
) -> None:  # fmt: skip
    """Quantize what is planned, with data or without, into a folder that takes its place when it is whole."""
    started, ranks, job = time.perf_counter(), Ranks(), None
    try:
        if ranks.first:
            clear_finished(target)
        with StagedFolder(target, run.overwrite) if ranks.first else nullcontext() as staged:
            progress = run.on_plan(plan) if run.on_plan and ranks.first else None
            if needs_data(plan.recipe):
                tell = run.announce if run.announce and ranks.first else silent
                reporting = Reporting(report, progress or silent, tell)
                job = calibrate(reader, config, plan, target, run.overwrite, data, ranks, reporting)
            if ranks.first:
                write_checkpoint(reader, plan, staged, shard_bytes, report, progress, job.made if job else _nothing)
            report.seconds += time.perf_counter() - started
            report.peak_memory = max(report.peak_memory, peak_memory())
            if ranks.first:
                save_report(staged.path, report.to_dict())
                check_structure(staged.path, data.trust_remote_code)
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


def _nothing(_: object) -> None:
    return None
