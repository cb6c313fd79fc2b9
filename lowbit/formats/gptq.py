"""GPTQ: the layout of AutoGPTQ and GPTQModel, in its two versions.

Tensors of a module X with weight [N, K]: `qweight` int32 [K*bits/32, N] (a bit stream down K), `qzeros` int32
[G, N*bits/32] (along N), `scales` [G, N], `g_idx` int32 [K], the group of each input. Version 1 (`checkpoint_format`
"gptq") stores zero - 1, version 2 ("gptq_v2") the zero itself. Some readers of version 1 add that one to whole words,
where a zero of 0 carries into its neighbour: symmetric weights, whose zeros are never 0, are written as version 1,
which everybody reads, asymmetric ones as version 2.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from lowbit.errors import InputError, UsageError
from lowbit.formats.bitpack import pack as pack_bits
from lowbit.formats.bitpack import unpack
from lowbit.guards.patterns import Patterns
from lowbit.guards.records import record, shown
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

METHOD = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
ACT_ORDER, FUSED_EXPERTS, EMBEDDINGS = True, False, False
_BITS = (2, 3, 4, 8)  # what its writers have in common
_PACKED = dict(zip(SUFFIXES, ("weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"), strict=True))


def refuse(scheme: Scheme, shape: tuple[int, int], default: Scheme) -> str | None:
    if scheme.activations is not None:
        return f"gptq has no quantized activations, which {scheme.name} asks for"
    if scheme.bits not in _BITS:
        return f"gptq has {', '.join(map(str, _BITS))} bits, not {scheme.bits}: compressed-tensors holds them"
    unit = 32 // math.gcd(scheme.bits, 32)
    if shape[0] % unit or shape[1] % unit:
        return f"gptq packs {unit} codes of {scheme.bits} bits together, which do not divide {shape[0]} x {shape[1]}"
    if scheme.sym != default.sym:
        return "a gptq checkpoint is symmetric as a whole or not at all"
    return None


def pack(qweight: QuantWeight) -> dict[str, torch.Tensor]:
    scheme, in_features = qweight.scheme, qweight.in_features
    zeros, g_idx = qweight.zeros, qweight.g_idx
    if zeros is None:
        zeros = torch.full_like(qweight.scales, scheme.middle - 1, dtype=torch.uint8)  # version 1
    if g_idx is None:
        g_idx = torch.arange(in_features, device=qweight.codes.device) // scheme.group_of(in_features)
    return {
        "qweight": pack_bits(qweight.codes, scheme.bits).T.contiguous(),
        "qzeros": pack_bits(zeros.T.contiguous(), scheme.bits),
        "scales": qweight.scales.T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }


def config(default: Scheme, exceptions: Mapping[str, Scheme], ignored: Iterable[str], act_order: bool = False) -> dict:
    """The `quantization_config` of a checkpoint; `dynamic` lists the modules that differ from `default` or are left."""
    # an exact name each: `re.match` reads these in GPTQModel, vLLM and SGLang
    dynamic: dict[str, dict] = {f"-:^{re.escape(name)}$": {} for name in ignored}
    for name, scheme in exceptions.items():
        dynamic[f"+:^{re.escape(name)}$"] = {"bits": scheme.bits, "group_size": scheme.group_size}
    version = "gptq" if default.sym else "gptq_v2"
    return {
        "quant_method": METHOD,
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "desc_act": act_order,
        "lm_head": False,
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def detect(quantization_config: Mapping) -> bool:
    return quantization_config.get("quant_method") == METHOD


def parse(quantization_config: Mapping) -> "StoredGPTQ":
    return StoredGPTQ(quantization_config)


@dataclass(frozen=True)
class _Settings:
    """Of all modules, or of an exception. None: not said (null is refused)."""

    bits: int = None  # type: ignore[assignment]
    group_size: int = None  # type: ignore[assignment]
    sym: bool = None  # type: ignore[assignment]


@dataclass(frozen=True)
class _Config(_Settings):
    """What is read of the `quantization_config`."""

    checkpoint_format: str | None = None
    format: str | None = None
    pack_dtype: str = "int32"
    dynamic: dict[str, _Settings | None] | None = field(default_factory=dict)


class StoredGPTQ:
    """What the config of a GPTQ checkpoint says of modules that are stored quantized."""

    exhaustive, silent_on_symmetry = False, False

    def __init__(self, quantization_config: Mapping):
        config = record(_Config, quantization_config, "quantization_config")
        self.form = config.checkpoint_format or config.format or "gptq"
        if self.form not in ("gptq", "gptq_v2"):
            raise InputError(f"checkpoint_format {shown(self.form)} cannot be read; expected 'gptq' or 'gptq_v2'")
        if config.pack_dtype.removeprefix("torch.") != "int32":
            raise InputError(f"pack_dtype {shown(config.pack_dtype)} cannot be read; expected 'int32'")
        self._default = _scheme(config)
        dynamic = config.dynamic or {}
        self._exceptions = [
            None if pattern.startswith("-:") else _scheme(settings or _Settings(), config)
            for pattern, settings in dynamic.items()
        ]
        regexes = (pattern.removeprefix("-:").removeprefix("+:") for pattern in dynamic)
        self._patterns = Patterns(regexes, "quantization_config.dynamic")

    def lookup(self, names: Iterable[str], class_name: str) -> Scheme | None:
        """The scheme of a module known under any of `names` if it is stored quantized; the first regex that matches
        decides, as in GPTQModel."""
        place = self._patterns.first(names)
        return self._default if place is None else self._exceptions[place]

    def required(self, scheme: Scheme) -> tuple[str, ...]:
        return SUFFIXES[:-1]  # g_idx is younger than the format

    def shape(self, tensors: Mapping, scheme: Scheme) -> tuple[int, int]:
        words, out_features = tensors["qweight"].shape
        return out_features, words * 32 // scheme.bits

    def converted(self, tensors: Mapping, scheme: Scheme, shape: tuple[int, int]) -> dict[str, str]:
        return {suffix: _PACKED[suffix] for suffix in tensors}

    def to_packed(
        self, suffix: str, tensor: torch.Tensor, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[str, torch.Tensor]:
        """What compressed-tensors would store of one tensor: but for its version 1, the same bits transposed."""
        if suffix == "g_idx":
            return _PACKED[suffix], tensor
        if suffix == "qzeros" and self.form == "gptq":
            zeros = (unpack(tensor, scheme.bits, shape[0]) + 1).bitwise_and_(scheme.levels - 1)
            tensor = pack_bits(zeros, scheme.bits)
        return _PACKED[suffix], tensor.T.contiguous()


def _scheme(settings: _Settings, usual: _Settings | None = None) -> Scheme:
    """What `settings` say, or where they say nothing `usual`."""

    def said(key: str, default):
        values = (getattr(source, key) for source in (settings, usual) if source is not None)
        return next((value for value in values if value is not None), default)

    try:
        made = Scheme(said("bits", None), said("group_size", 128), said("sym", True))
    except UsageError as error:
        raise InputError(f"lowbit cannot run this checkpoint: {error}") from None
    if made.bits not in _BITS:
        raise InputError(f"gptq with {made.bits} bits cannot be read; expected {', '.join(map(str, _BITS))}")
    return made


def companions(quantization_config: dict) -> dict[str, dict]:
    """Files that older readers look for beside config.json."""
    return {"quantize_config.json": quantization_config}
