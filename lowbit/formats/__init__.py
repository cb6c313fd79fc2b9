"""Checkpoint formats: QuantWeight to named tensors and back, and the config that describes them. No files.

`Format` is what a module in the table has. What is read is always unpacked by `compressed_tensors.unpack_weight`: the
tensors of that format, one for one, are what the layers of lowbit load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from lowbit.errors import InputError, UsageError
from lowbit.guards.records import shown

if TYPE_CHECKING:  # commands check the names in the table before they import torch
    import torch

    from lowbit.numerics.qweight import QuantWeight
    from lowbit.numerics.scheme import Scheme

FORMATS = {
    "compressed-tensors": "lowbit.formats.compressed_tensors",
    "gptq": "lowbit.formats.gptq",
    "awq": "lowbit.formats.awq",
}


class StoredConfig(Protocol):
    """What a checkpoint's `quantization_config` says.

    Attributes:
        exhaustive: Modules that `lookup` finds are all stored quantized.
        silent_on_symmetry: It does not say what is symmetric: only zeros tell.
    """

    exhaustive: bool
    silent_on_symmetry: bool

    def lookup(self, names: Iterable[str], class_name: str) -> Scheme | None:
        """The scheme of a module that is known under any of `names`."""

    def required(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes that every quantized module has, that of its codes first."""

    def shape(self, tensors: Mapping[str, Any], scheme: Scheme) -> tuple[int, int] | None:
        """(out_features, in_features) by the shapes of a weight's tensors; None where they are stored."""

    def converted(self, tensors: Mapping[str, Any], scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, str]:
        """Suffixes of a weight's tensors that are not those of compressed-tensors, or not laid out as it is today ->
        theirs there."""

    def to_packed(
        self, suffix: str, tensor: torch.Tensor, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[str, torch.Tensor]:
        """One of those as compressed-tensors stores it: (suffix, tensor)."""


class Format(Protocol):
    """A format module. One with act-order takes `act_order=True` in `config` too.

    Attributes:
        METHOD: Its `quant_method`.
        SUFFIXES: The tensor names that replace `weight`, in the order they are written.
        ACT_ORDER: Whether it can hold a g_idx.
        FUSED_EXPERTS: Whether it can hold fused 3-D expert parameters.
        EMBEDDINGS: Whether its readers look up rows of quantized weights.
    """

    METHOD: str
    SUFFIXES: tuple[str, ...]
    ACT_ORDER: bool
    FUSED_EXPERTS: bool
    EMBEDDINGS: bool

    def refuse(self, scheme: Scheme, shape: tuple[int, int], default: Scheme) -> str | None:
        """Why it cannot hold a weight of `shape` (out_features, in_features) in a checkpoint whose main scheme is
        `default`."""

    def pack(self, qweight: QuantWeight) -> dict[str, torch.Tensor]:
        """The tensors of a weight by suffix; also of one on the meta device."""

    def config(self, default: Scheme, exceptions: Mapping[str, Scheme], ignored: Iterable[str]) -> dict:
        """The `quantization_config`: modules (or classes of them) that have another scheme than `default`, the one of
        linears, and modules that are not quantized."""

    def companions(self, quantization_config: dict) -> dict[str, dict]:
        """JSON files that readers look for beside config.json."""

    def detect(self, quantization_config: Mapping) -> bool:
        """Whether a `quantization_config` is one of this format."""

    def parse(self, quantization_config: Mapping) -> StoredConfig:
        """Raises InputError for a config that lowbit cannot read."""


def get_format(name: str) -> Format:
    if name not in FORMATS:
        raise UsageError(f"format {name!r} is not known; allowed: {', '.join(FORMATS)}")
    return cast(Format, import_module(FORMATS[name]))


def is_format(config: dict) -> bool:
    """Whether a checkpoint's `quantization_config` is one of these formats."""
    return any(get_format(name).detect(config) for name in FORMATS)


def detect_format(config: dict) -> str:
    """The name of the format that a checkpoint's `quantization_config` describes; raises InputError if none does."""
    for name in FORMATS:
        if get_format(name).detect(config):
            return name
    method = config.get("quant_method")
    raise InputError(
        f"quantization method {shown(method)} is not one lowbit reads; expected one of: {', '.join(FORMATS)}"
    )
