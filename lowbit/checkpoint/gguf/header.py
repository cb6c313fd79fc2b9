"""The head of a GGUF file: what it says of itself, and where its tensors are.

lowbit reads it itself, before any other package sees the file: those believe every count in it, and some go on for as
long as it says where the file has ended. Nothing is read here but the head; of metadata that is a list only how long it
is. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch

from lowbit.checkpoint.layout import LONGEST_NAME, MOST_TENSORS, StoredTensor
from lowbit.errors import InputError
from lowbit.formats.gguf import import_gguf
from lowbit.guards.reading import open_regular
from lowbit.guards.records import shown

MAGIC, _VERSIONS = b"GGUF", (2, 3)
# Bytes of a head, far above those of a vocabulary of a million tokens; values of metadata, and of lists in it
_LONGEST_HEAD, _MOST_KEYS = 2**29, 65_536
_MOST_DIMENSIONS = 4  # of ggml
_STRING, _LIST = 8, 9
# Types of metadata -> how struct calls them
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Types of tensors that are numbers -> the dtype they are read as
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Blocks(StoredTensor):
    """A tensor of a GGUF file, or some of its rows.

    Attributes:
        name: In the file, such as "blk.0.attn_q.weight".
        dtype, shape: Of its bytes: uint8 [..., bytes of a row].
        kind: The name of its type: "Q4_0", "F32", ...
        width: How many values are in a row.
    """

    kind: str
    width: int

    @property
    def stored_as(self) -> str:
        return self.kind

    @property
    def values(self) -> tuple[int, ...]:
        """The shape of what it stands for."""
        return (*self.shape[:-1], self.width)

    @property
    def rows(self) -> int:
        """How many rows there are, over all dimensions."""
        return math.prod(self.shape[:-1])

    def part(self, start: int, stop: int) -> "Blocks":
        """Rows [start, stop) of all, as a matrix."""
        row, shape = self.shape[-1], (stop - start, self.shape[-1])
        return Blocks(self.name, self.dtype, shape, self.file, self.offset + start * row, self.kind, self.width)


@dataclass(frozen=True)
class Head:
    """What a GGUF file says of itself. metadata: numbers, truth values and texts; of a list, how long it is."""

    metadata: dict[str, int | float | bool | str]
    tensors: tuple[Blocks, ...]


def is_gguf(path: Path) -> bool:
    """Whether the name is that of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def read_head(path: Path) -> Head:
    """The head of a GGUF file. Raises InputError, naming the file and what is wrong, for anything that is not whole."""
    try:
        with open_regular(path) as file:
            return _Reader(file, path).head()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


class _Reader:
    """Reads on from where it is; whatever would lead beyond the end of the file is an error."""

    def __init__(self, file: BufferedReader, path: Path):
        self._file, self._path = file, path
        self._size = path.stat().st_size
        self._end = min(self._size, _LONGEST_HEAD)

    def head(self) -> Head:
        if self._size < 24 or self._file.read(4) != MAGIC:
            raise InputError(f"{self._path.name} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        version, tensors, keys = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise InputError(
                f"{self._path.name} is GGUF version {version}; expected {_VERSIONS[0]} or {_VERSIONS[1]}, little-endian"
            )
        if tensors > MOST_TENSORS or keys > _MOST_KEYS:
            raise self._damaged(f"it says that it holds {tensors:,} tensors and {keys:,} values of metadata")
        metadata: dict[str, int | float | bool | str] = {}
        for _ in range(keys):
            key = self._text("a key of its metadata")
            if key in metadata:
                raise self._damaged(f"{shown(key)} is in its metadata twice")
            (kind,) = self._numbers("I")
            metadata[key] = self._value(key, kind)
        found = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
            raise self._damaged(f"general.alignment is {shown(alignment)}, expected a power of two")
        start = -(-self._file.tell() // alignment) * alignment
        names = Counter(name for name, *_ in found)
        if repeated := next((name for name, count in names.items() if count > 1), None):
            raise self._damaged(f"{repeated} is in it twice")
        placed = tuple(self._placed(*tensor, start, alignment) for tensor in found)
        if sum(tensor.nbytes for tensor in placed) > self._size:
            raise self._damaged("its tensors take more bytes than it has: they overlap")
        return Head(metadata, placed)

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self._path.name} is a damaged GGUF file ({reason}): download it again")

    def _skip(self, count: int, what: str) -> None:
        if count > self._end - self._file.tell():
            raise self._damaged(f"it ends within {what}, which takes {count:,} bytes of {self._size:,}")
        self._file.seek(count, 1)

    def _bytes(self, count: int, what: str) -> bytes:
        at = self._file.tell()
        self._skip(count, what)
        self._file.seek(at)
        return self._file.read(count)

    def _numbers(self, form: str, what: str = "its head") -> tuple:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}"), what))

    def _text(self, what: str) -> str:
        (length,) = self._numbers("Q", what)
        data = self._bytes(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is no text in UTF-8") from None

    def _value(self, key: str, kind: int) -> int | float | bool | str:
        what = f"the value of {shown(key)}"
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind], what)[0]
        if kind == _STRING:
            return self._text(what)
        if kind != _LIST:
            raise self._damaged(f"{what} is of type {kind}, which there is none of")
        inner, count = self._numbers("IQ", what)
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"), what)
        elif inner == _STRING:
            if 8 * count > self._end - self._file.tell():  # each has its length in front
                raise self._damaged(f"it ends within {what}, a list of {count:,} texts")
            for _ in range(count):
                (length,) = self._numbers("Q", what)
                self._skip(length, what)
        else:
            raise self._damaged(f"{what} is a list of type {inner}, which is not read")
        return count

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text("the name of a tensor")
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise self._damaged(f"it names a tensor {shown(name)}")
        (dimensions,) = self._numbers("I", name)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions:,} dimensions, expected 1 to {_MOST_DIMENSIONS}")
        *shape, kind, offset = self._numbers(f"{dimensions}QIQ", name)
        if not 0 < math.prod(shape) < 2**63:
            raise self._damaged(f"{name} has shape {shape[::-1]}")
        return name, tuple(reversed(shape)), kind, offset

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int) -> Blocks:
        gguf = import_gguf()
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise InputError(
                f"{name} in {self._path.name} is of type {kind}, which the gguf package here does not know: "
                "install a newer one, or the file is damaged"
            ) from None
        values, size = gguf.GGML_QUANT_SIZES[known]
        if shape[-1] % values:
            raise self._damaged(
                f"{name} has {shape[-1]} values in a row, no multiple of {values} as {known.name} takes"
            )
        row = shape[-1] // values * size
        stored = Blocks(name, torch.uint8, (*shape[:-1], row), self._path, start + offset, known.name, shape[-1])
        if offset % alignment or stored.offset + stored.nbytes > self._size:
            raise self._damaged(
                f"{name} is said to be at {stored.offset:,} with {stored.nbytes:,} bytes, of {self._size:,} in all"
            )
        return stored
