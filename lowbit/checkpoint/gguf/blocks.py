"""Rows of blocks: read from where they lie in GGUF files, and decoded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lowbit.checkpoint.gguf import affine, codebooks, slices
from lowbit.checkpoint.gguf.header import PLAIN, Blocks
from lowbit.formats.gguf import import_gguf

# What is decoded here; all else is left to the gguf package
TYPES = affine.TYPES | codebooks.TYPES
# Values that the package decodes at a time: their float32 copies are what that needs beside the result
_AT_ONCE = 2**19


@dataclass(frozen=True)
class Piece:
    """Rows that lie together in a file, and the order in which they are wanted; None: as they lie."""

    blocks: Blocks
    order: np.ndarray | None = None

    def read(self) -> torch.Tensor:
        """uint8 [rows, bytes of a row]."""
        data = self.blocks.read()
        return data if self.order is None else data[torch.from_numpy(self.order)]

    @property
    def rows(self) -> int:
        return self.blocks.rows if self.order is None else len(self.order)


def pieces_of(sources: Sequence[Blocks], rows: np.ndarray) -> tuple[Piece, ...]:
    """The pieces that rows consist of, in their order.

    Args:
        sources: Tensors of GGUF files.
        rows: int64 [N], numbers of rows of all sources one after the other.
    """
    first = np.cumsum([0, *(source.rows for source in sources)])
    which = np.searchsorted(first, rows, side="right") - 1
    ends = [*(np.flatnonzero(np.diff(which)) + 1), len(rows)]
    made, start = [], 0
    for end in ends:
        source = which[start]
        local = rows[start:end] - first[source]
        low, high = int(local.min()), int(local.max()) + 1
        straight = np.array_equal(local, np.arange(low, high))
        made.append(Piece(sources[source].part(low, high), None if straight else local - low))
        start = end
    return tuple(made)


def decoded(data: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Blocks as the numbers that they stand for.

    Args:
        data: uint8 [N, bytes of a row].
        kind: The name of their type.
        dtype: What the numbers are rounded to, once.
    """
    if kind in PLAIN:
        return data.view(PLAIN[kind]).to(dtype)
    if kind in TYPES:
        return slices.decode(data, TYPES[kind], dtype)
    gguf = import_gguf()
    known = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[known]
    made = torch.empty(len(data), data.shape[1] // size * values, dtype=dtype)
    at_once = max(1, _AT_ONCE // made.shape[1])
    with np.errstate(all="ignore"):  # what is not finite is found in the result
        for start in range(0, len(data), at_once):
            part = data[start : start + at_once].numpy()
            made[start : start + at_once] = torch.from_numpy(gguf.dequantize(part, known))
    return made


def all_decoded(pieces: Sequence[Piece], dtype: torch.dtype) -> torch.Tensor:
    """Matrices of pieces, one below the other."""
    made = torch.empty(sum(piece.rows for piece in pieces), pieces[0].blocks.width, dtype=dtype)
    start = 0
    for piece in pieces:
        made[start : start + piece.rows] = decoded(piece.read(), piece.blocks.kind, dtype)
        start += piece.rows
    return made
