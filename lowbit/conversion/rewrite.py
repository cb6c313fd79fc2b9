"""A model folder written again tensor by tensor: what all conversions between folders do."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from lowbit.checkpoint.checked import read_checked
from lowbit.checkpoint.manifest import write_manifest
from lowbit.checkpoint.names import output_name
from lowbit.checkpoint.side_files import copy_side_files
from lowbit.checkpoint.writer import StagedFolder
from lowbit.errors import OutputError
from lowbit.folders.dense import cast_checked
from lowbit.folders.quantized import QuantizedFolder
from lowbit.folders.stored import StoredWeight, StoredWeights
from lowbit.numerics.qweight import QuantWeight

# Called with the number of weights in all, may return what is called with the name of each that is done
OnStart = Callable[[int], Callable[[str], None] | None]


@dataclass(frozen=True)
class Part:
    """Some tensors of the output, and what reads and computes them."""

    name: str
    outputs: tuple[TensorInfo, ...]
    make: Callable[[], dict[str, torch.Tensor]]


def plain_part(reader: CheckpointReader, info: TensorInfo, dtype: torch.dtype | None = None) -> Part:
    """A tensor of `reader` as it is; in `dtype`, if it is floating."""
    kept = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype

    def make():
        return {info.name: cast_checked(read_checked(reader, info.name), kept, info.name)}

    return Part(info.name, (TensorInfo(info.name, kept, info.shape),), make)


def packed_part(weight: StoredWeight, fmt, read: Callable[[], list[QuantWeight]]) -> Part:
    """A quantized weight in the format `fmt`. read: gives its matrix, or those of all of its experts, of the scheme and
    shape of `weight`."""
    lead = (weight.experts,) if weight.experts else ()
    meta = fmt.pack(QuantWeight.meta(*weight.shape, weight.scheme, weight.dtype))
    outputs = tuple(
        TensorInfo(_name(weight, suffix), tensor.dtype, (*lead, *tensor.shape)) for suffix, tensor in meta.items()
    )

    def make():
        packed = [fmt.pack(qweight) for qweight in read()]
        return {
            _name(weight, suffix): torch.stack([one[suffix] for one in packed]) if lead else packed[0][suffix]
            for suffix in packed[0]
        }

    return Part(weight.base, outputs, make)


def _name(weight: StoredWeight, suffix: str) -> str:
    return output_name(weight.base if weight.experts else f"{weight.base}.weight", suffix)


def packed_config(source: QuantizedFolder, fmt) -> dict:
    """The `quantization_config` of the same weights in the format `fmt`."""
    act_order = {"act_order": True} if any(weight.act_order for weight in source.stored.weights.values()) else {}
    return fmt.config(source.usual, *source.in_config(source.usual), **act_order)


def in_order(parts: Iterable[Part], reader: CheckpointReader, stored: StoredWeights) -> list[Part]:
    """The order of the source, so that the tensors of a layer stay together; what is new comes last."""
    place = {name: number for number, name in enumerate(reader.tensors)}
    place |= {w.base: min(place[t.name] for t in w.tensors.values()) for w in stored.weights.values()}
    return sorted(parts, key=lambda part: place.get(part.name, len(place)))


def rewrite(
    source: Path,
    target: Path,
    parts: list[Part],
    shard_bytes: int,
    overwrite: bool,
    on_start: OnStart | None,
    parameters: int,
    finish: Callable[[Path], None],
) -> int:
    """Write a folder that appears whole or not at all.

    Args:
        source: Where the side files are.
        target: The folder to write.
        parts: All tensors of it.
        shard_bytes: The largest weight file.
        overwrite: Whether a model folder may be replaced.
        on_start: Called with the number of parts, may return what is called with the name of each that is done.
        parameters: How many the index says there are.
        finish: Called with the folder before it appears: writes its configs, and may check it.

    Returns:
        The bytes of all tensors.

    Raises:
        OutputError: It cannot be written.
    """
    target = Path(os.path.abspath(target))
    outputs = [info for part in parts for info in part.outputs]
    with StagedFolder(target, overwrite) as staged:
        done = on_start(len(parts)) if on_start else None
        try:
            with CheckpointWriter(staged.path, outputs, shard_bytes, {}) as writer:
                copy_side_files(source, staged.path)
                for part in parts:
                    for name, tensor in part.make().items():
                        writer.write(name, tensor)
                    if done:
                        done(part.name)
                writer.finish(parameters)
            finish(staged.path)
            write_manifest(staged.path, writer.digests)
        except OSError as error:
            raise OutputError(f"cannot write to {target}: {error.strerror or error}") from None
        staged.commit()
    return sum(info.nbytes for info in outputs)
