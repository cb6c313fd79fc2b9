"""From one format to another, number by number: codes, scales, zeros and g_idx stay what they are.

Nothing is quantized anew. What a format cannot hold is refused before anything is written, and what was written is read
again and compared before it appears.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from lowbit.checkpoint.configs import write_configs
from lowbit.checkpoint.writer import parse_size
from lowbit.conversion.export import export_source
from lowbit.conversion.gguf import export_gguf
from lowbit.conversion.mlx import export_mlx
from lowbit.conversion.options import DenseOptions, ExportOptions
from lowbit.conversion.rewrite import OnStart, Part, in_order, packed_config, packed_part, plain_part, rewrite
from lowbit.discovery import Site
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.folders.dense import dequantized
from lowbit.folders.locate import check_apart
from lowbit.folders.opened import stored_weights
from lowbit.folders.quantized import QuantizedFolder
from lowbit.folders.stored import StoredWeight, StoredWeights
from lowbit.formats import FORMATS, get_format
from lowbit.guards.safe_files import write_whole
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit.options import OutputOptions, SourceOptions, takes_options

# Formats of other tools, which lowbit writes and does not read
EXPORTS = ("mlx", "gguf")


@dataclass(frozen=True)
class Conversion:
    """What was done. weights: how many were converted. notes: what to know of the output, a line each."""

    source_format: str
    format: str
    weights: int
    source_bytes: int
    output_bytes: int
    output: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        return asdict(self)


@takes_options
def convert(
    model: str | Path,
    output_dir: str | Path,
    *,
    format: str,
    output: OutputOptions,
    source: SourceOptions,
    export: ExportOptions,
    on_start: OnStart | None = None,
) -> Conversion:
    """Write a quantized model again in another format: the same numbers, exactly.

    Args:
        model: A folder, a GGUF file, a Hub id, or "reference".
        output_dir: The folder to write, or the file of gguf: itself if it ends in .gguf, else named after the model in
            it, never split.
        format: "compressed-tensors", "gptq" or "awq", which lowbit reads too; or an export, "mlx" (a folder for mlx-lm)
            or "gguf".
        on_start: Called with the number of weights, may return what is called with the name of each that is done.

    Returns:
        What was done.

    Raises:
        UsageError: The format does not exist.
        InputError: It cannot hold the numbers, and why.
        OutputError: The folder cannot be written or reads back differently.
    """
    if format not in (*FORMATS, *EXPORTS):
        raise UsageError(f"format {format!r} is not known; allowed: {', '.join((*FORMATS, *EXPORTS))}")
    if export.pre is not None and format != "gguf":
        raise UsageError(f"pre is an option of gguf, not of {format}")
    shard_bytes = parse_size(output.max_shard_size)
    if format == "gguf" and shard_bytes != parse_size("5GB"):
        raise UsageError("max_shard_size is of formats that are folders, a GGUF file is never split: leave it out")
    folder = QuantizedFolder(model, source.revision, source.trust_remote_code)
    check_apart(folder.folder, Path(os.path.abspath(output_dir)))
    if folder.encoded:
        raise InputError(
            f"{folder.encoded[0].name} of {folder.reader.place} is stored in {folder.format} as "
            f"{folder.encoded[0].stored_as}, which no format here holds: quantize it, or dequantize it"
        )
    if format == "gguf":
        return _to_gguf(folder, Path(output_dir), export.pre, output.overwrite, on_start)
    if format == "mlx":
        return _to_mlx(folder, Path(output_dir), output.max_shard_size, output.overwrite, on_start)
    parts, config = _packed_parts(folder, format)

    def finish(written: Path) -> None:
        write_configs(written, folder.reader.plain_config, get_format(format), config)
        _compare(folder.stored, stored_weights(written))

    return _rewrite(folder, parts, output_dir, format, output, on_start, finish)


def _packed_parts(source: QuantizedFolder, format: str) -> tuple[list[Part], dict]:
    """The output in another format, and its config. Raises InputError for a weight that the format cannot hold."""
    fmt, weights = get_format(format), source.stored.weights
    for weight in weights.values():
        if reason := _refusal(weight, source.site(weight.base), fmt, source.usual):
            raise InputError(f"{weight.base} cannot be stored as {format}: {reason}")
    config = packed_config(source, fmt)
    parts = [packed_part(weight, fmt, partial(source.stored.quantized, weight)) for weight in weights.values()]
    parts += [plain_part(source.reader, info) for info in source.kept]
    return parts, config


def _to_mlx(source: QuantizedFolder, output: Path, max_shard_size, overwrite: bool, on_start) -> Conversion:
    notes = export_mlx(
        export_source(source),
        output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        on_plan=_by_entry(on_start),
    )
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return _conversion(source, "mlx", written, output, notes)


def _to_gguf(source: QuantizedFolder, output: Path, pre: str | None, overwrite: bool, on_start) -> Conversion:
    if output.suffix != ".gguf":
        output = output / f"{source.folder.resolve().name}.gguf"
    notes = export_gguf(export_source(source), output, pre=pre, overwrite=overwrite, on_plan=_by_entry(on_start))
    return _conversion(source, "gguf", output.stat().st_size, output, notes)


def _by_entry(on_start: OnStart | None):
    def on_plan(plan):
        done = on_start(len(plan)) if on_start else None
        return (lambda entry, note: done(entry.name)) if done else None

    return on_plan


def _conversion(source: QuantizedFolder, format: str, output_bytes: int, output, notes=()) -> Conversion:
    source_bytes = sum(info.stored_bytes for info in source.reader.tensors.values())
    notes = (*source.notes, *notes)
    return Conversion(source.format, format, source.count, source_bytes, output_bytes, str(output), notes)


@takes_options
def dequantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    dense: DenseOptions,
    output: OutputOptions,
    source: SourceOptions,
    on_start: OnStart | None = None,
) -> Conversion:
    """Write a quantized model as a plain one, of the weights that its codes stand for.

    Where the dtype is as stored, weights get that of their scales.

    Args:
        model: A folder, a GGUF file, a Hub id, or "reference".
        output_dir: The folder to write.
        on_start: Called with the number of weights, may return what is called with the name of each that is done.

    Returns:
        What was done.

    Raises:
        UsageError: The dtype does not exist.
        InputError: The model is not quantized, or a value is too large for the dtype.
        OutputError: The folder cannot be written.
    """
    parse_size(output.max_shard_size)  # what cannot be done is said before the folder is opened
    wanted = _dtype(dense.dtype)
    folder = QuantizedFolder(model, source.revision, source.trust_remote_code)
    check_apart(folder.folder, Path(os.path.abspath(output_dir)))
    parts = [_dense_part(folder, weight, wanted) for weight in folder.stored.weights.values()]
    parts += [plain_part(folder.reader, info, wanted) for info in folder.kept]
    config = folder.reader.plain_config
    if wanted is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        config["dtype"] = str(wanted).removeprefix("torch.")

    def finish(written: Path) -> None:
        write_whole(written / "config.json", json.dumps(config, indent=2) + "\n")

    return _rewrite(folder, parts, output_dir, "plain", output, on_start, finish)


def _dtype(name) -> torch.dtype | None:
    allowed = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    short = str(name).removeprefix("torch.")
    if name is not None and short not in allowed:
        raise UsageError(f"dtype is {short!r}; allowed: {', '.join(allowed)}")
    return None if name is None else allowed[short]


def _refusal(weight: StoredWeight, site: Site | None, fmt, usual: Scheme) -> str | None:
    if site is not None and site.kind == "embedding" and not fmt.EMBEDDINGS:
        return f"it is an embedding, which {fmt.METHOD} cannot hold quantized"
    if weight.act_order and not fmt.ACT_ORDER:
        return f"its inputs are in act-order (a g_idx), which {fmt.METHOD} has no place for"
    if weight.experts and not fmt.FUSED_EXPERTS:
        return f"its experts are stored as one tensor, which {fmt.METHOD} cannot hold"
    return fmt.refuse(weight.scheme, weight.shape, usual)


def _dense_part(source: QuantizedFolder, weight: StoredWeight, dtype: torch.dtype | None) -> Part:
    dense = dequantized(source, weight, dtype)
    return Part(weight.base, (dense,), lambda: {dense.name: dense.read()})


def _rewrite(
    source: QuantizedFolder, parts: Iterable[Part], output_dir, format: str, output: OutputOptions,
    on_start: OnStart | None, finish: Callable[[Path], None],
) -> Conversion:  # fmt: skip
    ordered, shard_bytes = in_order(parts, source.reader, source.stored), parse_size(output.max_shard_size)
    written = rewrite(
        source.folder, output_dir, ordered, shard_bytes, output.overwrite, on_start, source.parameters, finish
    )
    return _conversion(source, format, written, output_dir)


def _compare(source: StoredWeights, written: StoredWeights) -> None:
    """Raise OutputError unless every weight reads back as the same numbers."""
    for base, weight in source.weights.items():
        for before, after in zip(source.quantized(weight), written.quantized(written.weights[base]), strict=True):
            for what, first, second in (
                ("codes", before.codes, after.codes),
                ("scales", before.scales, after.scales),
                ("zeros", _zeros(before), _zeros(after)),
                ("g_idx", before.g_idx, after.g_idx),
                ("scales of inputs", before.input_scale, after.input_scale),
                ("zero points of inputs", before.input_zero, after.input_zero),
            ):
                same = first is second if first is None or second is None else torch.equal(first, second)
                if not same:
                    raise OutputError(f"{base}: the {what} read back from the output differ: nothing was written")


def _zeros(qweight: QuantWeight) -> torch.Tensor:
    middle = torch.full_like(qweight.scales, qweight.scheme.middle, dtype=torch.uint8)
    return middle if qweight.zeros is None else qweight.zeros
