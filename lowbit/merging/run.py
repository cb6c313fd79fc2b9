"""Merging an adapter of PEFT into a model folder, dense or quantized, tensor by tensor."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.report_file import load_report, save_report
from lowbit.checkpoint.writer import parse_size
from lowbit.conversion.rewrite import OnStart
from lowbit.errors import InputError, UsageError
from lowbit.folders.locate import check_apart, recorded_name, resolve, revision_of
from lowbit.folders.quantized import QuantizedFolder
from lowbit.formats import get_format, is_format
from lowbit.merging.adapter import require_peft
from lowbit.merging.anew import recipe_of, write_anew
from lowbit.merging.compare import compared
from lowbit.merging.source import merged_source
from lowbit.merging.task import Merge, MergeReport, Task
from lowbit.merging.write import METHOD, write_dense, write_on_grids
from lowbit.numerics.scheme import is_dtype
from lowbit.options import (
    CalibrationOptions,
    ComparisonOptions,
    MergeOptions,
    OutputOptions,
    SourceOptions,
    changed,
    takes_options,
)
from lowbit.system.machine import now


@takes_options
def merge(
    model: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    how: MergeOptions,
    calibration: CalibrationOptions,
    comparison: ComparisonOptions,
    output: OutputOptions,
    source: SourceOptions,
    on_start: OnStart | None = None,
    announce: Callable[[str], None] | None = None,
    command: str | None = None,
) -> Merge:  # many parameters: half of them are groups of options
    """Merge a LoRA adapter of PEFT into a model.

    PEFT does the arithmetic (rsLoRA, DoRA, ranks and scales by pattern, modules_to_save, adapters of experts), in
    float32 and a tensor at a time: the model may be larger than memory. What the adapter does not change keeps every
    bit, unless a scheme or a method is asked for.

    Args:
        model: A folder, a Hub id, or "reference"; dense, or quantized.
        adapter: The folder or Hub id of the adapter.
        output_dir: The folder to write, which appears whole or not at all.
        on_start: Called with the number of tensors, may return what is called with the name of each that is done.
        announce: Called with lines that a user should read.
        command: The shell command that this is, for the report.

    Returns:
        What was done, and how far the result is from the model with the adapter beside it.

    Raises:
        UsageError: Options that do not exist or cannot work; PEFT is not installed.
        InputError: The adapter is not of this model, is damaged, or is none that can be merged.
        OutputError: The folder cannot be written.
    """
    require_peft()
    started = time.perf_counter()
    _check(how, calibration, output)
    folder, beside, target = resolve(model, source.revision), resolve(adapter), Path(os.path.abspath(output_dir))
    for read in (folder, beside):
        check_apart(read, target)
    stored = _stored(folder, how, source.trust_remote_code)
    if not how.in_place:
        recipe_of(how, stored)  # what cannot be asked for is said before anything is read
    merged = merged_source(folder, beside, source.trust_remote_code)
    tensors = merged.reader.tensors.values()
    report = MergeReport(
        recorded_name(model), revision_of(folder), recorded_name(adapter), command,
        sum(info.stored_bytes for info in tensors), 0, sum(info.numel for info in tensors), merged=list(merged.merged),
    )  # fmt: skip
    task = Task(folder, beside, target, merged, stored, output, report, source.trust_remote_code, on_start)
    format, method = stored.stored.format if stored is not None else None, METHOD
    if not how.in_place:
        format, method = write_anew(task, how, calibration, announce), how.method or METHOD
    elif stored is not None:
        write_on_grids(task)
    else:
        write_dense(task)
    quality = _measured(task, comparison)
    return Merge(
        report.source, report.adapter, str(output_dir), format, method if report.requantized else None, merged.merged,
        len(report.requantized), merged.untied, report.source_bytes, report.output_bytes,
        time.perf_counter() - started, quality,
    )  # fmt: skip


def _check(how: MergeOptions, calibration: CalibrationOptions, output: OutputOptions) -> None:
    parse_size(output.max_shard_size)
    if is_dtype(how.scheme):
        raise UsageError(f"{how.scheme} is a dtype: merge the adapter, and lowbit.convert_dtype the result")
    if how.format is not None:
        get_format(how.format)
    if how.in_place:
        if how.format is not None:
            raise UsageError("format is of a model that is quantized anew: pass a scheme or a method too")
        if given := changed(calibration):
            raise UsageError(f"{given[0].name} is of a method that takes data: pass method too (gptq)")


def _stored(folder: Path, how: MergeOptions, trust_remote_code: bool) -> QuantizedFolder | None:
    """The model, where it is quantized in a format of lowbit. Raises InputError for one that cannot stay as it is."""
    reader = CheckpointReader(folder)
    config = reader.quantization_config
    if config is None:
        return None
    if is_format(config):
        return QuantizedFolder(folder, trust_remote_code=trust_remote_code)
    if how.scheme is None:
        raise InputError(
            f"{folder} is stored in {reader.method}, which lowbit does not write: pass a scheme (W8A16) to quantize "
            "the merged model to, or `lowbit dequantize` it before"
        )
    return None


def _measured(task: Task, comparison: ComparisonOptions) -> dict | None:
    """The quality of the merged model, also in its report."""
    if not comparison.compare:
        return None
    done = compared(task.folder, task.adapter, task.target, comparison, task.trust_remote_code).to_dict()
    of = {"reference": f"{task.report.source} with {task.report.adapter}", "dataset": comparison.heldout}
    save_report(task.target, {**load_report(task.target), "quality": {**of, **done, "date": now()}})
    return {**of, **done}
