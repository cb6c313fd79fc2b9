"""The quantized weights of a checkpoint folder, whatever its format.

Configs do not tell all: GPTQ and AWQ do not list what is quantized, their `sym` and `desc_act` are often wrong, and AWQ
has no word for symmetric. Zeros and g_idx do tell; they are small, and are read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.checked import check_finite, read_checked
from lowbit.checkpoint.extras import judge
from lowbit.checkpoint.gguf.tensors import GgufIntegers
from lowbit.errors import InputError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.formats import detect_format, get_format
from lowbit.formats.bitpack import unpack
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.scheme import Scheme

_MOST_CODES = 16  # in a word of 32 bits, of 2 bits each
# What other writers store in 32 or in 64 bits
_ANY_INTEGER = ("weight_shape", "g_idx")


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of `shape` (out_features, in_features); `tensors` are those of the file, by suffix.

    experts: how many are stacked in each tensor, 0 for a plain one. act_order: its g_idx is not k // group_size.
    """

    base: str
    tensors: dict[str, TensorInfo]
    scheme: Scheme
    shape: tuple[int, int]
    experts: int = 0
    act_order: bool = False

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return next(t.dtype for t in self.tensors.values() if t.dtype.is_floating_point)


class StoredWeights:
    """format: its name, None if nothing is quantized. weights: base name -> StoredWeight. plain: all other tensors.

    What is stored quantized is; the config says by which scheme. known_as: what finds other names that the config may
    know a weight by, those of its module in memory, and the class of that.

    Raises InputError for tensors that are missing or fit neither each other nor the config.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        known_as: Callable[[str], tuple[Iterable[str], str]] = lambda base: ((), "Linear"),
    ):
        self.reader, self._known_as = reader, known_as
        config = reader.quantization_config
        self.format = detect_format(config) if config else None
        self.weights: dict[str, StoredWeight] = {}
        self.plain: list[TensorInfo] = list(reader.tensors.values())
        if self.format is None:
            return
        self.config = self.fmt.parse(config)
        grouped, self.plain = defaultdict(dict), []
        for tensor in reader.tensors.values():
            base, suffix = _split(tensor, self.fmt.SUFFIXES)
            if suffix:
                grouped[base][suffix] = tensor
            else:
                self.plain.append(tensor)
        for base, tensors in grouped.items():
            self.weights[base] = self._weight(base, tensors)
        self._believe_zeros()

    @property
    def tells_classes_apart(self) -> bool:
        """Whether the config has schemes of modules that are no linears: only the model tells which these are."""
        return self.format is not None and self.config.exhaustive and "Embedding" in self.config.targets

    @property
    def fmt(self):
        """The module of the format."""
        return get_format(self.format)

    def quantized(self, weight: StoredWeight) -> list[QuantWeight]:
        """Read a weight: one matrix, or one for each of its experts. Raises InputError for NaN and infinite scales."""
        first = next(iter(weight.tensors.values()))
        if isinstance(first, GgufIntegers):  # all parts are of the same blocks: these are read and taken apart once
            matrices = first.matrices()
            for matrix in matrices:
                check_finite(matrix.scales, weight.tensors["weight_scale"])
            return matrices
        tensors = {suffix: read_checked(self.reader, info.name) for suffix, info in weight.tensors.items()}
        return self.unpacked(weight, tensors)

    def unpacked(self, weight: StoredWeight, tensors: dict[str, torch.Tensor]) -> list[QuantWeight]:
        """The same, of tensors that were read already, whatever their scales are."""
        if not weight.experts:
            return [self._unpack(weight, tensors)]
        each = ({suffix: tensor[e] for suffix, tensor in tensors.items()} for e in range(weight.experts))
        return [self._unpack(weight, matrix) for matrix in each]

    def _unpack(self, weight: StoredWeight, tensors: dict[str, torch.Tensor]) -> QuantWeight:
        converted = self.config.converted(weight.tensors, weight.scheme, weight.shape)
        packed = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in converted}
        packed |= dict(self.config.to_packed(s, tensors[s], weight.scheme, weight.shape) for s in converted)
        if not weight.act_order:
            packed.pop("weight_g_idx", None)
        return packed_format.unpack_weight(packed, weight.scheme, *weight.shape)

    def _weight(self, base: str, tensors: dict[str, TensorInfo]) -> StoredWeight:
        """Of the scheme that the config names; where its tensors are of another one, of the only other that fits: names
        of modules change from one version of transformers to the next, tensors do not."""
        names, class_name = self._known_as(base)
        scheme = self.config.lookup([base, *names], class_name) or self.config.lookup([base], class_name)
        others = {other for other in self.config.targets.values() if other != scheme} if self.config.exhaustive else {}
        try:
            if scheme is None:
                raise InputError(f"{base} is stored quantized, but the quantization_config leaves it out")
            return self._of_scheme(base, tensors, scheme)
        except InputError:
            fitting = []
            for other in others if scheme is not None else ():
                try:
                    fitting.append(self._of_scheme(base, tensors, other))
                except InputError:
                    continue
            if len(fitting) != 1:
                raise
            return fitting[0]

    def _of_scheme(self, base: str, tensors: dict[str, TensorInfo], scheme: Scheme) -> StoredWeight:
        required = self.config.required(scheme)
        for suffix in required:
            if suffix not in tensors:
                raise InputError(f"{base}.{suffix} is not in the checkpoint: it is incomplete")
        _check_kinds(tensors)
        lead = tensors[required[0]].shape[:-2]
        if len(lead) > self.fmt.FUSED_EXPERTS or len(tensors[required[0]].shape) < 2 or 0 in lead:
            raise InputError(f"{base} is not stored as a matrix: the checkpoint is damaged, or not {self.format}")
        shape = self.config.shape(tensors, scheme)
        if shape is None:
            shape = self._stored_shape(tensors["weight_shape"], tensors[required[0]])
        if min(shape) < 1 or not scheme.fits(shape[1]):
            raise InputError(f"{base} is {list(shape)}, which group_size {scheme.group_size} does not divide")
        weight = StoredWeight(base, tensors, scheme, shape, experts=lead[0] if lead else 0)
        self._check_shapes(weight, lead)
        self._check_inputs(weight)
        if self.config.exhaustive:
            _, refused = judge(self.reader, [tensors[suffix].name for suffix in tensors if suffix not in required])
            for name, reason in refused.items():
                raise InputError(f"{name} is not expected of {scheme.name}: {reason}")
        return replace(weight, act_order=self._has_act_order(weight))

    def _stored_shape(self, info: TensorInfo, packed: TensorInfo) -> tuple[int, int]:
        """packed: the tensor of the codes, which bounds what the shape may be."""
        *lead, rows, words = packed.shape
        if info.shape != (*lead, 2) or info.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"{info.name} is {info.dtype} of shape {list(info.shape)}, expected torch.int64 of {[*lead, 2]}"
            )
        first, *others = map(tuple, self.reader.tensor(info.name).view(-1, 2).tolist())
        if first[0] != rows or not 0 < first[1] <= words * _MOST_CODES or any(other != first for other in others):
            raise InputError(
                f"{info.name} holds {list(first)}, which {packed.name} of {[*lead, rows, words]} cannot be"
            )
        return first

    def _check_shapes(self, weight: StoredWeight, lead: tuple[int, ...]) -> None:
        written = self.fmt.pack(QuantWeight.meta(*weight.shape, weight.scheme, weight.dtype))
        # of compressed-tensors, what is not laid out as it is written today has other shapes
        older = self.config.converted(weight.tensors, weight.scheme, weight.shape) if self.config.exhaustive else {}
        for suffix, info in weight.tensors.items():
            expected = (*lead, *written[suffix].shape) if suffix in written else info.shape
            if info.shape != expected and suffix not in older:
                raise InputError(f"{info.name} has shape {list(info.shape)}, expected {list(expected)}")
            of_codes = suffix in written and suffix not in _ANY_INTEGER and not info.dtype.is_floating_point
            if of_codes and info.dtype != written[suffix].dtype:
                raise InputError(f"{info.name} is {info.dtype}, expected {written[suffix].dtype}")

    def _check_inputs(self, weight: StoredWeight) -> None:
        """The grid of static activations: one number each, that every token depends on."""
        for name in input_grid(weight.scheme):
            info = weight.tensors[packed_format.INPUT_SUFFIXES[name]]
            value = self.reader.tensor(info.name)
            if name == "input_scale" and not (value.isfinite() & (value > 0)).all():
                raise InputError(f"{info.name} is {value.item()}, expected a positive number: calibrate the model anew")
            if name == "input_zero" and info.dtype != torch.int8:
                raise InputError(f"{info.name} is {info.dtype}, expected torch.int8: a code from -128 to 127")

    def _has_act_order(self, weight: StoredWeight) -> bool:
        if "g_idx" not in weight.tensors:
            return False
        info, (_, in_features) = weight.tensors["g_idx"], weight.shape
        g_idx, group = self.reader.tensor(info.name).long(), weight.scheme.group_of(in_features)
        if torch.equal(g_idx, torch.arange(in_features) // group):
            return False
        groups = in_features // group
        # in this order: counting takes memory for the largest number
        inside = int(g_idx.min()) >= 0 and int(g_idx.max()) < groups
        if not inside or (g_idx.bincount(minlength=groups) != group).any():
            raise InputError(f"{info.name} does not put {group} inputs into each of {groups} groups: it is damaged")
        return True

    def _believe_zeros(self) -> None:
        """Decide what is symmetric. GPTQ and AWQ files store zero points even of symmetric weights: a weight counts as
        symmetric if its config says so and all its zero points are the middle code; where the config is silent, only
        if that holds for every weight of the model."""
        middle = {base: self._has_middle_zeros(weight) for base, weight in self.weights.items()}
        every = self.config.silent_on_symmetry and all(middle.values())
        for base, weight in self.weights.items():
            sym = every or (weight.scheme.sym and middle[base])
            self.weights[base] = replace(weight, scheme=replace(weight.scheme, sym=sym))

    def _has_middle_zeros(self, weight: StoredWeight) -> bool:
        if "qzeros" not in weight.tensors:
            return weight.scheme.sym
        stored = self.reader.tensor(weight.tensors["qzeros"].name)
        _, packed = self.config.to_packed("qzeros", stored, weight.scheme, weight.shape)
        zeros = unpack(packed.T, weight.scheme.bits, weight.shape[0])
        return bool((zeros == weight.scheme.middle).all())


def _check_kinds(tensors: dict[str, TensorInfo]) -> None:
    """Scales are floating numbers of 16 bits or more, all else are integers."""
    for suffix, info in tensors.items():
        is_scale = suffix.endswith(("scale", "scales"))
        if info.dtype.is_floating_point != is_scale or (is_scale and info.dtype.itemsize < 2):
            expected = "a floating dtype of 16 bits or more" if is_scale else "integers"
            raise InputError(f"{info.name} is {info.dtype}, expected {expected}: the checkpoint is damaged")


def _split(tensor: TensorInfo, suffixes: tuple[str, ...]) -> tuple[str, str | None]:
    """`x.weight_scale` -> (x, weight_scale); a fused `x.gate_up_proj_scale` -> (x.gate_up_proj, weight_scale). A
    `weight` under its own name is one of codes if it is int8."""
    name = tensor.name
    for suffix in suffixes:
        if suffix == "weight" and tensor.dtype != torch.int8:
            continue
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
        fused = suffix.removeprefix("weight")
        if "experts." in name and fused != suffix and name.endswith(f"proj{fused}"):
            return name.removesuffix(fused), suffix
    return name, None
