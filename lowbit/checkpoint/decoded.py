"""A checkpoint whose weights are stored in floating point of eight or four bits, as one of plain weights.

Each of them is decoded when it is read, and at no other time: memory is that of the weight and of what it is stored in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from lowbit.checkpoint.encodings import EncodedWeight, get_encoding
from lowbit.checkpoint.layout import StoredTensor, TensorInfo
from lowbit.checkpoint.reader import Headers, unquantized
from lowbit.errors import InputError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class DecodedTensor(TensorInfo):
    """A parameter that is decoded from tensors of fewer bits; `dtype` is that of the model."""

    encoded: EncodedWeight

    @property
    def file(self) -> Path:
        """Where its codes are."""
        return cast(StoredTensor, next(iter(self.encoded.parts.values()))).file

    @property
    def stored_bytes(self) -> int:
        return sum(info.nbytes for info in self.encoded.parts.values())

    @property
    def stored_as(self) -> str:
        return self.encoded.kind or next(iter(self.encoded.parts.values())).stored_as

    @property
    def is_encoded(self) -> bool:
        return True

    def read(self) -> torch.Tensor:
        """Its data in memory of its own. Raises InputError if a part cannot be read, or a scale is no number."""
        parts = {what: cast(StoredTensor, info).read() for what, info in self.encoded.parts.items()}
        return self.encoded.decode(parts, self.dtype)

    def read_rows(self, indices: Sequence[int]) -> torch.Tensor:
        """Some rows (of the first dimension), one after the other."""
        return self.read()[list(indices)]


def decoded(reader: Headers) -> Headers:
    """The checkpoint behind `reader` as one that is not quantized.

    Args:
        reader: A folder, or the headers of a repository.

    Returns:
        The same, with each encoded weight in place of its parts, and nothing in its config that says so, but of
        integers beside them; `reader` itself, where its weights are in no encoding of `ENCODINGS`.

    Raises:
        InputError: Parts are missing or do not fit each other.
    """
    config = reader.quantization_config
    encoding = get_encoding(config.get("quant_method")) if isinstance(config, Mapping) else None
    weights = list(encoding.weights(reader.tensors, config)) if encoding is not None and config is not None else []
    if not weights:
        return reader
    dtype, codes, others = model_dtype(reader.config), dict[str, EncodedWeight](), set[str]()
    for weight in weights:
        first, *rest = (info.name for info in weight.parts.values())
        codes[first] = weight
        others.update(rest, weight.unused)
    made = {name: DecodedTensor(weight.name, dtype, weight.shape, weight) for name, weight in codes.items()}
    plain = unquantized(reader, (made.get(name, info) for name, info in reader.tensors.items() if name not in others))
    remaining = getattr(encoding, "remaining", None)
    integers = remaining(config, [weight.name for weight in weights]) if remaining is not None else None
    if integers is not None:
        plain.config = {**plain.config, "quantization_config": integers}
    return plain


def decoded_to(reader: Headers, dtype: torch.dtype) -> Headers:
    """The same checkpoint, what is decoded of it in another dtype."""
    return reader.with_tensors(
        {name: replace(info, dtype=dtype) if info.is_encoded else info for name, info in reader.tensors.items()}
    )


def model_dtype(config: Mapping) -> torch.dtype:
    """The dtype of the model: as config.json, or that of a model in it, says it. Raises InputError."""
    parts = [config, *(part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict))]
    said = (part.get("dtype", part.get("torch_dtype")) for part in parts)
    name = next((name for name in said if isinstance(name, str)), "bfloat16")
    if name.removeprefix("torch.") not in _DTYPES:
        raise InputError(f"config.json says dtype {name!r}, expected one of: {', '.join(_DTYPES)}")
    return _DTYPES[name.removeprefix("torch.")]
