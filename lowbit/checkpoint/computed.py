"""Tensors that transformers computes from stored ones while loading, as the parameters that they become.

A checkpoint may store one matrix for what the model has as several (query, key and value), or the reverse, or rows in
another order. What is quantized is a matrix of the model, with inputs and an error of its own: so it is computed before
it is quantized, and stored under the name of its parameter, where no reader has to take packed tensors apart. The same
name is given to what is no `*.weight` and renamed while loading: a reader would not rename its packed tensors.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from lowbit.checkpoint.layout import StoredTensor, TensorInfo
from lowbit.errors import InputError, first_line
from lowbit.transformers_api import CheckpointNames, Conversion


@dataclass(frozen=True)
class ComputedTensor(TensorInfo):
    """A parameter that `conversion` computes from `sources`."""

    conversion: Conversion
    sources: tuple[TensorInfo, ...]  # StoredTensors, where there is more than headers

    @property
    def file(self) -> Path:
        """Where it comes from: the file of the first of its sources."""
        return cast(StoredTensor, self.sources[0]).file

    def read(self) -> torch.Tensor:
        """Its data in memory of its own. Raises InputError if a source cannot be read or converted."""
        tensors = {source.name: cast(StoredTensor, source).read() for source in self.sources}
        try:
            return self.conversion.compute(tensors)[self.name]
        except Exception as error:  # of any operation of transformers
            raise InputError(f"transformers cannot convert {self.sources[0].name}: {first_line(error)}") from error


def as_loaded(
    tensors: Mapping[str, TensorInfo], names: CheckpointNames, wanted: Container[str]
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, with each parameter of `wanted` that is computed from some of them in their place,
    beside all else that is computed from these. names: how its names become those of parameters.

    A conversion that cannot be made before loading is left to transformers: one that needs more than shapes to know
    what it makes, or whose results would be converted again under their new names.
    """
    made: dict[str, list[TensorInfo]] = {}
    for conversion in names.conversions(tensors):
        if not any(parameter in wanted for parameter in conversion.parameters):
            continue
        sources = [tensors[name] for name in conversion.sources]
        computed = _computed(conversion, sources, names)
        if computed is not None:
            made.update({source.name: [] for source in sources} | {sources[0].name: computed})
    for name, stored in tensors.items():
        parameter, direct = names.locate(name)
        renamed = direct and parameter in wanted and parameter != name and not name.endswith(".weight")
        if renamed and _is_final(parameter, stored.shape, names) and not names.transposes(name, stored.shape):
            made[name] = [replace(stored, name=parameter)]
    return {info.name: info for name, stored in tensors.items() for info in made.get(name, [stored])}


def _is_final(name: str, shape: tuple[int, ...], names: CheckpointNames) -> bool:
    """Whether a stored tensor of this name and shape is loaded as the parameter of this name, and no more is done."""
    return name in names.state and names.state[name].shape == shape and names.locate(name) == (name, True)


def _computed(conversion: Conversion, sources: list[TensorInfo], names: CheckpointNames) -> list[TensorInfo] | None:
    """What a conversion makes, None where that cannot be known or stored."""
    shapes = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in sources}
    try:
        outputs = conversion.compute(shapes)
    except Exception:  # of any operation of transformers
        return None
    if not all(_is_final(name, tensor.shape, names) for name, tensor in outputs.items()):
        return None
    stored = tuple(sources)
    return [ComputedTensor(name, t.dtype, tuple(t.shape), conversion, stored) for name, t in outputs.items()]
