"""The safetensors file layout: 8 bytes of header length, a JSON header, the tensors back to back.

lowbit reads and writes it directly instead of through the safetensors package, for two reasons the package cannot meet:
a shard is written tensor by tensor at offsets known beforehand (the package wants all of its tensors in memory), and
reads are plain file reads (the pages of a memory map count as memory of the process, and a truncated map is a SIGBUS).
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What the safetensors package itself refuses beyond; a longer header is a damaged or hostile file
_LONGEST_HEADER = 100_000_000


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


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a file: `offset` is from the start of the file."""

    file: Path
    offset: int


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file. Raises InputError, naming the file, for anything that is not a whole one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise InputError(
                f"{path.name} is not a whole safetensors file ({size} bytes, header of {length}): download it again"
            )
        try:
            header = json.loads(file.read(length))
            tensors = [
                StoredTensor(
                    name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0]
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path.name} has a damaged safetensors header ({error!r}): download it again") from None
    expected = 8 + length + max(ends.values(), default=0)
    if size != expected:
        raise InputError(
            f"{path.name} has {size} bytes, its header says {expected}: the file is truncated, download it again"
        )
    for tensor in tensors:
        if tensor.offset + tensor.nbytes != 8 + length + ends[tensor.name] or tensor.offset < 8 + length:
            raise InputError(f"{path.name}: the offsets of {tensor.name} do not fit its shape: download it again")
    return tensors


def build_header(tensors: list[TensorInfo], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Header bytes (with their length in front) and the file offset of each tensor.

    Widest dtypes first, as the safetensors package orders them, so that every tensor starts aligned.
    """
    entries, position = {}, 0
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
