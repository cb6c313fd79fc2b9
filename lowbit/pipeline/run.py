"""Data-free quantization: one tensor is read, quantized, packed and written at a time; a model is never held."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader, CheckpointWriter
from lowbit.checkpoint.side_files import copy_side_files
from lowbit.checkpoint.writer import StagedFolder, parse_size
from lowbit.discovery import skeleton
from lowbit.errors import InputError, OutputError
from lowbit.formats import get_format
from lowbit.pipeline.plan import Plan, Step, make_plan
from lowbit.pipeline.report import Report, weight_error
from lowbit.quantizers import checked_options, get_quantizer
from lowbit.scheme import Recipe, Scheme
from lowbit.sources import load_config, resolve

# Called with each Step that is done, for progress bars
Progress = Callable[[Step], None]


def quantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    scheme: str | Scheme = "W4A16",
    group_size: int | None = None,
    sym: bool | None = None,
    method: str = "rtn",
    options: dict | None = None,
    overrides: Iterable[tuple[str, str | Scheme]] = (),
    ignore: Iterable[str] = (),
    format: str = "compressed-tensors",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_plan: Callable[[Plan], Progress | None] | None = None,
) -> Report:
    """Quantize a checkpoint into `output_dir`, a folder that transformers, vLLM and lowbit load.

    model: a folder, a Hub id, or "reference" (the embedded model). scheme: a Scheme or a name such as "W4A16";
    group_size and sym override what the scheme says. overrides: (regex, scheme) for the modules it matches.
    ignore: regexes of modules to leave alone; the output embedding and routers always are.
    dry_run: plan and report, write nothing. on_plan: called with the Plan, may return a progress callback.

    Raises UsageError (options that cannot work), InputError (the checkpoint), OutputError (the output folder).
    """
    recipe = make_recipe(scheme, group_size, sym, method, options, overrides, ignore)
    shard_bytes = parse_size(max_shard_size)
    started = time.perf_counter()
    source = resolve(model, revision)
    target = Path(output_dir)
    _check_apart(source, target)
    reader = CheckpointReader(source)
    plan = make_plan(reader, skeleton(load_config(source, trust_remote_code), trust_remote_code), recipe, format)
    progress = on_plan(plan) if on_plan else None
    report = Report.of(plan, source=str(model), output=str(target))
    if dry_run:
        return report
    with StagedFolder(target, overwrite) as staged:
        try:
            _write(reader, plan, staged.path, shard_bytes, report, progress)
        except OSError as error:
            raise OutputError(f"cannot write to {target}: {error.strerror or error}") from None
        staged.commit()
    report.seconds = time.perf_counter() - started
    return report


def make_recipe(scheme, group_size, sym, method, options, overrides=(), ignore=()) -> Recipe:
    """A Recipe from what a user types; raises UsageError for anything that is not allowed."""
    base = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    base = Scheme(base.bits, base.group_size if group_size is None else group_size, base.sym if sym is None else sym)
    parsed = [(pattern, Scheme.parse(s) if isinstance(s, str) else s) for pattern, s in overrides]
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    return Recipe(base, method, checked_options(method, options or {}), parsed, ignore)


def _check_apart(source: Path, target: Path) -> None:
    source, target = source.resolve(), Path(os.path.realpath(target))
    if source == target or source.is_relative_to(target) or target.is_relative_to(source):
        raise OutputError(f"the output folder {target} and the model {source} overlap: choose another output folder")


def _write(reader, plan: Plan, folder: Path, shard_bytes: int, report: Report, progress: Progress | None) -> None:
    fmt = get_format(plan.format_name)
    # one thread reads and checks the next tensor, one writes the last: the disk works while this one quantizes
    with (
        CheckpointWriter(folder, plan.outputs, shard_bytes, {}) as writer,
        ThreadPoolExecutor(max_workers=1) as reading,
        ThreadPoolExecutor(max_workers=1) as writing,
    ):
        copy_side_files(reader.folder, folder)
        written = None
        for step, tensor in _read_ahead(reader, plan.steps, reading):
            outputs = {step.source.name: tensor}
            if step.scheme is not None:
                packed, error = _quantize_tensor(tensor, step, plan.recipe, fmt)
                outputs = {step.output_name(suffix): part for suffix, part in packed.items()}
                report.add(step, error)
            if written is not None:
                written.result()  # no more than one step waits to be written, whatever the disk does
            written = writing.submit(_write_all, writer, outputs)
            if progress:
                progress(step)
        written.result()
        writer.finish(plan.total_parameters)
    config = {**reader.config, "quantization_config": plan.quantization_config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_all(writer: CheckpointWriter, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def _read_checked(reader: CheckpointReader, name: str) -> torch.Tensor:
    tensor = reader.tensor(name)
    _check_finite(tensor, reader.tensors[name])
    return tensor


def _read_ahead(reader: CheckpointReader, steps: Iterable[Step], pool) -> Iterator[tuple[Step, torch.Tensor]]:
    """Each step with its tensor, the next one being read meanwhile."""
    pending = None
    for step in steps:
        following = (step, pool.submit(_read_checked, reader, step.source.name))
        if pending:
            yield pending[0], pending[1].result()
        pending = following
    if pending:
        yield pending[0], pending[1].result()


def _matrices(tensor: torch.Tensor, step: Step) -> Iterator[torch.Tensor]:
    """The [out_features, in_features] matrices of a source tensor: itself, or one for each of its experts."""
    for matrix in tensor if tensor.ndim == 3 else (tensor,):
        yield matrix.T.contiguous() if step.site.transposed else matrix


def _quantize_tensor(tensor: torch.Tensor, step: Step, recipe: Recipe, fmt) -> tuple[dict[str, torch.Tensor], float]:
    quantizer = get_quantizer(recipe.method)
    packed, errors = [], []
    for matrix in _matrices(tensor, step):
        qweight = quantizer.quantize(matrix, {}, step.scheme, recipe.options)
        errors.append(weight_error(matrix, qweight))
        packed.append(fmt.pack(qweight))
    if tensor.ndim == 2:
        return packed[0], errors[0]
    stacked = {suffix: torch.stack([part[suffix] for part in packed]) for suffix in packed[0]}
    return stacked, sum(errors) / len(errors)


# The bits of the exponent, all of them set in NaN and infinity and in nothing else, and an integer type
_EXPONENT = {
    torch.bfloat16: (0x7F80, torch.int16),
    torch.float16: (0x7C00, torch.int16),
    torch.float32: (0x7F800000, torch.int32),
    torch.float64: (0x7FF0000000000000, torch.int64),
}
_CHECKED_ELEMENTS = 2**20


def _check_finite(tensor: torch.Tensor, info) -> None:
    """Raise InputError if a floating tensor holds NaN or infinity. A third of the cost of isfinite."""
    exponent, integer = _EXPONENT.get(tensor.dtype, (0, None))
    if integer is None or not tensor.numel():
        return
    magnitude = torch.iinfo(integer).max
    bits = tensor.view(-1).view(integer)
    scratch = torch.empty(min(_CHECKED_ELEMENTS, bits.numel()), dtype=integer)

    def largest(part):
        return int(torch.bitwise_and(part, magnitude, out=scratch[: part.numel()]).amax())

    if all(largest(part) < exponent for part in bits.split(_CHECKED_ELEMENTS)):
        return
    bad = int(tensor.isfinite().logical_not_().sum())
    raise InputError(
        f"{info.name} in {info.file.name} holds {bad:,} NaN or infinite values of {info.numel:,}: "
        "the checkpoint is damaged, download or export it again"
    )
