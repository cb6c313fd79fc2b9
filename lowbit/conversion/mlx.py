"""Writes a quantized model as the folder that mlx-lm loads: exact, or refused."""

import json
from collections import Counter
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointWriter, TensorInfo
from lowbit.checkpoint.reader import read_config
from lowbit.checkpoint.side_files import copy_side_files
from lowbit.checkpoint.writer import StagedFolder, parse_size
from lowbit.conversion.export import Entry, ExportSource, OnPlan, entries, refuse_transposed
from lowbit.errors import InputError, OutputError
from lowbit.formats import mlx
from lowbit.guards.safe_files import write_whole
from lowbit.numerics.qweight import QuantWeight

# What mlx-lm calls the parts of the parameters that transformers fuses
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}


def export_mlx(
    source: ExportSource,
    output_dir: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    on_plan: OnPlan | None = None,
) -> list[str]:
    """Write `source` to the folder `output_dir`, which appears whole or not at all. Returns what a user should know.

    Raises InputError, naming the module, for what MLX cannot hold exactly; OutputError for the output folder.
    """
    plan = entries(source)
    refuse_transposed(source, plan, "mlx-lm")
    for entry in plan:
        if entry.scheme and (reason := mlx.refuse(entry.scheme)):
            raise InputError(f"{entry.name}: {reason}")
    with StagedFolder(output_dir, overwrite) as staged:
        progress = on_plan(plan) if on_plan else None
        try:
            _write(source, plan, staged.path, parse_size(max_shard_size), progress)
        except OSError as error:
            raise OutputError(f"cannot write to {staged.target}: {error.strerror or error}") from None
        staged.commit()
    return _notes(plan)


def module_name(entry: Entry) -> str:
    """The module's name in mlx-lm, which keeps stacked experts in a `switch_mlp` beside where they were."""
    if not entry.stacked:
        return entry.base
    owner, projection = entry.base.split(".experts.")
    if entry.part is not None:
        fused = entry.parameter.rpartition(".")[2]
        projection = _PARTS.get(fused, (fused,))[entry.part]
    return f"{owner}.switch_mlp.{projection}"


def _write(source: ExportSource, plan: list[Entry], folder: Path, shard_bytes: int, progress) -> None:
    infos = [info for entry in plan for info in _infos(entry)]
    copy_side_files(source.folder, folder)
    with CheckpointWriter(folder, infos, shard_bytes, {"format": "mlx"}) as writer:
        for entry in plan:
            for name, tensor in _tensors(source, entry).items():
                writer.write(name, tensor)
            if progress:
                progress(entry, "")
        writer.finish(sum(torch.Size(entry.full_shape).numel() for entry in plan))
    config = read_config(source.folder)
    config.pop("quantization_config", None)
    config = _older_names(config, source.config.attribute_map) | config
    config["quantization"] = _quantization(plan)
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _older_names(config: dict, aliases: dict[str, str]) -> dict:
    """Settings by the names they had in transformers 4, which most models of mlx-lm know them by.

    aliases: such names and those of today. Rope settings that differ from layer to layer had none in common."""
    older = {alias: config[name] for alias, name in aliases.items() if name in config}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        older |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {"type": rope["rope_type"], **rope}
    return older


def _infos(entry: Entry) -> list[TensorInfo]:
    lead = entry.full_shape[: -len(entry.shape)] if entry.stacked else ()
    if entry.scheme is None:
        return [TensorInfo(module_name(entry) + entry.suffix, entry.dtype, (*lead, *entry.shape))]
    packed = mlx.pack(QuantWeight.meta(*entry.shape, entry.scheme, entry.dtype))
    return [TensorInfo(f"{module_name(entry)}.{s}", t.dtype, (*lead, *t.shape)) for s, t in packed.items()]


def _tensors(source: ExportSource, entry: Entry) -> dict[str, torch.Tensor]:
    if entry.scheme is None:
        parts = [{entry.suffix: source.tensor(name)} for name in entry.members]
    else:
        parts = [{f".{s}": t for s, t in _pack(source, name).items()} for name in entry.members]
    return {
        module_name(entry) + suffix: torch.stack([p[suffix] for p in parts]) if entry.stacked else parts[0][suffix]
        for suffix in parts[0]
    }


def _pack(source: ExportSource, module: str) -> dict[str, torch.Tensor]:
    try:
        return mlx.pack(source.read(module))
    except InputError as error:
        raise InputError(f"{module}: {error}") from None


def _quantization(plan: list[Entry]) -> dict:
    schemes = {module_name(entry): entry.scheme for entry in plan if entry.scheme}
    default = Counter(schemes.values()).most_common(1)[0][0]
    return mlx.config(default, {name: scheme for name, scheme in schemes.items() if scheme != default})


def _notes(plan: list[Entry]) -> list[str]:
    wide = [entry for entry in plan if entry.scheme and not entry.scheme.sym]
    if not wide:
        return []
    return [f"{len(wide)} asymmetric weights have float32 biases, so MLX computes in float32 from there on"]
