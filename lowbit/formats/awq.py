"""AWQ in its `gemm` version: the 4-bit layout of AutoAWQ.

Tensors of a module X with weight [N, K]: `qweight` int32 [K, N/8], `qzeros` int32 [G, N/8], `scales` [G, N]. Each word
holds eight columns of N, the even ones in its lower half. Zeros are always stored, symmetric ones too: readers expect
them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from lowbit.errors import InputError, UsageError
from lowbit.formats.bitpack import pack as pack_bits
from lowbit.formats.bitpack import unpack
from lowbit.guards.records import record, shown
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

METHOD = "awq"
SUFFIXES = ("qweight", "qzeros", "scales")
ACT_ORDER, FUSED_EXPERTS, EMBEDDINGS = False, False, False
_PACKED = dict(zip(SUFFIXES, ("weight_packed", "weight_zero_point", "weight_scale"), strict=True))
_BITS = 4
# Words that are taken apart at a time: what that needs beside the result stays in a cache
_WORDS_AT_ONCE = 2**16
# The column of a word's eight that lies at each nibble
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(_ORDER.index(column) for column in range(8))


def refuse(scheme: Scheme, shape: tuple[int, int], default: Scheme) -> str | None:
    if scheme.activations is not None:
        return f"awq has no quantized activations, which {scheme.name} asks for"
    if scheme.bits != _BITS:
        return f"awq has {_BITS} bits, not {scheme.bits}"
    if shape[0] % 8:
        return f"awq packs 8 outputs together, which do not divide {shape[0]}"
    if scheme.group_size != default.group_size:
        return f"an awq checkpoint has one group_size for all layers: {default.group_size}, here {scheme.group_size}"
    return None


def _columns(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[R, N], the eight columns of each word in another order."""
    return tensor.unflatten(1, (-1, 8))[:, :, list(order)].flatten(1)


def _packed_the_other_way(words: torch.Tensor) -> torch.Tensor:
    """int32 [N, K/8]: the codes of words [K, N/8], with eight of a row in a word."""
    columns = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % 8)).T.contiguous()
    packed = words.new_empty(len(columns), 8, columns.shape[1] // 2, dtype=torch.uint8)
    at_once = max(1, _WORDS_AT_ONCE // columns.shape[1])
    for some, made in zip(columns.split(at_once), packed.split(at_once), strict=True):
        for place, column in enumerate(_ORDER):
            pairs = (some >> place * _BITS & 0xF).view(torch.int64)  # codes 32 bits apart, which become a byte
            made[:, column] = pairs | pairs >> 32 - _BITS
    return packed.flatten(0, 1).view(torch.int32)


def pack(qweight: QuantWeight) -> dict[str, torch.Tensor]:
    qweight.require_natural_order("awq")
    zeros = qweight.zeros
    if zeros is None:
        zeros = torch.full_like(qweight.scales, qweight.scheme.middle, dtype=torch.uint8)
    return {
        "qweight": pack_bits(_columns(qweight.codes.T, _ORDER), _BITS),
        "qzeros": pack_bits(_columns(zeros.T, _ORDER), _BITS),
        "scales": qweight.scales.T.contiguous(),
    }


def config(default: Scheme, exceptions: Mapping[str, Scheme], ignored: Iterable[str]) -> dict:
    """The `quantization_config` of a checkpoint. Exceptions differ in symmetry alone, which does not show."""
    ignored = list(ignored)
    return {
        "quant_method": METHOD,
        "bits": default.bits,
        "group_size": default.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ignored or None,
        # the same for GPTQModel, which reads no other word for it
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignored},
    }


def detect(quantization_config: Mapping) -> bool:
    return quantization_config.get("quant_method") == METHOD


def parse(quantization_config: Mapping) -> "StoredAWQ":
    return StoredAWQ(quantization_config)


@dataclass(frozen=True)
class _Config:
    """What is read of the `quantization_config`; AutoAWQ has two names for some of it."""

    version: str = "gemm"
    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None


class StoredAWQ:
    """What the config of an AWQ checkpoint says: one scheme for whatever is stored quantized."""

    exhaustive, silent_on_symmetry = False, True

    def __init__(self, quantization_config: Mapping):
        config = record(_Config, quantization_config, "quantization_config")
        if config.version.lower() != "gemm":
            raise InputError(f"awq version {shown(config.version)} cannot be read; expected 'gemm'")
        bits = config.w_bit if config.bits is None else config.bits
        group_size = config.q_group_size if config.group_size is None else config.group_size
        if bits != _BITS:
            raise InputError(f"awq with {bits!r} bits cannot be read; expected {_BITS}")
        try:
            self._scheme = Scheme(bits, group_size, sym=False)  # type: ignore[arg-type]  # which refuses None
        except UsageError as error:
            raise InputError(f"lowbit cannot run this checkpoint: {error}") from None

    def lookup(self, names: Iterable[str], class_name: str) -> Scheme | None:
        return self._scheme

    def required(self, scheme: Scheme) -> tuple[str, ...]:
        return SUFFIXES

    def shape(self, tensors: Mapping, scheme: Scheme) -> tuple[int, int]:
        in_features, words = tensors["qweight"].shape
        return 8 * words, in_features

    def converted(self, tensors: Mapping, scheme: Scheme, shape: tuple[int, int]) -> dict[str, str]:
        return {suffix: _PACKED[suffix] for suffix in tensors}

    def to_packed(
        self, suffix: str, tensor: torch.Tensor, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[str, torch.Tensor]:
        """What compressed-tensors would store of one tensor: another axis for the codes, another order of columns."""
        if suffix == "scales":
            return _PACKED[suffix], tensor.T.contiguous()
        if suffix == "qweight":
            return _PACKED[suffix], _packed_the_other_way(tensor)
        values = _columns(unpack(tensor, _BITS, shape[0]), _PLACES)
        return _PACKED[suffix], pack_bits(values, _BITS).T.contiguous()


def companions(quantization_config: dict) -> dict[str, dict]:
    return {}
