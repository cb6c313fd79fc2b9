"""Lazy tensors by name over the shards of a checkpoint folder.

What a folder holds is decided here, by the rules of transformers, so that whatever reads it reads the same: the file
that `transformers_weights` in config.json names, else `model.safetensors`, else the shards of the index.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lowbit.checkpoint.gguf.index import INDEX_NAME as GGUF_INDEX_NAME
from lowbit.checkpoint.gguf.index import Index, read_index
from lowbit.checkpoint.layout import MOST_TENSORS, StoredTensor, TensorInfo, read_header
from lowbit.errors import InputError
from lowbit.guards.reading import check_regular_files, read_json
from lowbit.guards.records import record, shown

# A CheckpointReader, or the RemoteHeaders of a repository
Headers = TypeVar("Headers", bound=Any)
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Files of other writers that say how a checkpoint is quantized, where config.json does not -> the method, which they do
# not name, and how the name of a tensor of theirs ends: AutoGPTQ and AutoAWQ of 2023, ModelOpt
_OTHER_CONFIGS = {
    "quantize_config.json": ("gptq", ".qweight"),
    "quant_config.json": ("awq", ".qweight"),
    "hf_quant_config.json": ("modelopt", ".weight_scale"),
}
# With PEFT installed, transformers would put the adapter on top of the model, and without it would not
_ADAPTER_NAME = "adapter_config.json"
# The key of config.json by which transformers lets a folder name its weight file
_WEIGHTS_KEY = "transformers_weights"


@dataclass(frozen=True)
class _Config:
    """What lowbit itself reads of config.json."""

    architectures: list[str] | None = None
    model_type: str | None = None
    quantization_config: dict | None = None


@dataclass(frozen=True)
class _Metadata:
    total_size: float | None = None


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    metadata: _Metadata | None = None


def read_config(folder: Path) -> dict:
    """The object in config.json; what lowbit reads of it has the types it should have. Raises InputError."""
    path = folder / "config.json"
    config = record(dict, read_json(path, f"{folder} is not a model folder: it has no config.json"), str(path))
    record(_Config, config, str(path))
    return config


class CheckpointReader:
    """The tensors of a model folder. Opening it reads headers only; every shard is checked to be whole.

    tensors: name -> StoredTensor, in the order of the shards. files: the weight files. index: the name of the index
    that names them, None for a single file. index_size: the bytes of all tensors as the index says them, None if it
    does not. unlisted: tensors that are in no index though there is one.

    Args:
        folder: The model folder.
        files: The weight files, where a caller has chosen others than those that transformers would.
    """

    def __init__(self, folder: str | Path, files: Sequence[str | Path] | None = None):
        self.folder = Path(folder)
        check_regular_files(self.folder)
        self.config = read_config(self.folder)
        self.index: str | None = None
        self.index_size: float | None = None
        self._weight_map: dict | None = None
        self._gguf: Index | None = None
        if files is None:
            files = [self.folder / name for name in self._weight_files()]
        self.files = [Path(file) for file in files]
        self.tensors: dict[str, StoredTensor] = {}
        if self._gguf is not None:
            from lowbit.checkpoint.gguf.tensors import gguf_tensors  # which decodes, on what is here

            self.tensors = gguf_tensors(self.folder, self._gguf, self.config)
            return
        for file in self.files:
            if not file.is_file():
                raise InputError(
                    f"{file.name} is named by {self.index} but missing in {self.folder}: download it again"
                )
            try:
                stored = read_header(file)
            except OSError as error:
                raise InputError(f"cannot read {file}: {error.strerror}") from None
            for tensor in stored:
                if tensor.name in self.tensors:
                    raise InputError(f"{tensor.name} is in both {self.tensors[tensor.name].file.name} and {file.name}")
                self.tensors[tensor.name] = tensor
            if len(self.tensors) > MOST_TENSORS:
                raise InputError(f"{self.folder} holds more than {MOST_TENSORS:,} tensors: refusing to read them")
        self._check_index()

    @property
    def unlisted(self) -> list[str]:
        return [] if self._weight_map is None else [name for name in self.tensors if name not in self._weight_map]

    @property
    def quantization_config(self) -> dict | None:
        """How the folder says that it is quantized; None where it does not. Some writers say it in a file of its own,
        which counts where there are tensors of theirs."""
        said = quantization_in(self.config)
        for name, (method, suffix) in _OTHER_CONFIGS.items() if said is None else ():
            if (self.folder / name).is_file() and any(tensor.endswith(suffix) for tensor in self.tensors):
                return {"quant_method": method, **record(dict, read_json(self.folder / name), str(self.folder / name))}
        return said

    @property
    def method(self) -> str | None:
        """The `quant_method` that the folder says, "gguf" for blocks of such a file; None for plain numbers."""
        said = self.quantization_config
        if self._gguf is not None:
            return "gguf" if said is not None or any(info.is_encoded for info in self.tensors.values()) else None
        return None if said is None else str(said.get("quant_method"))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of tensors of a GGUF file that are nothing here: no checkpoint has a name for them."""
        return () if self._gguf is None else self._gguf.left_out

    @property
    def place(self) -> Path:
        """Where it is, for people: the folder, or the GGUF file that was opened."""
        file = self.folder if self._gguf is None else self.files[0]
        return file.readlink() if file.is_symlink() and file is not self.folder else file

    @property
    def plain_config(self) -> dict:
        """config.json without what it says of quantization and of the names of weight files."""
        return without_quantization({name: value for name, value in self.config.items() if name != _WEIGHTS_KEY})

    def _weight_files(self) -> list[str]:
        if (self.folder / _ADAPTER_NAME).is_file():
            raise InputError(
                f"{self.folder} holds an adapter of PEFT beside the model ({_ADAPTER_NAME}): merge it into the model "
                "(`lowbit merge`), or move it to another folder"
            )
        named = self.config.get(_WEIGHTS_KEY)
        if named is not None:
            suffixes = (".safetensors", ".safetensors.index.json")
            if not isinstance(named, str) or not _is_beside(named) or not named.endswith(suffixes):
                raise InputError(
                    f"{_WEIGHTS_KEY} in {self.folder / 'config.json'} is {shown(named)}; expected the name of a "
                    f"*{suffixes[0]} or *{suffixes[1]} file beside it"
                )
            if not (self.folder / named).is_file():
                raise InputError(f"{named}, which config.json of {self.folder} names, is missing: download it again")
            return [named] if named.endswith(suffixes[0]) else self._shard_names(named)
        if (self.folder / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        if (self.folder / INDEX_NAME).is_file():
            return self._shard_names(INDEX_NAME)
        if (self.folder / GGUF_INDEX_NAME).is_file():
            self._gguf = read_index(self.folder)
            return list(self._gguf.files)
        pickles = [p.name for p in sorted(self.folder.iterdir()) if p.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise InputError(
                f"{self.folder} has pickle weights only ({pickles[0]}), which can run code when loaded: "
                "convert them to safetensors first (model.save_pretrained of transformers writes it)"
            )
        raise InputError(f"{self.folder} has no {SINGLE_NAME} and no {INDEX_NAME}: expected safetensors weights there")

    def _shard_names(self, index_name: str) -> list[str]:
        path = self.folder / index_name
        self.index, index = index_name, record(_Index, read_json(path), str(path))
        self._weight_map = index.weight_map
        if not self._weight_map:
            raise InputError(f"{index_name} in {self.folder} has an empty weight_map: download it again")
        self.index_size = index.metadata.total_size if index.metadata else None
        names = sorted(set(self._weight_map.values()))
        for name in names:
            # an index comes from strangers: it may only name files beside it
            if not _is_beside(name):
                raise InputError(
                    f"{index_name} names {shown(name)}, which is outside {self.folder}: refusing to open it"
                )
            if not name.endswith(".safetensors"):
                raise InputError(f"{index_name} names {shown(name)}; expected *.safetensors files only")
        return names

    def _check_index(self) -> None:
        for name, file in (self._weight_map or {}).items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise InputError(
                    f"{self.index} says {shown(name)} is in {file}, but it is not: download the checkpoint again"
                )

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        return self.tensors[name].read()

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> "CheckpointReader":
        """A reader of the same folder that knows these tensors, such as those of `lowbit.checkpoint.computed`."""
        other = copy.copy(self)
        other.tensors = dict(tensors)
        return other

    def rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Read some rows (of the first dimension) of one tensor. Raises InputError for one that it does not have."""
        info = self.tensors[name]
        for index in indices:
            if not info.shape or not 0 <= index < info.shape[0]:
                raise InputError(f"{name} in {info.file.name} has shape {list(info.shape)}, and no row {index}")
        return info.read_rows(indices)


def _is_beside(name: str) -> bool:
    """Whether a file name leads nowhere but to the folder it stands in."""
    return name == Path(name).name and name not in ("", ".", "..") and "\\" not in name


def quantization_in(config: dict) -> dict | None:
    """The `quantization_config` of a config.json: its own, or that of the language model in it. Raises InputError."""
    parts = [part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict)]
    said = next((said for part in (config, *parts) if (said := part.get("quantization_config")) is not None), None)
    return record(dict | None, said, "quantization_config in config.json")  # type: ignore[arg-type]  # a union is a kind


def unquantized(headers: Headers, tensors: Iterable[TensorInfo]) -> Headers:
    """The same folder or repository with plain `tensors` in place of its own, and nothing that says otherwise."""
    other = copy.copy(headers)
    other.config = without_quantization(headers.config)
    other.tensors = {info.name: info for info in tensors}
    return other


def without_quantization(config: dict) -> dict:
    """A config.json, and the configs of models in it, without `quantization_config`."""
    return {
        name: without_quantization(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
        if name != "quantization_config"
    }
