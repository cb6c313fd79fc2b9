"""A checkpoint with an adapter merged into it, each tensor when it is read: what is written or quantized then."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.checked import check_finite
from lowbit.checkpoint.computed import as_loaded
from lowbit.checkpoint.decoded import DecodedTensor
from lowbit.checkpoint.layout import StoredTensor
from lowbit.discovery import CheckpointNames, skeleton
from lowbit.errors import InputError, first_line
from lowbit.folders.dense import DequantizedTensor, as_dense, cast_checked
from lowbit.folders.locate import load_config
from lowbit.merging.adapter import WEIGHTS_NAME, put_on
from lowbit.merging.changes import Change, Part, changes_of
from lowbit.transformers_api import tied_weights

_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class MergedTensor(TensorInfo):
    """A tensor of the model with the adapter in it.

    origin: the same one without it. changes: of the parameter that it is, or is a part of. transposed: the parameter
    has its matrices transposed.
    """

    origin: TensorInfo
    changes: tuple[Change, ...]
    part: Part
    transposed: bool = False

    @property
    def file(self) -> Path:
        """Where its origin is."""
        return cast(StoredTensor, self.origin).file

    @property
    def stored_bytes(self) -> int:
        return self.origin.stored_bytes

    def read(self) -> torch.Tensor:
        """Its data in memory of its own. Added up in float32 and rounded once, whatever its dtype.

        Raises InputError for a tensor that is damaged, or that the adapter does not fit.
        """
        origin = self.origin
        if isinstance(origin, DequantizedTensor | DecodedTensor):  # not rounded twice
            origin = replace(origin, dtype=torch.float32)
        value = cast(StoredTensor, origin).read()
        check_finite(value, cast(StoredTensor, origin))
        value = value.float()
        if self.transposed:
            value = value.transpose(-1, -2).contiguous()
        try:
            for change in self.changes:
                value = change.apply(value, self.part)
        except (RuntimeError, ValueError) as error:  # of PEFT
            raise InputError(f"the adapter cannot be merged into {self.name}: {first_line(error)}") from None
        if self.transposed:
            value = value.transpose(-1, -2)
        return cast_checked(value.contiguous(), self.dtype, self.name)


@dataclass(frozen=True)
class MergedSource:
    """A model folder with an adapter.

    reader: the folder as one of plain weights, those that the adapter changes merged. config: of transformers. merged:
    the names of these tensors, those of quantized weights as the dense ones that they stand for. untied: whether the
    output embedding was tied and is not any more.
    """

    reader: CheckpointReader
    config: object
    merged: tuple[str, ...]
    untied: bool


def merged_source(folder: Path, adapter: Path, trust_remote_code: bool = False) -> MergedSource:
    """Merge the adapter in a folder into the model in another one. Raises InputError if they do not fit."""
    stored = CheckpointReader(folder)
    dense = as_dense(stored, trust_remote_code)
    config = load_config(folder, trust_remote_code, stored.tensors.values())
    model = skeleton(config, trust_remote_code, dtype=torch.float32, tensors=dense.tensors.values())
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tied = {name: target for name, target in tied_weights(model).items() if name in parameters}
    names = CheckpointNames(skeleton(config, trust_remote_code, tensors=dense.tensors.values()))
    model, asked = put_on(model, adapter)
    changes = changes_of(model, parameters)
    touched = [name for name in tied if name in changes or tied[name] in changes]
    untied = [name for name in touched if _differs(changes.get(name), changes.get(tied[name]), asked)]
    tensors = as_loaded(dense.tensors, names, changes)
    made = dict(_merged(tensors, names, changes))
    for name in untied:
        made[name] = _untied(name, tied[name], tensors, names, changes)
    _check_complete(changes, {**tied, **dict.fromkeys(untied)}, names, made, folder)
    reader = copy.copy(dense)
    reader.tensors = {**{name: made.get(name, info) for name, info in tensors.items()}, **made}
    reader.files = [*dense.files, adapter / WEIGHTS_NAME]  # an unfinished run goes on with the same adapter only
    if untied:
        reader.config = _without_ties(dense.config)
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return MergedSource(reader, config, tuple(made), bool(untied))


def _differs(first: list[Change] | None, second: list[Change] | None, config) -> bool:
    """Whether two parameters that are tied are no longer the same one: the adapter changes one of them only, or each in
    its own way. config: of the adapter."""
    if first is None or second is None:
        return True
    return not (getattr(config, "ensure_weight_tying", False) or any(change.is_tied for change in (*first, *second)))


def _merged(
    tensors: Mapping[str, TensorInfo], names: CheckpointNames, changes: Mapping[str, list[Change]]
) -> Iterable[tuple[str, MergedTensor]]:
    for name, info in tensors.items():
        parameter, direct = names.locate(name)
        if parameter not in changes:
            continue
        if not direct:
            raise InputError(f"{name} becomes {parameter} in a way of transformers that cannot be taken back")
        part = Part()
        if (expert := names.expert(name)) is not None:
            rows = info.shape[0]
            part = Part(expert[0], expert[1] * rows, rows)
        transposed = names.transposes(name, info.shape)
        yield name, MergedTensor(name, info.dtype, info.shape, info, tuple(changes[parameter]), part, transposed)


def _untied(
    name: str, target: str, tensors: Mapping[str, TensorInfo], names: CheckpointNames, changes: Mapping
) -> MergedTensor:
    """The tensor of a parameter that was tied to another one and has to be stored from now on."""
    shared = next((info for stored, info in tensors.items() if names.locate(stored) == (target, True)), None)
    if shared is None or name in tensors or names.locate(name) != (name, True):
        raise InputError(f"{name} is tied to {target}, and the adapter changes one of them: they cannot be parted here")
    return MergedTensor(name, shared.dtype, shared.shape, shared, tuple(changes.get(name, ())), Part())


def _without_ties(config: dict) -> dict:
    made = {
        name: _without_ties(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
    }
    return {**made, _TIED: False}


def _check_complete(changes: Mapping, tied: Mapping, names: CheckpointNames, made: Mapping, folder: Path) -> None:
    """Raise InputError for a parameter that the adapter changes and that no tensor of the folder is."""
    reached = {names.locate(name)[0] for name in made}
    for name in changes:
        if name not in reached and tied.get(name) not in reached:
            raise InputError(f"the adapter changes {name}, which is in no file of {folder}: it is incomplete")
