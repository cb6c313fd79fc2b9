"""The safetensors file layout: 8 bytes of header length, a JSON header, the tensors back to back.

lowbit reads and writes it directly instead of through the safetensors package, for two reasons the package cannot meet:
a shard is written tensor by tensor at offsets known beforehand (the package wants all of its tensors in memory), and
reads are plain file reads (the pages of a memory map count as memory of the process, and a truncated map is a SIGBUS).
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowbit.errors import InputError
from lowbit.guards.reading import open_regular, parse_json
from lowbit.guards.records import shown

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What the safetensors package itself refuses beyond; a longer header is a damaged or hostile file
_LONGEST_HEADER = 100_000_000
# In all files of a checkpoint; the largest models with a tensor for each expert have 300,000
MOST_TENSORS = 500_000
# A tensor of a header is an object with two lists, and some ten commas
_MOST_VALUES = 16 * MOST_TENSORS
LONGEST_NAME = 512  # characters
_MOST_DIMENSIONS = 16  # torch stops at 64, in some operations earlier


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a stored tensor, before or without its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """What it takes in a file: less than its data, where it is decoded while it is read."""
        return self.nbytes

    @property
    def stored_as(self) -> str:
        """What its numbers are in the file, for people."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_encoded(self) -> bool:
        """Whether it is stored as codes, and its numbers are computed while it is read."""
        return False


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a file: `offset` is from the start of the file."""

    file: Path
    offset: int

    def read(self) -> torch.Tensor:
        """Its data in memory of its own. Raises InputError if the file cannot be read or ends early."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        try:
            with open_regular(self.file, buffering=0) as file:
                file.seek(self.offset)
                view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]  # numpy 2 gives a buffer
                while done < self.nbytes:
                    count = file.readinto(view[done:])
                    if not count:
                        raise InputError(
                            f"{self.file.name} ended while reading {self.name}: the file changed, try again"
                        )
                    done += count
        except OSError as error:
            raise InputError(f"cannot read {self.name} from {self.file}: {error.strerror}") from None
        return data.view(self.dtype).view(self.shape)

    def read_rows(self, indices: Sequence[int]) -> torch.Tensor:
        """Some rows (of the first dimension), one after the other."""
        row = replace(self, shape=self.shape[1:])
        return torch.stack([replace(row, offset=self.offset + i * row.nbytes).read() for i in indices])


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file. Raises InputError, naming the file, for anything that is not a whole one.

    As strict as the safetensors package: a name twice, tensors that overlap and holes between them are refused too.
    """
    size = path.stat().st_size
    with open_regular(path) as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise InputError(
                f"{path.name} is not a whole safetensors file ({size} bytes, header of {length}): download it again"
            )
        try:
            header = parse_json(file.read(length), "it", _MOST_VALUES, _without_repeats)
        except InputError as error:
            raise _damaged(path, str(error)) from None
    if not isinstance(header, dict):
        raise _damaged(path, "not an object")
    tensors = [_stored(path, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"]
    position = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            raise _damaged(path, f"{tensor.name} does not start where the tensor before it ends")
        position += tensor.nbytes
    if size != position:
        what = "truncated" if size < position else "longer than it should be"
        raise InputError(
            f"{path.name} has {size} bytes, its header says {position}: the file is {what}, download it again"
        )
    return tensors


def _without_repeats(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name appears twice")
    return made


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path.name} has a damaged safetensors header ({reason[:200]}): download it again")


def _stored(path: Path, start: int, name: str, entry) -> StoredTensor:
    def is_counts(value) -> bool:
        # int64 is what torch counts in; beyond it no product below means anything
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)

    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise InputError(
            f"{path.name} names a tensor {shown(name)}; expected 1 to {LONGEST_NAME} characters that can be printed"
        )
    if not isinstance(entry, dict) or not is_counts(entry.get("shape")) or not is_counts(entry.get("data_offsets")):
        raise _damaged(path, f"{name} lacks a proper shape or data_offsets")
    if len(entry["shape"]) > _MOST_DIMENSIONS:
        raise InputError(
            f"{path.name}: {name} has {len(entry['shape'])} dimensions; expected {_MOST_DIMENSIONS} at most"
        )
    dtype, shape, offsets = entry.get("dtype"), entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _damaged(path, f"{name} has no dtype")
    if dtype not in DTYPES:
        raise InputError(f"{path.name}: {name} has dtype {shown(dtype)}; expected one of {', '.join(DTYPES)}")
    tensor = StoredTensor(name, DTYPES[dtype], tuple(shape), path, start + (offsets or [0])[0])
    if math.prod(max(n, 1) for n in shape) >= 2**63 or len(offsets) != 2 or offsets[1] - offsets[0] != tensor.nbytes:
        raise InputError(f"{path.name}: the offsets of {name} do not fit its shape: download it again")
    return tensor


def build_header(tensors: list[TensorInfo], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Header bytes (with their length in front) and the file offset of each tensor.

    Widest dtypes first, as the safetensors package orders them, so that every tensor starts aligned.
    """
    entries: dict[str, dict] = {}
    position = 0
    for tensor in sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name)):
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + e["data_offsets"][0] for name, e in entries.items()}
