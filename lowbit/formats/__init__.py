"""Checkpoint formats: QuantWeight to named tensors and back, and the config that describes them. No files.

A format module has
`SUFFIXES`: the tensor names that replace `weight`, in the order they are written;
`pack(QuantWeight) -> dict[str, Tensor]` and `unpack_weight(tensors, scheme, out_features, in_features) -> QuantWeight`;
`config(default, exceptions, ignored, targets) -> dict`;
`detect(config) -> bool`; `schemes(config) -> SchemeMap`;
`refuse(scheme) -> reason or None`.
"""

from importlib import import_module

from lowbit.errors import InputError, UsageError

FORMATS = {
    "compressed-tensors": "lowbit.formats.compressed_tensors",
}


def get_format(name: str):
    if name not in FORMATS:
        raise UsageError(f"format {name!r} is not known; allowed: {', '.join(FORMATS)}")
    return import_module(FORMATS[name])


def detect_format(config: dict) -> str:
    """The name of the format that a checkpoint's `quantization_config` describes; raises InputError if none does."""
    for name in FORMATS:
        if get_format(name).detect(config):
            return name
    method = config.get("quant_method")
    raise InputError(f"quantization method {method!r} is not one lowbit reads; expected one of: {', '.join(FORMATS)}")
