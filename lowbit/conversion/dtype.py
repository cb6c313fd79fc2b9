"""A model in half precision: every floating tensor converted, nothing quantized, a tensor at a time."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from lowbit.checkpoint.checked import read_checked
from lowbit.checkpoint.manifest import write_manifest
from lowbit.checkpoint.report_file import save_report
from lowbit.checkpoint.side_files import copy_side_files
from lowbit.checkpoint.writer import StagedFolder, file_bytes, parse_size
from lowbit.conversion.options import DtypeOptions
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.folders.locate import check_apart, open_headers, resolve, revision_of
from lowbit.guards.safe_files import write_whole
from lowbit.numerics.dtypes import DTYPES, cast
from lowbit.numerics.scheme import is_dtype
from lowbit.options import OutputOptions, RevisionOptions, ShardOptions, takes_options
from lowbit.system.machine import RunFacts
from lowbit.system.memory import peak_memory

# Tensors that an error names
_NAMED = 5


@dataclass
class _Conversion:
    """What was converted, sizes in bytes.

    dtype: "FP16" or "BF16". converted_tensors: those that had another dtype. clamped, underflowed: tensor -> how many
    of its values were too large and became the largest of the dtype, or were not zero and now are. file_bytes: of
    the weight files, headers and all.
    """

    source: str
    source_revision: str | None
    dtype: str
    source_bytes: int
    output_bytes: int
    file_bytes: int
    parameters: int
    converted_tensors: int
    command: str | None = None
    clamped: dict[str, int] = field(default_factory=dict)
    underflowed: dict[str, int] = field(default_factory=dict)


@dataclass
class DtypeReport(RunFacts, _Conversion):
    """The keys of lowbit_report.json of a folder that was converted."""


@takes_options
def plan_dtype(
    model: str | Path,
    dtype: str,
    *,
    output: ShardOptions,
    source: RevisionOptions,
) -> DtypeReport:
    """What `convert_dtype` would write, from headers alone.

    Args:
        model: A folder, a GGUF file, a Hub id, or "reference". A model on the Hub is not downloaded.
        dtype: "FP16" or "BF16".
    """
    headers = open_headers(model, source.revision)[0]
    return _planned(str(model), headers, _name(dtype), parse_size(output.max_shard_size))


@takes_options
def convert_dtype(
    model: str | Path,
    output_dir: str | Path,
    dtype: str,
    *,
    run: DtypeOptions,
    output: OutputOptions,
    source: RevisionOptions,
    on_plan: Callable[[DtypeReport], Callable[[TensorInfo], None]] | None = None,
) -> DtypeReport:
    """Write a model with every floating tensor in "FP16" or "BF16"; it is loaded like any model, nothing is quantized.

    Args:
        model: A folder, a GGUF file, a Hub id, or "reference".
        output_dir: The folder to write.
        dtype: "FP16" or "BF16".
        on_plan: Called with what is planned, returns what is called with each tensor that is done.

    Returns:
        What was done; it says too which values became zero.

    Raises:
        UsageError: The dtype is another.
        InputError: Values are too large, and clamp does not say that they become the largest; nothing is written.
        OutputError: The folder cannot be written.
    """
    name, started = _name(dtype), time.perf_counter()
    folder, target = resolve(model, source.revision), Path(os.path.abspath(output_dir))
    check_apart(folder, target)
    reader, shard_bytes = CheckpointReader(folder), parse_size(output.max_shard_size)
    report = replace(_planned(str(model), reader, name, shard_bytes), command=run.command)
    report.source_revision = revision_of(folder)
    with StagedFolder(target, output.overwrite) as staged:
        done = on_plan(report) if on_plan else _silent
        try:
            with CheckpointWriter(staged.path, _outputs(reader, DTYPES[name]), shard_bytes, {}) as writer:
                copy_side_files(folder, staged.path)
                for info in reader.tensors.values():
                    writer.write(info.name, _converted(reader, info, report))
                    done(info)
                _refuse_too_large(report, run.clamp)
                writer.finish(report.parameters)
            _write_config(staged.path, reader.plain_config, DTYPES[name])
            write_manifest(staged.path, writer.digests)
        except OSError as error:
            raise OutputError(f"cannot write to {target}: {error.strerror or error}") from None
        report.seconds, report.peak_memory = time.perf_counter() - started, peak_memory()
        save_report(staged.path, report.to_dict())
        staged.commit()
    return report


def _silent(info: TensorInfo) -> None:
    pass


def _name(dtype: str) -> str:
    if not is_dtype(dtype):
        raise UsageError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    return dtype.strip().upper()


def _outputs(reader, dtype: torch.dtype) -> list[TensorInfo]:
    return [
        TensorInfo(info.name, dtype if info.dtype.is_floating_point else info.dtype, info.shape)
        for info in reader.tensors.values()
    ]


def _planned(source: str, reader, name: str, shard_bytes: int) -> DtypeReport:
    """Raises InputError for a model that is quantized: its numbers are no weights yet."""
    if reader.quantization_config:
        raise InputError(f"{reader.folder} is quantized: convert the original model, or `lowbit dequantize` it")
    before, after = list(reader.tensors.values()), _outputs(reader, DTYPES[name])
    return DtypeReport(
        source=source,
        source_revision=None,
        dtype=name,
        source_bytes=sum(info.nbytes for info in before),
        output_bytes=sum(info.nbytes for info in after),
        file_bytes=file_bytes(after, shard_bytes),
        parameters=sum(info.numel for info in before),
        converted_tensors=sum(a.dtype != b.dtype for a, b in zip(before, after, strict=True)),
    )


def _converted(reader: CheckpointReader, info: TensorInfo, report: DtypeReport) -> torch.Tensor:
    made, too_large, lost = cast(read_checked(reader, info.name), DTYPES[report.dtype])
    if too_large:
        report.clamped[info.name] = too_large
    if lost:
        report.underflowed[info.name] = lost
    return made


def _refuse_too_large(report: DtypeReport, clamp: bool) -> None:
    if not report.clamped or clamp:
        return
    named = [f"{name} ({count:,})" for name, count in list(report.clamped.items())[:_NAMED]]
    more = f" and {len(report.clamped) - _NAMED} more tensors" if len(report.clamped) > _NAMED else ""
    instead = "convert to BF16, or " if report.dtype == "FP16" else ""
    raise InputError(
        f"{', '.join(named)}{more} hold values beyond {torch.finfo(DTYPES[report.dtype]).max:.6g}, the largest of "
        f"{report.dtype}: {instead}pass --clamp to make them that"
    )


def _write_config(folder: Path, config: dict, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    made = {key: value for key, value in _with_dtype(config, name).items() if key != "torch_dtype"} | {"dtype": name}
    write_whole(folder / "config.json", json.dumps(made, indent=2) + "\n")


def _with_dtype(config: dict, name: str) -> dict:
    """The config with `name` wherever it, or that of a model in it, says a dtype."""
    made = {key: _with_dtype(value, name) if isinstance(value, dict) else value for key, value in config.items()}
    return made | {key: name for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
