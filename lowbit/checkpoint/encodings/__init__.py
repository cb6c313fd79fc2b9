"""Weights that other tools store in floating point of eight or four bits, and how they are decoded. No files.

Every layout comes down to one rule: a code stands for a number, and a block of codes shares a scale (`blocks`). A
module here knows which tensors of a checkpoint belong together, and what their scales mean. Add one by writing it and
listing it in `ENCODINGS`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import torch

from lowbit.checkpoint.layout import TensorInfo

# quant_method -> its module
ENCODINGS = {
    "fp8": "lowbit.checkpoint.encodings.fp8",
    "compressed-tensors": "lowbit.checkpoint.encodings.compressed_tensors",
    "modelopt": "lowbit.checkpoint.encodings.modelopt",
    "mxfp4": "lowbit.checkpoint.encodings.mxfp4",
    "bitsandbytes": "lowbit.checkpoint.encodings.bitsandbytes",
}


@dataclass(frozen=True)
class EncodedWeight:
    """A weight as it is stored, and what it is decoded to.

    Attributes:
        name: The name of the parameter.
        shape: The shape of the parameter.
        parts: What each stored tensor is ("codes", "scales", ...) -> the tensor.
        decode: (those tensors by what they are, a dtype) -> the weight, rounded once to that dtype.
        unused: Names of tensors that belong to it and say nothing of the weight: the scales of its inputs.
        kind: What its codes are, for people.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    decode: Callable[[dict[str, torch.Tensor], torch.dtype], torch.Tensor]
    unused: tuple[str, ...] = ()
    kind: str = ""


class Encoding(Protocol):
    """A module of the table."""

    def weights(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterable[EncodedWeight]:
        """The encoded weights among the tensors of a checkpoint.

        Args:
            tensors: All tensors of the checkpoint by name.
            config: Its `quantization_config`.

        Raises:
            InputError: A tensor is missing, or its dtype or shape does not fit the others.
        """

    # One whose `quant_method` has integers too: def remaining(config, decoded) -> dict | None, the config of these


def get_encoding(method: object) -> Encoding | None:
    """The module that decodes checkpoints of a `quant_method`; None if there is none."""
    return cast(Encoding, import_module(ENCODINGS[method])) if isinstance(method, str) and method in ENCODINGS else None
