"""Lazy tensors by name over the shards of a checkpoint folder."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from lowbit.checkpoint.layout import StoredTensor, read_header
from lowbit.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointReader:
    """The tensors of a model folder. Opening it reads headers only; every shard is checked to be whole.

    tensors: name -> StoredTensor, in the order of the shards. files: the weight files. index_size: the bytes of all
    tensors as the index says them, None if it does not. unlisted: tensors that are in no index though there is one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = _read_json(
            self.folder / "config.json", f"{self.folder} is not a model folder: it has no config.json"
        )
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
        self._check_index()

    @property
    def unlisted(self) -> list[str]:
        return [] if self._weight_map is None else [name for name in self.tensors if name not in self._weight_map]

    def _shard_names(self) -> list[str]:
        self.index_size: int | None = None
        if (self.folder / INDEX_NAME).is_file():
            index = _read_json(self.folder / INDEX_NAME)
            self._weight_map = index.get("weight_map")
            if not isinstance(self._weight_map, dict) or not self._weight_map:
                raise InputError(f"{INDEX_NAME} in {self.folder} has no weight_map: download it again")
            metadata = index.get("metadata")
            self.index_size = metadata.get("total_size") if isinstance(metadata, dict) else None
            names = sorted(set(map(str, self._weight_map.values())))
            for name in names:
                # an index comes from strangers: it may only name files beside it
                if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
                    raise InputError(
                        f"{INDEX_NAME} names {name!r}, which is outside {self.folder}: refusing to open it"
                    )
                if not name.endswith(".safetensors"):
                    raise InputError(f"{INDEX_NAME} names {name!r}; expected *.safetensors files only")
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
                raise InputError(f"{INDEX_NAME} says {name} is in {file}, but it is not: download the checkpoint again")

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        return read_tensor(self.tensors[name])

    def rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Read some rows (of the first dimension) of one tensor."""
        info = self.tensors[name]
        row = replace(info, shape=info.shape[1:])
        return torch.stack([read_tensor(replace(row, offset=info.offset + i * row.nbytes)) for i in indices])


def read_tensor(info: StoredTensor) -> torch.Tensor:
    """Read a stored tensor into memory of its own. Raises InputError if the file cannot be read or ends early."""
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    try:
        with info.file.open("rb", buffering=0) as file:
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


def _read_json(path: Path, missing: str | None = None) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(missing or f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object but a {type(data).__name__}")
    return data
