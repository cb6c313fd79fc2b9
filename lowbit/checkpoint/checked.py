"""Tensors of a checkpoint, checked for damage as they are read."""

import torch

from lowbit.checkpoint.layout import StoredTensor
from lowbit.checkpoint.reader import CheckpointReader
from lowbit.errors import InputError
from lowbit.numerics.finite import not_finite


def read_checked(reader: CheckpointReader, name: str) -> torch.Tensor:
    """Read a tensor; raises InputError if it holds NaN or infinity."""
    tensor = reader.tensor(name)
    check_finite(tensor, reader.tensors[name])
    return tensor


def check_finite(tensor: torch.Tensor, info: StoredTensor) -> None:
    """Raise InputError if a floating tensor holds NaN or infinity."""
    if bad := not_finite(tensor):
        raise InputError(
            f"{info.name} in {info.file.name} holds {bad:,} NaN or infinite values of {info.numel:,}: "
            "the checkpoint is damaged, download or export it again"
        )
