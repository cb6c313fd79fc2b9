"""What exports to other tools (GGUF, MLX) read from, and what all of them do with the experts of a layer.

Both want the matrices of one projection of all experts as a single 3-D tensor, where checkpoints have one 2-D tensor
for each expert. `entries` lists what an export writes: modules and tensors of the checkpoint, experts stacked.
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowbit.checkpoint import TensorInfo
from lowbit.discovery import CheckpointNames, find_sites
from lowbit.errors import InputError
from lowbit.folders.quantized import QuantizedFolder
from lowbit.folders.stored import StoredWeight
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

_EXPERT = re.compile(r"(?P<list>.+\.experts)\.(?P<number>\d+)\.(?P<projection>.+)")


@dataclass(frozen=True)
class ExportSource:
    """A quantized model folder, whatever its format.

    folder: where its side files are. config: the transformers config of the dense model. skeleton: that model on the
    meta device. quantized: checkpoint name of each quantized module (`model.layers.0.mlp.up_proj`) -> QuantWeight
    on the meta device; one 2-D weight for each expert. dense: every other tensor. read and tensor: the data of one.
    """

    folder: Path
    config: object
    skeleton: torch.nn.Module
    quantized: dict[str, QuantWeight]
    dense: dict[str, TensorInfo]
    read: Callable[[str], QuantWeight]
    tensor: Callable[[str], torch.Tensor]


def export_source(folder: QuantizedFolder) -> ExportSource:
    """What exports take of a quantized folder. Raises InputError for experts that are stored as one tensor."""
    config = copy.copy(folder.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stored = folder.stored
    return ExportSource(
        folder=folder.folder,
        config=config,
        skeleton=folder.model,
        quantized={base: _on_meta(weight) for base, weight in stored.weights.items()},
        dense={info.name: info for info in folder.kept},
        read=lambda base: stored.quantized(stored.weights[base])[0],
        tensor=folder.reader.tensor,
    )


def _on_meta(weight: StoredWeight) -> QuantWeight:
    if weight.experts:
        raise InputError(f"{weight.base}: its experts are stored as one tensor, which no export takes apart")
    qweight = QuantWeight.meta(*weight.shape, weight.scheme, weight.dtype)
    if not weight.act_order:
        return qweight
    return replace(qweight, g_idx=torch.empty(weight.shape[1], dtype=torch.int32, device="meta"))


@dataclass(frozen=True)
class Entry:
    """A tensor of the export: `members` are the modules or tensors of the source that it holds, several if experts.

    name: of the tensor in the checkpoint, without the number of the expert and, if quantized, without `.weight`.
    parameter: of the model. part: which of the tensors that are laid side by side there (gate 0, up 1), None if it is
    not one that transformers merges experts into.
    """

    name: str
    parameter: str
    members: tuple[str, ...]
    shape: tuple[int, ...]  # [N, K] if quantized; of one member
    dtype: torch.dtype  # of the scales if quantized
    scheme: Scheme | None = None
    stacked: bool = False
    part: int | None = None

    @property
    def base(self) -> str:
        """The name without `.weight` or `.bias`."""
        return self.name if self.scheme else re.sub(r"\.(weight|bias)$", "", self.name)

    @property
    def suffix(self) -> str:
        return ".weight" if self.scheme else self.name.removeprefix(self.base)

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (len(self.members), *self.shape) if self.stacked else self.shape

    @property
    def nbytes(self) -> int:
        """Roughly what is read for it, to measure progress by."""
        bits = self.scheme.bits if self.scheme else 8 * self.dtype.itemsize
        return torch.Size(self.full_shape).numel() * bits // 8


# Called with each Entry that is done, for progress bars, and with what there is to say of it
Progress = Callable[[Entry, str], None]
OnPlan = Callable[[list[Entry]], Progress | None]


def entries(source: ExportSource) -> list[Entry]:
    """Everything an exit writes, in the order of the checkpoint. Raises InputError for experts that do not stack."""
    names = CheckpointNames(source.skeleton)
    stacks: dict[str, dict[int, Entry]] = {}
    for name, weight in source.quantized.items():
        _refuse_act_order(name, weight)
        entry = _entry(names, name, name + ".weight", weight.codes.shape, weight.scales.dtype, weight.scheme)
        _add(stacks, name, entry)
    for name, info in source.dense.items():
        _add(stacks, name, _entry(names, name, name, info.shape, info.dtype))
    return [_stack(name, stack) for name, stack in stacks.items()]


def _refuse_act_order(name: str, weight: QuantWeight) -> None:
    if weight.g_idx is not None:
        raise InputError(f"{name} is in act-order (its inputs are scattered over groups), which this format cannot say")


def _entry(names: CheckpointNames, name: str, tensor: str, shape, dtype, scheme: Scheme | None = None) -> Entry:
    parameter, _ = names.locate(tensor)
    _, part = names.expert(tensor) or (None, None)
    return Entry(name, parameter, (name,), tuple(shape), dtype, scheme, part=part)


def _add(stacks: dict[str, dict[int, Entry]], name: str, entry: Entry) -> None:
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        stacks[name] = {-1: entry}
    else:
        stacks.setdefault(f"{expert['list']}.{expert['projection']}", {})[int(expert["number"])] = entry


def _stack(name: str, stack: dict[int, Entry]) -> Entry:
    first = next(iter(stack.values()))
    if -1 in stack:
        return first
    for number, entry in stack.items():
        if (entry.shape, entry.dtype, entry.scheme) != (first.shape, first.dtype, first.scheme):
            raise InputError(
                f"{entry.members[0]} is {_describe(entry)} and {first.members[0]} is {_describe(first)}: the experts "
                "of a layer are written as one tensor, so they need one scheme"
            )
        if not 0 <= number < len(stack):
            raise InputError(f"{entry.members[0]} is one of {len(stack)} experts: some are missing in the checkpoint")
    members = tuple(stack[number].members[0] for number in range(len(stack)))
    return Entry(name, first.parameter, members, first.shape, first.dtype, first.scheme, True, first.part)


def _describe(entry: Entry) -> str:
    kind = entry.scheme.name if entry.scheme else "not quantized"
    return f"{kind} {list(entry.shape)} {str(entry.dtype).removeprefix('torch.')}"


def refuse_transposed(source: ExportSource, written: Iterable[Entry], reader: str) -> None:
    """Raise InputError for weights that their model keeps as [in_features, out_features] (GPT-2's Conv1D)."""
    sites = find_sites(source.skeleton)
    for entry in written:
        if entry.scheme and entry.parameter in sites and sites[entry.parameter].transposed:
            raise InputError(f"{entry.name} is stored transposed by its model, and {reader} would transpose its codes")
