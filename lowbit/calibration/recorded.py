"""What a report says was smoothed: the scales, and how a checkpoint's tensors are scaled by them again."""

from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping

import torch

from lowbit.calibration.folds import Edit, Fold, planned_edits
from lowbit.calibration.smooth import scales_of
from lowbit.checkpoint.manifest import REPORT_NAME
from lowbit.discovery import CheckpointNames
from lowbit.errors import InputError

_MOST_CHANNELS = 2**24  # more inputs than any linear has


# Parameter -> what it is scaled by, one after the other
Edits = dict[str, list[tuple[Edit, torch.Tensor]]]


def scaled(name: str, tensor: torch.Tensor, edits: Edits, names: CheckpointNames) -> torch.Tensor:
    """A checkpoint tensor with the edits of its parameter; itself, where there are none. Raises InputError for edits of
    a report that do not fit it."""
    parameter, _ = names.locate(name)
    for edit, scales in edits.get(parameter, ()):
        edit = edit.transposed() if names.transposes(name, tuple(tensor.shape)) else edit
        try:
            tensor = edit.apply(tensor, scales)
        except (IndexError, TypeError, ValueError, RuntimeError):
            raise InputError(f"what {REPORT_NAME} says of smoothing does not fit {name}: quantize again") from None
    return tensor


def add_edits(edits: Edits, fold: Fold, prefix: str, scales: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> None:
    """stored: parameter -> the tensor of the checkpoint that it is, of producers at least."""
    for edit, each in planned_edits(fold, stored[prefix + fold.producers[0].parameter], scales):
        edits.setdefault(prefix + edit.parameter, []).append((edit, each))


def recorded_edits(
    layers: Iterable[Mapping], names: CheckpointNames, tensors: Iterable[str], read: Callable[[str], torch.Tensor]
) -> Edits:
    """What a report says of its decoder `layers` that was scaled. tensors: names of those of the source; read: gives
    one. Raises InputError for a report that is damaged."""
    edits: Edits = {}
    stored = {names.locate(name)[0]: name for name in tensors}
    try:
        for layer in layers:
            for entry in layer.get("smoothing", ()):
                if "exponents" in entry:
                    exponents = torch.frombuffer(bytearray(b64decode(entry["exponents"])), dtype=torch.int8).long()
                    if sum(length for _, length in entry["channels"]) > _MOST_CHANNELS:
                        raise ValueError("channels")
                    fold = Fold(
                        tuple(Edit(name, axis, offset) for name, axis, offset in entry["producer_edits"]),
                        tuple(Edit(name, axis) for name, axis in entry["consumer_edits"]),
                        torch.cat([torch.arange(first, first + length) for first, length in entry["channels"]]),
                        len(exponents),
                    )
                    producer = {entry["producer"]: read(stored[entry["producer"]])}
                    add_edits(edits, fold, entry["prefix"], scales_of(exponents), producer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"what {REPORT_NAME} says of smoothing is damaged ({type(error).__name__}): quantize again"
        ) from None
    return edits
