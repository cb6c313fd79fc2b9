"""The tensors of a GGUF file under the names and in the shapes of a Hugging Face checkpoint.

Blocks of symmetric integers are the tensors of compressed-tensors that hold the same numbers, everything else is
decoded. Both when a tensor is read, and at no other time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowbit.checkpoint.decoded import DecodedTensor, model_dtype
from lowbit.checkpoint.encodings import EncodedWeight
from lowbit.checkpoint.gguf.blocks import Piece, all_decoded, decoded, pieces_of
from lowbit.checkpoint.gguf.header import PLAIN, Blocks, read_head
from lowbit.checkpoint.gguf.index import Index
from lowbit.checkpoint.gguf.rules import Rules, rules_of
from lowbit.checkpoint.layout import TensorInfo
from lowbit.checkpoint.names import output_name
from lowbit.errors import InputError, first_line
from lowbit.formats import compressed_tensors as packed_format
from lowbit.formats.gguf import SCHEMES, unpack
from lowbit.numerics.qweight import QuantWeight


@dataclass(frozen=True)
class GgufTensor(TensorInfo):
    """A tensor that is computed from blocks.

    Attributes:
        stored: Those blocks.
        compute: What makes it of them, reading them.
    """

    stored: tuple[Blocks, ...]
    compute: Callable[[torch.dtype], torch.Tensor]

    @property
    def file(self) -> Path:
        """Where the first of its blocks are."""
        return self.stored[0].file

    @property
    def stored_bytes(self) -> int:
        return sum(blocks.nbytes for blocks in self.stored)

    @property
    def stored_as(self) -> str:
        return self.stored[0].kind

    @property
    def is_encoded(self) -> bool:
        return any(blocks.kind not in PLAIN for blocks in self.stored)

    def read(self) -> torch.Tensor:
        """Its data in memory of its own. Raises InputError if the file cannot be read."""
        return self.compute(self.dtype)


@dataclass(frozen=True)
class GgufIntegers(GgufTensor):
    """A part of a quantized weight: its codes, its scales, or its shape. The same numbers take the same bytes.

    Attributes:
        pieces: The blocks of the weight, in the order of its rows.
        experts: How many matrices there are, one below the other; 0 for a plain one.
    """

    pieces: tuple[Piece, ...]
    experts: int

    @property
    def stored_bytes(self) -> int:
        return self.nbytes

    @property
    def is_encoded(self) -> bool:
        return False  # its numbers are what is stored

    def matrices(self) -> list[QuantWeight]:
        """The weight that it is a part of, one for each expert. Raises InputError if the file cannot be read."""
        parts = [unpack(piece.read(), piece.blocks.kind) for piece in self.pieces]
        whole = parts[0] if len(parts) == 1 else QuantWeight.concatenated(parts)
        rows = whole.out_features // max(self.experts, 1)
        return [whole.rows(start, start + rows) for start in range(0, whole.out_features, rows)]


@dataclass(frozen=True)
class GgufMatrix(GgufTensor):
    """A tensor [..., K] of rows that are decoded."""

    pieces: tuple[Piece, ...]

    def read_rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Some of its rows, [len(rows), K], and no others."""
        sources = [piece.blocks for piece in self.pieces]
        moved = [np.arange(piece.rows) if piece.order is None else piece.order for piece in self.pieces]
        first = np.cumsum([0, *(blocks.rows for blocks in sources)])
        numbers = np.concatenate([order + start for order, start in zip(moved, first, strict=False)])
        each = [all_decoded(pieces_of(sources, numbers[row : row + 1]), self.dtype) for row in rows]
        return torch.cat(each)


def read_blocks(paths: Sequence[Path]) -> dict[str, Blocks]:
    """The tensors of GGUF files by their names there. Raises InputError for a damaged file, and a name twice."""
    found: dict[str, Blocks] = {}
    for path in paths:
        for blocks in read_head(path).tensors:
            if blocks.name in found:
                raise InputError(f"{blocks.name} is in both {found[blocks.name].file.name} and {path.name}")
            found[blocks.name] = blocks
    return found


def gguf_tensors(folder: Path, index: Index, config: Mapping) -> dict[str, TensorInfo]:
    """The tensors of a folder with GGUF files, by name. Blocks are decoded to the dtype of the model.

    Args:
        folder: Where the files are.
        index: Of the folder.
        config: The object in its config.json.

    Raises:
        InputError: A file is damaged, or lacks a tensor that the index names.
    """
    blocks = read_blocks([folder / name for name in index.files])
    dtype, rules = model_dtype(config), rules_of(index.architecture, config, index.names)
    sources = defaultdict(list)
    for found in blocks.values():
        if (parameter := rules.parameter_of(found.name)) is not None:
            sources[parameter].append(found)
    made = {}
    for parameter, of_it in sources.items():
        if parameter not in index.shapes:
            raise InputError(f"{folder / 'gguf_index.json'} has no shape of {parameter}: remove {folder}")
        for info in _tensors(parameter, of_it, index, rules, dtype):
            made[info.name] = info
    return made


def _tensors(
    parameter: str, sources: list[Blocks], index: Index, rules: Rules, dtype: torch.dtype
) -> Iterator[TensorInfo]:
    """All tensors that a checkpoint has of a parameter."""
    shape = tuple(index.shapes[parameter])
    if sum(math.prod(source.values) for source in sources) != math.prod(shape):
        raise _misfit(parameter, sources, str(list(shape)))
    if (parts := len(index.experts.get(parameter, ()))) and (len(shape) != 3 or shape[1] % parts):
        raise _misfit(parameter, sources, f"the matrices of {parts} linears of each expert")
    order = rules.order(parameter, sources, shape)
    if order is None:
        yield _by_rule(parameter, sources, shape, rules, dtype)
        return
    if parameter in index.packed and (len({source.kind for source in sources}) > 1 or sources[0].kind not in SCHEMES):
        raise _misfit(parameter, sources, f"integers of {' or '.join(SCHEMES)}")
    for name, part, rows in _parts(parameter, shape, order, index.experts.get(parameter, ())):
        pieces = pieces_of(sources, rows)
        kinds = {piece.blocks.kind for piece in pieces}
        if parameter in index.packed:
            yield from _packed(name, part, pieces)
        elif parameter in index.linears and not kinds <= PLAIN.keys():
            yield _encoded(name, part, pieces, dtype)
        else:
            plain = next(iter(kinds)) if len(kinds) == 1 else ""
            yield _matrix(name, part, pieces, PLAIN.get(plain, dtype))


def _misfit(parameter: str, sources: list[Blocks], expected: str) -> InputError:
    found = ", ".join(f"{source.name} {list(source.values)}" for source in sources)
    return InputError(
        f"{found} in {sources[0].file.name} cannot be {parameter}, which is {expected}: the file is damaged, or "
        "lacks a part of it"
    )


def _parts(
    parameter: str, shape: tuple[int, ...], order: np.ndarray, patterns: Sequence[str]
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """(name, shape, rows) of what a checkpoint holds of a parameter: itself, or the matrices of each expert."""
    if not patterns:
        yield parameter, shape, order
        return
    experts, rows, width = shape
    each = order.reshape(experts, len(patterns), -1)
    for expert in range(experts):
        for pattern, numbers in zip(patterns, each[expert], strict=True):
            yield pattern.replace("{}", str(expert)), (rows // len(patterns), width), numbers


def _matrix(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], dtype: torch.dtype) -> GgufMatrix:
    def compute(to: torch.dtype) -> torch.Tensor:
        return all_decoded(pieces, to).view(shape)

    return GgufMatrix(name, dtype, shape, tuple(piece.blocks for piece in pieces), compute, pieces)


def _encoded(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], dtype: torch.dtype) -> DecodedTensor:
    """A weight in blocks that are no integers here."""

    def decode(read: dict[str, torch.Tensor], to: torch.dtype) -> torch.Tensor:
        parts = []
        for piece, data in zip(pieces, read.values(), strict=True):
            data = data if piece.order is None else data[torch.from_numpy(piece.order)]
            parts.append(decoded(data, piece.blocks.kind, to))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)

    stored = {f"{number}": piece.blocks for number, piece in enumerate(pieces)}
    return DecodedTensor(name, dtype, shape, EncodedWeight(name, shape, stored, decode))


def _packed(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> Iterator[GgufTensor]:
    """The tensors of compressed-tensors that hold a weight of symmetric integers."""
    *lead, rows, width = shape
    scheme = SCHEMES[pieces[0].blocks.kind]
    stored = tuple(piece.blocks for piece in pieces)
    meta = packed_format.pack(QuantWeight.meta(rows, width, scheme, torch.float16))

    def tensor(suffix: str) -> Callable[[torch.dtype], torch.Tensor]:
        def compute(to: torch.dtype) -> torch.Tensor:
            if suffix == "weight_shape":
                return torch.tensor([rows, width]).expand(*lead, 2).contiguous()
            weights = (unpack(piece.read(), piece.blocks.kind) for piece in pieces)
            parts = [w.scales if suffix == "weight_scale" else packed_format.pack(w)[suffix] for w in weights]
            made = parts[0] if len(parts) == 1 else torch.cat(parts)
            return made.to(to).view(*lead, *meta[suffix].shape)

        return compute

    for suffix, like in meta.items():
        part, experts = output_name(name, suffix), math.prod(lead) if lead else 0
        yield GgufIntegers(part, like.dtype, (*lead, *like.shape), stored, tensor(suffix), pieces, experts)


def _by_rule(
    parameter: str, sources: list[Blocks], shape: tuple[int, ...], rules: Rules, dtype: torch.dtype
) -> GgufTensor:
    """A parameter that transformers computes: all of it at once, in float32."""
    kinds = {source.kind for source in sources}
    plain = next(iter(kinds)) if len(kinds) == 1 else ""

    def compute(to: torch.dtype) -> torch.Tensor:
        read = {}
        for source in sources:
            values = decoded(source.read().view(-1, source.shape[-1]), source.kind, torch.float32)
            read[source.name] = values.view(source.values).numpy()
        try:
            with np.errstate(all="ignore"):
                made = rules.applied(read)[parameter]
            return made.view(shape).to(to)
        except Exception as error:  # of any rule of transformers
            raise InputError(
                f"transformers cannot make {parameter} of {sources[0].name} in {sources[0].file.name}: "
                f"{first_line(error)}"
            ) from None

    return GgufTensor(parameter, PLAIN.get(plain, dtype), shape, tuple(sources), compute)
