"""Lazy tensors by name over the shards of a checkpoint folder."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowbit.checkpoint.layout import MOST_TENSORS, StoredTensor, read_header
from lowbit.errors import InputError
from lowbit.reading import check_regular_files, open_regular, read_json
from lowbit.records import record, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
    config = read_json(path, f"{folder} is not a model folder: it has no config.json")
    record(_Config, config, str(path))
    return config


class CheckpointReader:
    """The tensors of a model folder. Opening it reads headers only; every shard is checked to be whole.

    tensors: name -> StoredTensor, in the order of the shards. files: the weight files. index_size: the bytes of all
    tensors as the index says them, None if it does not. unlisted: tensors that are in no index though there is one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        check_regular_files(self.folder)
        self.config = read_config(self.folder)
        self.files = [self.folder / name for name in self._shard_names()]
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            if not file.is_file():
                raise InputError(
                    f"{file.name} is named by {INDEX_NAME} but missing in {self.folder}: download it again"
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

    def _shard_names(self) -> list[str]:
        self.index_size: int | None = None
        if (self.folder / INDEX_NAME).is_file():
            index = record(_Index, read_json(self.folder / INDEX_NAME), str(self.folder / INDEX_NAME))
            self._weight_map = index.weight_map
            if not self._weight_map:
                raise InputError(f"{INDEX_NAME} in {self.folder} has an empty weight_map: download it again")
            self.index_size = index.metadata and index.metadata.total_size
            names = sorted(set(self._weight_map.values()))
            for name in names:
                # an index comes from strangers: it may only name files beside it
                if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
                    raise InputError(
                        f"{INDEX_NAME} names {shown(name)}, which is outside {self.folder}: refusing to open it"
                    )
                if not name.endswith(".safetensors"):
                    raise InputError(f"{INDEX_NAME} names {shown(name)}; expected *.safetensors files only")
            return names
        self._weight_map = None
        if (self.folder / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        pickles = [p.name for p in sorted(self.folder.iterdir()) if p.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise InputError(
                f"{self.folder} has pickle weights only ({pickles[0]}), which can run code when loaded: "
                "convert them to safetensors first (model.save_pretrained of transformers writes it)"
            )
        raise InputError(f"{self.folder} has no {SINGLE_NAME} and no {INDEX_NAME}: expected safetensors weights there")

    def _check_index(self) -> None:
        for name, file in (self._weight_map or {}).items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise InputError(
                    f"{INDEX_NAME} says {shown(name)} is in {file}, but it is not: download the checkpoint again"
                )

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        return read_tensor(self.tensors[name])

    def rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Read some rows (of the first dimension) of one tensor. Raises InputError for one that it does not have."""
        info = self.tensors[name]
        for index in indices:
            if not info.shape or not 0 <= index < info.shape[0]:
                raise InputError(f"{name} in {info.file.name} has shape {list(info.shape)}, and no row {index}")
        row = replace(info, shape=info.shape[1:])
        return torch.stack([read_tensor(replace(row, offset=info.offset + i * row.nbytes)) for i in indices])


def read_tensor(info: StoredTensor) -> torch.Tensor:
    """Read a stored tensor into memory of its own. Raises InputError if the file cannot be read or ends early."""
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    try:
        with open_regular(info.file, buffering=0) as file:
            file.seek(info.offset)
            view, done = memoryview(data.numpy()), 0
            while done < info.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(f"{info.file.name} ended while reading {info.name}: the file changed, try again")
                done += count
    except OSError as error:
        raise InputError(f"cannot read {info.name} from {info.file}: {error.strerror}") from None
    return data.view(info.dtype).view(info.shape)
