"""lowbit quantize"""

import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from lowbit.cli.commands.plan import PlanOptions, preview_any, show_allocation, show_unclaimed
from lowbit.cli.common import (
    HeadFlags,
    JsonOption,
    ModelArgument,
    ModelOption,
    OutputOption,
    check_known,
    heavy_imports,
    one_model,
    one_output,
    size,
)
from lowbit.cli.dtype import convert_to_dtype, only_converts
from lowbit.cli.ending import ignore_signals, interrupted_once
from lowbit.cli.options import flag
from lowbit.cli.terminal import console, notes, print_json, progress, show_names, table
from lowbit.conversion.options import DtypeOptions
from lowbit.options import (
    CalibrationOptions,
    DataOptions,
    RecipeOptions,
    RunOptions,
    SourceOptions,
    TargetOptions,
    keywords,
)

ClampOption = flag(DtypeOptions, "clamp")


def quantize(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    output_dir: OutputOption = None,
    *,
    recipe: RecipeOptions,
    head: HeadFlags,
    calibration: CalibrationOptions,
    files: TargetOptions,
    clamp: ClampOption = False,
    source: SourceOptions,
    run: RunOptions,
    json: JsonOption = False,
):
    """Quantize a model into a folder that transformers and vLLM load.

    Reads and writes tensor by tensor, with gptq layer by layer: a model may be larger than memory. The folder appears
    whole or not at all; a gptq run that was stopped goes on where it was when the same command is given again.
    """
    model = one_model(model, model_option)
    check_known(format=files.format, method=recipe.method)
    lm_head = head.scheme()
    target = None if run.dry_run else one_output(output_dir, run.overwrite)
    half = only_converts(recipe.base, recipe, head, calibration, files, clamp=clamp)
    if run.dry_run:
        samples = DataOptions(**{each.name: getattr(calibration, each.name) for each in fields(DataOptions)})
        preview_any(model, PlanOptions(recipe, head, samples, files, source), json)
        if not json:
            console.print("dry run: nothing was written")
        return
    if half:
        with interrupted_once():
            convert_to_dtype(
                model, target, recipe.base, json, clamp=clamp, overwrite=run.overwrite, command=typed_command(),
                max_shard_size=files.max_shard_size, revision=source.revision,
            )  # fmt: skip
        return
    options = {**keywords(recipe, calibration, files, source), "lm_head": lm_head, "overwrite": run.overwrite}
    report = _run(model, target, json, options)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes: the first one speaks
    if json:
        print_json(report.to_dict())
    else:
        _show(report, output_dir)


def _run(model: str, target: Path, json: bool, options: dict):
    """The report of `lowbit.quantize`. A signal that comes when the output is in place already is too late."""
    with heavy_imports():
        from lowbit.quantization.run import quantize as run

    before = _place(target)
    try:
        with interrupted_once(), ExitStack() as stack:

            def on_plan(plan):
                total = sum(step.source.nbytes for step in plan.steps)
                advance = stack.enter_context(progress("quantizing", total, quiet=json))
                return lambda step, note: advance(step.source.nbytes, note or step.source.name)

            report = run(model, target, **options, command=typed_command(), on_plan=on_plan, announce=notes.print)
            ignore_signals()
            return report
    except (KeyboardInterrupt, SystemExit):
        if _place(target) in (None, before):
            raise
    from lowbit.checkpoint.report_file import load_report
    from lowbit.quantization.calibrated.job import clear_finished
    from lowbit.quantization.report import Report

    clear_finished(target)
    return Report(**load_report(target))


def _place(folder: Path) -> tuple[int, int] | None:
    """Which folder is at a path: one that replaces it is another one."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def typed_command() -> str:
    """What was typed, to be typed again."""
    processes = os.environ.get("WORLD_SIZE", "1")
    program = ["lowbit"] if processes == "1" else ["torchrun", "--nproc-per-node", processes, "-m", "lowbit"]
    return shlex.join([*program, *sys.argv[1:]])


def _show(report, output_dir: Path) -> None:
    rows = table("", "before", "after")
    rows.add_row("weights", size(report.source_bytes), size(report.output_bytes))
    rows.add_row("bits per quantized weight", "", f"{report.bits_per_weight:.2f}")
    console.print(rows)
    console.print(
        f"{report.quantized_tensors} weight tensors quantized, {report.quantized_share:.1%} of the bytes; "
        f"{_error(report)}; {report.seconds:.1f} s"
    )
    if report.converted:
        console.print(f"{report.converted} of them converted exactly: the integers of the source, not rounded again")
    if report.allocation:
        show_allocation(report.allocation)
    if report.calibration:
        _show_calibration(report)
    show_names("other group size, because theirs does not divide in_features:", report.fallbacks)
    show_names("left alone:", report.left_alone)
    show_unclaimed(report.unclaimed)
    console.print(f"written to {output_dir}")


def _error(report) -> str:
    if report.calibration:
        return f"mean relative error of rounding, in outputs, {report.mean_rounding_error:.4f}"
    return f"mean relative error {report.mean_error:.4f}"


def _show_calibration(report) -> None:
    used = report.calibration
    console.print(
        f"calibrated with {used['samples']} samples, {used['tokens']:,} tokens: {used['source']}; "
        f"peak memory {size(report.peak_memory)}"
    )
    smoothed = [entry for layer in report.decoder_layers for entry in layer.get("smoothing", ())]
    if smoothed:
        scaled = sum(entry.get("alpha") is not None for entry in smoothed)
        console.print(f"inputs scaled in front of {scaled} of {len(smoothed)} groups of linears")
    worst = table("largest errors of rounding", "scheme", "tokens", "error", "to the original", title=None)
    for layer in report.worst(5):
        worst.add_row(
            layer["name"].removesuffix(".weight"), layer["scheme"], f"{layer['tokens']:,}",
            f"{layer['rounding_error']:.4f}", _digits(layer["output_error_to_original"]),
        )  # fmt: skip
    console.print(worst)
    for layer in report.layers:
        if layer.get("note"):
            expert = f" expert {layer['expert']}" if "expert" in layer else ""
            console.print(f"  {layer['name']}{expert}: {layer['note']}")


def _digits(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"
