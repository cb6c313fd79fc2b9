"""Checkpoint formats: QuantWeight to named tensors and back, and the config that describes them. No files.

A format module has
`SUFFIXES`: the tensor names that replace `weight`, in the order they are written;
`ACT_ORDER`, `FUSED_EXPERTS`: whether it can hold a g_idx; fused 3-D expert parameters;
`refuse(scheme, shape, default) -> reason or None`, for a weight of `shape` (out_features, in_features) in a checkpoint
whose main scheme is `default`;
`pack(QuantWeight) -> dict[str, Tensor]`, also of meta tensors;
`config(default, exceptions, ignored) -> dict` (and `act_order=True` where it can hold one);
`companions(config) -> dict[str, dict]`: JSON files that readers look for beside config.json;
`detect(config) -> bool`; `parse(config)`, which says of a checkpoint
    `lookup(names, class_name) -> Scheme or None`, of a module known under any of `names`;
    `exhaustive`: modules that `lookup` finds are all stored quantized; `silent_on_symmetry`: only zeros tell;
    `required(scheme)`: the suffixes that every quantized module has, that of its codes first;
    `shape(tensors, scheme) -> (out_features, in_features)`, None where they are stored;
    `converted(tensors, scheme, shape)`: which suffixes of a weight's tensors are not those of compressed-tensors, or
    not laid out as it is today -> theirs there;
    `to_packed(suffix, tensor, scheme, shape) -> (suffix, tensor)`: one of those as compressed-tensors stores it.

So what is read is always unpacked by `compressed_tensors.unpack_weight`: the tensors of that format, one for one, are
what the layers of lowbit load.
"""

from importlib import import_module

from lowbit.errors import InputError, UsageError
from lowbit.guards.records import shown

FORMATS = {
    "compressed-tensors": "lowbit.formats.compressed_tensors",
    "gptq": "lowbit.formats.gptq",
    "awq": "lowbit.formats.awq",
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
    raise InputError(
        f"quantization method {shown(method)} is not one lowbit reads; expected one of: {', '.join(FORMATS)}"
    )
