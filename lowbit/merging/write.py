"""A merged model as it was stored before: dense, or each changed weight on a new grid of its old scheme."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch

from lowbit.checkpoint.configs import write_configs
from lowbit.checkpoint.report_file import save_report
from lowbit.checkpoint.writer import parse_size
from lowbit.conversion.rewrite import Part, in_order, packed_config, packed_part, plain_part, rewrite
from lowbit.errors import InputError
from lowbit.folders.dense import DequantizedTensor
from lowbit.folders.quantized import QuantizedFolder
from lowbit.guards.safe_files import write_whole
from lowbit.merging.source import MergedTensor
from lowbit.merging.task import Task
from lowbit.numerics.qweight import QuantWeight
from lowbit.quantizers import checked_options, get_quantizer
from lowbit.system.memory import peak_memory
from lowbit.verification.checks import check_structure
from lowbit.verification.folder import report_of

METHOD = "rtn"
# What stays true of the report of a quantized folder where its weights stay in their schemes
_STILL_TRUE = ("recipe", "format", "left_alone", "fallbacks")


def write_dense(task: Task) -> None:
    """Write the merged tensors in the dtypes that they had, and all others as they are."""
    reader = task.merged.reader
    parts = [plain_part(reader, info) for info in reader.tensors.values()]

    def finish(written: Path) -> None:
        write_whole(written / "config.json", json.dumps(reader.plain_config, indent=2) + "\n")
        save_report(written, task.report.to_dict())

    _write(task, parts, finish)


def write_on_grids(task: Task) -> None:
    """Round the changed weights again, in their schemes; all other tensors keep every bit.

    Raises InputError for a weight that is not stored as the parameter that the adapter changes.
    """
    folder, reader = cast(QuantizedFolder, task.stored), task.merged.reader
    again = _changed_weights(task)
    task.report.requantized = list(again)
    fmt, parts = folder.stored.fmt, list[Part]()
    for base, weight in folder.stored.weights.items():
        stored = partial(folder.stored.quantized, weight)
        parts.append(packed_part(weight, fmt, partial(_rounded, again[base], stored) if base in again else stored))
    codes = {info.name for info in again.values()}
    kept = dict.fromkeys(info.name for info in folder.kept) | dict.fromkeys(task.merged.merged)
    parts += [plain_part(reader, reader.tensors[name]) for name in kept if name not in codes]
    config = packed_config(folder, fmt)
    still = {name: value for name, value in report_of(task.folder).items() if name in _STILL_TRUE}

    def finish(written: Path) -> None:
        write_configs(written, reader.plain_config, fmt, config)
        save_report(written, {**task.report.to_dict(), **still})

    _write(task, in_order(parts, folder.reader, folder.stored), finish)


def _changed_weights(task: Task) -> dict[str, MergedTensor]:
    """Quantized weights that the adapter changes, by their base names."""
    kept, found = {info.name for info in cast(QuantizedFolder, task.stored).kept}, {}
    for name in task.merged.merged:
        info = cast(MergedTensor, task.merged.reader.tensors[name])
        origin = info.origin
        if isinstance(origin, DequantizedTensor) and origin.name == name:  # else one that was tied to it
            found[origin.weight.base] = info
        elif not isinstance(origin, DequantizedTensor) and origin.name not in kept:
            raise InputError(
                f"{name} is made of several tensors of {task.folder} while it is loaded: pass a method, which "
                "quantizes it under its own name"
            )
    return found


def _rounded(merged: MergedTensor, stored: Callable[[], list[QuantWeight]]) -> list[QuantWeight]:
    """A merged weight on new grids: of the schemes, the order of groups and the grids of inputs that it had."""
    tensor, before = merged.read(), stored()
    if cast(DequantizedTensor, merged.origin).transposed:
        tensor = tensor.transpose(-1, -2)
    matrices = tensor if tensor.ndim == 3 else [tensor]
    return [_like(matrix.contiguous(), old) for matrix, old in zip(matrices, before, strict=True)]


def _like(matrix: torch.Tensor, old: QuantWeight) -> QuantWeight:
    order = old.in_group_order()[1]
    if order is not None:
        matrix = matrix[:, order]
    made, _ = get_quantizer(METHOD).quantize(matrix, {}, old.scheme.weight_only, checked_options(METHOD, {}))
    if order is not None:
        made = made.in_input_order(order)
    return made.with_inputs(old.scheme, old.input_scale, old.input_zero)


def _write(task: Task, parts: list[Part], finish: Callable[[Path], None]) -> None:
    report, output = task.report, task.output

    def finished(written: Path) -> None:
        report.peak_memory = peak_memory()
        finish(written)
        check_structure(written, task.trust_remote_code)

    report.output_bytes = sum(info.nbytes for part in parts for info in part.outputs)
    rewrite(
        task.folder, task.target, parts, parse_size(output.max_shard_size), output.overwrite, task.on_start,
        report.parameters, finished,
    )  # fmt: skip
