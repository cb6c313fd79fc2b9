"""The weight of an output embedding that a checkpoint holds as that of the input embedding alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from lowbit.checkpoint.layout import StoredTensor, TensorInfo


@dataclass(frozen=True)
class UntiedTensor(TensorInfo):
    """A parameter whose data are those of `table`, which it was tied to."""

    table: TensorInfo  # a StoredTensor, where there is more than headers

    @property
    def file(self) -> Path:
        """Where the table is."""
        return cast(StoredTensor, self.table).file

    @property
    def stored_bytes(self) -> int:
        return 0  # the table is there once

    def read(self) -> torch.Tensor:
        """Its data in memory of its own. Raises InputError if the table cannot be read."""
        return cast(StoredTensor, self.table).read()


def untied(tensors: dict[str, TensorInfo], table: str, parameter: str) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by name, with `parameter` behind the one called `table` that it is tied to."""
    made = {}
    for name, info in tensors.items():
        made[name] = info
        if name == table:
            made[parameter] = UntiedTensor(parameter, info.dtype, info.shape, info)
    return made
