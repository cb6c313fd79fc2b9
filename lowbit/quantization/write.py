"""Writes the planned checkpoint: a thread reads ahead, this one quantizes, a third writes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch

from lowbit.checkpoint import CheckpointReader, CheckpointWriter
from lowbit.checkpoint.checked import read_checked
from lowbit.checkpoint.configs import write_configs
from lowbit.checkpoint.manifest import write_manifest
from lowbit.checkpoint.side_files import copy_side_files
from lowbit.checkpoint.writer import StagedFolder
from lowbit.errors import OutputError
from lowbit.folders.dense import DequantizedTensor
from lowbit.formats import get_format
from lowbit.numerics.exact import converted
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.reference import weight_error
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.plan import Plan, Step
from lowbit.quantization.report import Report
from lowbit.quantizers import get_quantizer

# Called with each Step that is done, for progress bars, and with what there is to say of it
Progress = Callable[[Step, str], None]
# Quantized output tensors of a Step that somebody else made before, or None
Made = Callable[[Step], dict[str, torch.Tensor] | None]


def write_checkpoint(
    reader: CheckpointReader,
    plan: Plan,
    staged: StagedFolder,
    shard_bytes: int,
    report: Report,
    progress: Progress | None,
    made: Made = lambda step: None,
) -> None:
    """Write all of the plan into the staged folder; what `made` does not have is quantized without data.

    Raises OutputError when that fails, InputError for weights that are damaged."""
    try:
        _write(reader, plan, staged.path, shard_bytes, report, progress, made)
    except OSError as error:
        raise OutputError(f"cannot write to {staged.target}: {error.strerror or error}") from None


def _write(reader, plan: Plan, folder: Path, shard_bytes: int, report: Report, progress, made: Made) -> None:
    fmt = get_format(plan.format_name)
    # one thread reads and checks the next tensor, one writes the last: the disk works while this one quantizes
    with (
        CheckpointWriter(folder, plan.outputs, shard_bytes, {}) as writer,
        ThreadPoolExecutor(max_workers=1) as reading,
        ThreadPoolExecutor(max_workers=1) as writing,
    ):
        copy_side_files(reader.folder, folder)
        written = None
        for step, outputs, finished_before in _read_ahead(reader, plan.steps, made, reading):
            if step.scheme is not None and not finished_before:
                packed, error = _quantized(outputs, step, plan.recipe, fmt)
                outputs = {step.output_name(suffix): part for suffix, part in packed.items()}
                report.add(step, error)
            if written is not None:
                written.result()  # no more than one step waits to be written, whatever the disk does
            written = writing.submit(_write_all, writer, outputs)
            if progress and not finished_before:
                progress(step, "")
        written.result()
        writer.finish(plan.total_parameters)
    write_configs(folder, reader.plain_config, fmt, plan.quantization_config)
    write_manifest(folder, writer.digests)


def _write_all(writer: CheckpointWriter, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def _read_ahead(
    reader: CheckpointReader, steps: Iterable[Step], made: Made, pool
) -> Iterator[tuple[Step, dict[str, torch.Tensor] | list[QuantWeight], bool]]:
    """Yield (step, read, finished). What is read is the output if a calibrated run has produced it (`finished`), the
    integers of a source that are converted exactly, else its tensor. The next step is prefetched."""

    def read(step: Step) -> tuple[dict[str, torch.Tensor] | list[QuantWeight], bool]:
        outputs = made(step)
        if outputs is not None:
            return outputs, True
        if step.is_exact:
            return _converted(step), False
        return {step.source.name: read_checked(reader, step.source.name)}, False

    pending = None
    for step in steps:
        following = (step, pool.submit(read, step))
        if pending:
            yield pending[0], *pending[1].result()
        pending = following
    if pending:
        yield pending[0], *pending[1].result()


def _matrices(tensor: torch.Tensor, step: Step) -> Iterator[torch.Tensor]:
    """The [out_features, in_features] matrices of a source tensor: itself, or one for each of its experts."""
    for matrix in tensor if tensor.ndim == 3 else (tensor,):
        yield matrix.T.contiguous() if step.transposed else matrix


def _quantized(
    read: dict[str, torch.Tensor] | list[QuantWeight], step: Step, recipe: Recipe, fmt
) -> tuple[dict[str, torch.Tensor], float]:
    """(the tensors of a step, the relative error) of what `_read_ahead` has read for it."""
    if isinstance(read, list):
        return _stacked([fmt.pack(qweight) for qweight in read], len(step.source.shape)), 0.0
    tensor = read[step.source.name]
    quantizer, options = get_quantizer(recipe.method), recipe.options
    if quantizer.needs(options):  # there are no statistics here
        quantizer, options = get_quantizer("rtn"), {"scale_search": "mse"}
    packed, errors = [], []
    for matrix in _matrices(tensor, step):
        qweight, _ = quantizer.quantize(matrix, {}, step.scheme.weight_only, options)
        qweight = qweight.with_inputs(step.scheme)
        errors.append(weight_error(matrix, qweight))
        packed.append(fmt.pack(qweight))
    return _stacked(packed, tensor.ndim), sum(errors) / len(errors)


def _stacked(packed: list[dict[str, torch.Tensor]], dimensions: int) -> dict[str, torch.Tensor]:
    """The tensors of a matrix, or of all experts of a parameter, which has three dimensions."""
    if dimensions == 2:
        return packed[0]
    return {suffix: torch.stack([part[suffix] for part in packed]) for suffix in packed[0]}


def _converted(step: Step) -> list[QuantWeight]:
    """The integers of a source, on the grid that is asked for, which holds them: nothing is rounded again."""
    source, scheme = cast(DequantizedTensor, step.source), cast(Scheme, step.scheme)
    stored = source.source.stored.quantized(source.weight)
    if source.weight.scheme == scheme:
        return stored
    return [converted(weight, scheme.weight_only).with_inputs(scheme) for weight in stored]
