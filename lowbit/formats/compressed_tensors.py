"""compressed-tensors `pack-quantized` and `int-quantized`: integers as llm-compressor writes and vLLM reads them.

Tensors of a module X with weight [N, K] in `pack-quantized`: `weight_packed` int32 [N, ceil(K*bits/32)], `weight_scale`
[N, G], `weight_zero_point` int32 [ceil(N*bits/32), G] (asymmetric only, packed along N), `weight_shape` int64 [2] =
[N, K]. In `int-quantized`, which weights of 8 bits are stored in where activations are quantized: `weight` int8 [N, K],
`weight_scale` [N, G], `weight_zero_point` int8 [N, G] (asymmetric only), signed: a code of ours less 128. In both,
where activations are static: `input_scale` [1], `input_zero_point` int8 [1] (asymmetric only). The spec is the
compressed-tensors package; facts that are easy to get wrong are marked below.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from lowbit.errors import InputError, UsageError
from lowbit.formats.bitpack import pack as pack_bits
from lowbit.formats.bitpack import packed_width, unpack
from lowbit.guards.patterns import Patterns
from lowbit.guards.records import record, shown
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.scheme import PER_CHANNEL, Activations, Scheme
from lowbit.parallel.part import EXPERTS, INPUTS, Part

METHOD = "compressed-tensors"
# Codes and scales of fused experts are stored as they are in memory where a family stores them fused
ACT_ORDER, FUSED_EXPERTS, EMBEDDINGS = False, True, True
PACKED_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
SUFFIXES = ("weight", *PACKED_SUFFIXES, "input_scale", "input_zero_point")
_PACK, _INT, _MIXED = "pack-quantized", "int-quantized", "mixed-precision"
# The version of the layout we follow (dense 3-bit); readers show it and dispatch on nothing
_LAYOUT_VERSION = "0.20.0"


def refuse(scheme: Scheme, shape: tuple[int, int], default: Scheme) -> str | None:
    return None


def _stored_as(scheme: Scheme) -> str:
    """The name of the layout that llm-compressor takes for the scheme."""
    return _INT if scheme.bits == 8 and scheme.activations is not None else _PACK


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """Those that every module of the scheme has; the first is that of the codes."""
    present = {"weight", "weight_scale"} if _stored_as(scheme) == _INT else {*PACKED_SUFFIXES}
    present = present - {"weight_zero_point"} if scheme.sym else present | {"weight_zero_point"}
    present.update(INPUT_SUFFIXES[name] for name in input_grid(scheme))
    return tuple(s for s in SUFFIXES if s in present)


# Fields of a QuantWeight -> how they are stored
INPUT_SUFFIXES = {"input_scale": "input_scale", "input_zero": "input_zero_point"}


def _signed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes of 8 bits -> the int8 that lie 128 below."""
    return (codes ^ 128).contiguous().view(torch.int8)


def pack(qweight: QuantWeight) -> dict[str, torch.Tensor]:
    """Meta tensors give meta tensors: the exact shapes and dtypes that a file will hold."""
    qweight.require_natural_order("compressed-tensors")
    bits, zeros = qweight.scheme.bits, qweight.zeros
    tensors = {"weight_scale": qweight.scales}
    if _stored_as(qweight.scheme) == _INT:
        tensors["weight"] = _signed(qweight.codes)
        if zeros is not None:
            tensors["weight_zero_point"] = _signed(zeros)
    else:
        tensors["weight_packed"] = pack_bits(qweight.codes, bits)
        tensors["weight_shape"] = torch.tensor(qweight.codes.shape, dtype=torch.int64)
        if zeros is not None:
            tensors["weight_zero_point"] = pack_bits(zeros.T.contiguous(), bits).T.contiguous()
    tensors |= {INPUT_SUFFIXES[name]: getattr(qweight, name) for name in input_grid(qweight.scheme)}
    return {suffix: tensors[suffix] for suffix in suffixes(qweight.scheme)}


def shapes(
    scheme: Scheme, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """(shape, dtype) of each tensor of one linear; dtype None stands for the model's floating dtype."""
    groups = scheme.groups(in_features)
    zeros = ((packed_width(out_features, scheme.bits), groups), torch.int32)
    table = {
        "weight": ((out_features, in_features), torch.int8),
        "weight_packed": ((out_features, packed_width(in_features, scheme.bits)), torch.int32),
        "weight_scale": ((out_features, groups), None),
        "weight_zero_point": ((out_features, groups), torch.int8) if _stored_as(scheme) == _INT else zeros,
        "weight_shape": ((2,), torch.int64),
        "input_scale": ((1,), torch.float32),
        "input_zero_point": ((1,), torch.int8),
    }
    return {suffix: table[suffix] for suffix in suffixes(scheme)}


def part_of(
    suffix: str, tensor: torch.Tensor, scheme: Scheme, shape: tuple[int, int], dim: int, part: Part
) -> torch.Tensor:
    """What the tensor of a weight [N, K] = `shape` becomes where a part of its outputs or inputs is kept, or that of
    experts [E, N, K] where a part of any of the three is.

    Parts of codes that lie inside of words are taken out and packed anew. Parts of inputs are whole groups.
    """
    if dim == EXPERTS:
        return part.of(tensor, 0) if suffix not in INPUT_SUFFIXES.values() else tensor
    if suffix == "weight_shape":
        side = (torch.arange(tensor.shape[-1]) % 2 == dim + 2).to(tensor.device)
        return torch.where(side, tensor // part.size, tensor)
    if suffix in INPUT_SUFFIXES.values():
        return tensor
    if _STREAM_DIM.get(suffix) == dim + 2 and tensor.dtype == torch.int32:
        rows = tensor.movedim(dim, -1)
        codes = part.of(unpack(rows.reshape(-1, rows.shape[-1]), scheme.bits, shape[dim]), 1)
        return pack_bits(codes.contiguous(), scheme.bits).view(*rows.shape[:-1], -1).movedim(-1, dim).contiguous()
    if dim == INPUTS and suffix in ("weight_scale", "weight_zero_point") and scheme.groups(shape[1]) == 1:
        return tensor
    return part.of(tensor, dim).contiguous()


def unpack_weight(
    tensors: Mapping[str, torch.Tensor],
    scheme: Scheme,
    out_features: int,
    in_features: int,
    codes: torch.Tensor | None = None,
) -> QuantWeight:
    """The inverse of `pack`; raises InputError for a packed width that does not belong to the scheme. codes: uint8
    [out_features, in_features], contiguous, where to put those of the weight (default: fresh memory)."""
    grid = {name: tensors[INPUT_SUFFIXES[name]] for name in input_grid(scheme)}
    if grid:
        grid["input_scale"] = grid["input_scale"].float()
    if _stored_as(scheme) == _INT:
        codes = torch.bitwise_xor(tensors["weight"].view(torch.uint8), 128, out=codes)
        zeros = None if scheme.sym else tensors["weight_zero_point"].view(torch.uint8) ^ 128
        return QuantWeight(codes, tensors["weight_scale"], scheme, zeros, **grid)
    packed = tensors["weight_packed"]
    if packed.shape[1] != packed_width(in_features, scheme.bits):
        raise InputError(
            f"weight_packed has {packed.shape[1]} words a row, expected {packed_width(in_features, scheme.bits)} "
            f"for {in_features} inputs of {scheme.bits} bits"
        )
    codes = unpack(packed, scheme.bits, in_features, codes)
    zeros = None
    if not scheme.sym:
        packed_zeros = tensors["weight_zero_point"]
        expected = [packed_width(out_features, scheme.bits), scheme.groups(in_features)]
        if list(packed_zeros.shape) != expected:
            raise InputError(f"weight_zero_point has shape {list(packed_zeros.shape)}, expected {expected}")
        zeros = unpack(packed_zeros.T, scheme.bits, out_features).T.contiguous()
    # no file of this format has one: other formats' act-order, on its way into memory
    return QuantWeight(codes, tensors["weight_scale"], scheme, zeros, tensors.get("weight_g_idx"), **grid)


def _weight_args(scheme: Scheme) -> dict:
    per_channel = scheme.group_size == PER_CHANNEL
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else scheme.group_size,
        "dynamic": False,
    }


def _activation_args(scheme: Scheme) -> dict | None:
    activations = scheme.activations
    if activations is None:
        return None
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": activations.sym,
        "strategy": activations.strategy,
        "dynamic": not activations.static,
    }


def config(default: Scheme, exceptions: Mapping[str, Scheme], ignored: Iterable[str]) -> dict:
    """The `quantization_config` of a checkpoint.

    exceptions: module name -> Scheme where it differs from `default`, or name of a class that is not nn.Linear. They
    become config groups that list exact names: compressed-tensors sorts overlapping regexes alphabetically while vLLM
    keeps their order; exact names win in both.
    """

    def group(group_targets, scheme):
        # no other key may stand here: readers validate these dicts strictly
        return {
            "targets": list(group_targets),
            "weights": _weight_args(scheme),
            "input_activations": _activation_args(scheme),
            "output_activations": None,
            "format": _stored_as(scheme),
        }

    groups = {"group_0": group(["Linear"], default)}
    for scheme in sorted(set(exceptions.values()), key=lambda s: s.name):
        names = [name for name, other in exceptions.items() if other == scheme]
        groups[f"group_{len(groups)}"] = group(names, scheme)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        # without this status transformers would run on random weights
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _LAYOUT_VERSION,
    }


def detect(quantization_config: Mapping) -> bool:
    return quantization_config.get("quant_method") == METHOD


@dataclass(frozen=True)
class _Args:
    """How weights, or activations, are quantized."""

    num_bits: int | None = None
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | str = False
    actorder: bool | str | None = None


@dataclass(frozen=True)
class _Group:
    targets: list[str] | None = None
    weights: _Args | None = None
    input_activations: _Args | None = None
    output_activations: dict | None = None
    format: str | None = None


@dataclass(frozen=True)
class _Config:
    """What is read of the `quantization_config`."""

    config_groups: dict[str, _Group]
    quantization_status: str | None = None
    format: str | None = None
    ignore: list[str] | None = None
    transform_config: dict | None = None


def _scheme_of(group: _Group, fallback_format: str | None) -> Scheme:
    stored = group.format or fallback_format
    if stored not in (_PACK, _INT):
        raise InputError(
            f"compressed-tensors format {shown(stored)} is not of integers; expected {_PACK!r} or {_INT!r}"
        )
    weights = group.weights or _Args()
    if weights.type != "int":
        raise InputError(f"weights of type {shown(weights.type)} cannot be read; expected 'int'")
    if group.output_activations:
        raise InputError("output_activations are quantized in this checkpoint; expected those of inputs at most")
    if weights.actorder in ("group", "dynamic"):
        raise InputError(
            "actorder 'group' needs g_idx, which pack-quantized no longer carries; expected null or 'static'"
        )
    if weights.strategy not in ("group", "channel"):
        raise InputError(f"strategy {shown(weights.strategy)} cannot be read; expected 'group' or 'channel'")
    group_size = PER_CHANNEL if weights.strategy == "channel" else weights.group_size
    try:
        activations = _activations_of(group.input_activations)
        # None is refused like any other number
        scheme = Scheme(weights.num_bits, group_size, weights.symmetric, activations)  # type: ignore[arg-type]
    except UsageError as error:
        raise InputError(f"lowbit cannot run this checkpoint: {error}") from None
    if stored != _stored_as(scheme):
        raise InputError(f"{scheme.name} is stored as {stored!r} in this checkpoint; expected {_stored_as(scheme)!r}")
    return scheme


def _activations_of(args: _Args | None) -> Activations | None:
    if args is None:
        return None
    if args.type != "int":
        raise InputError(f"input_activations of type {shown(args.type)} cannot be read; expected 'int'")
    activations = Activations(args.num_bits, args.symmetric, args.strategy)  # type: ignore[arg-type]  # None is refused
    if args.dynamic is activations.static:
        raise InputError(
            f"input_activations of strategy {activations.strategy!r} are expected to "
            f"{'be static' if activations.static else 'be dynamic'}, found dynamic {shown(args.dynamic)}"
        )
    return activations


class SchemeMap:
    """Which scheme each module of a checkpoint has, by the rules of compressed-tensors: ignore wins over targets;
    an exact name beats a regex (anchored at its start, tried in alphabetical order), which beats a class name."""

    exhaustive, silent_on_symmetry = True, False

    def __init__(self, quantization_config: Mapping):
        config = record(_Config, quantization_config, "quantization_config")
        if config.quantization_status != "compressed":
            raise InputError(
                f"quantization_status is {shown(config.quantization_status)}, expected 'compressed': the weights are "
                "not packed"
            )
        self.targets: dict[str, Scheme] = {}
        if config.transform_config:
            raise InputError("the checkpoint has a transform_config (rotated activations); expected plain weights")
        for name, group in config.config_groups.items():
            if not group.targets:
                raise InputError(
                    f"config group {shown(name)} has no targets; expected class names, module names or regexes"
                )
            self.targets.update(dict.fromkeys(group.targets, _scheme_of(group, config.format)))
        self._ignored = _Targets(config.ignore or (), "quantization_config.ignore")
        self._chosen = _Targets(self.targets, "targets of quantization_config")

    def lookup(self, names: Iterable[str], class_name: str) -> Scheme | None:
        """The scheme of a module known under any of `names`, None if it is not quantized."""
        names = list(names)
        if self._ignored.first(names, class_name) is not None:
            return None
        target = self._chosen.first(names, class_name)
        return None if target is None else self.targets[target]

    def required(self, scheme: Scheme) -> tuple[str, ...]:
        return suffixes(scheme)

    def shape(self, tensors: Mapping, scheme: Scheme) -> tuple[int, int] | None:
        """(out_features, in_features) are stored, in `weight_shape`, where they do not show."""
        return tuple(tensors["weight"].shape[-2:]) if _stored_as(scheme) == _INT else None

    def converted(self, tensors: Mapping, scheme: Scheme, shape: tuple[int, int]) -> dict[str, str]:
        """Before version 0.18, ten codes of 3 bits lay in a word, which lost two of its bits."""
        if scheme.bits != 3:
            return {}
        width = tensors["weight_packed"].shape[-1]
        if width != -(-shape[1] // 10) or width == packed_width(shape[1], 3):
            return {}
        return {suffix: suffix for suffix in _STREAM_DIM if suffix in tensors}

    def to_packed(
        self, suffix: str, tensor: torch.Tensor, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[str, torch.Tensor]:
        if scheme.bits != 3:  # of another config group
            return suffix, tensor
        dim = _STREAM_DIM[suffix]
        words = tensor.movedim(dim, 1)
        codes = torch.stack([words >> 3 * place & 7 for place in range(10)], -1).flatten(1)[:, : shape[dim]]
        return suffix, pack_bits(codes.to(torch.uint8), 3).movedim(1, dim).contiguous()


# The dimension along which codes lie in words
_STREAM_DIM = {"weight_packed": 1, "weight_zero_point": 0}


def parse(quantization_config: Mapping) -> SchemeMap:
    return SchemeMap(quantization_config)


def companions(quantization_config: dict) -> dict[str, dict]:
    return {}


class _Targets:
    """What `targets` or `ignore` list: names of modules, regexes behind "re:", names of classes."""

    def __init__(self, targets: Iterable[str], where: str):
        self._places = {target: place for place, target in reversed(list(enumerate(targets)))}
        self._regexes = sorted(target for target in self._places if target.startswith("re:"))
        self._patterns = Patterns((target.removeprefix("re:") for target in self._regexes), where)

    def first(self, names: list[str], class_name: str) -> str | None:
        """The one that decides over a module known under any of `names`."""
        listed = min((name for name in names if name in self._places), key=self._places.__getitem__, default=None)
        if listed is not None:
            return listed
        place = self._patterns.first(names)
        if place is not None:
            return self._regexes[place]
        return class_name if class_name in self._places else None
