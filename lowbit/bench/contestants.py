"""The sides of a comparison: of a checkpoint, or of random weights in the shapes of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from lowbit.bench.peers import PEERS, UNQUANTIZED, Task, load_peer
from lowbit.bench.random_model import check_memory, dense_model, quantized_model
from lowbit.bench.repeats import Side
from lowbit.bench.shapes import config_of
from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.decoded import decoded
from lowbit.conversion.formats import dequantize
from lowbit.discovery import require_language_head
from lowbit.errors import InputError, UsageError
from lowbit.folders.locate import REFERENCE, load_config, resolve
from lowbit.folders.opened import summarize
from lowbit.guards.safe_files import copy_file
from lowbit.hf import load
from lowbit.hf.head import large_head
from lowbit.numerics.scheme import HEAD_SCHEME, Scheme
from lowbit.quantization.run import quantize
from lowbit.system.memory import available_memory

LOWBIT = "lowbit"


@dataclass(frozen=True)
class Setting:
    """What all sides have in common. work: a folder for files that some of them need; dtype: "auto" or a name.
    backend, lm_head, exact: as in `lowbit.load`, of lowbit's side."""

    work: Path
    device: str = "cpu"
    dtype: str = "auto"
    backend: str | None = None
    lm_head: str | Scheme | None = None
    revision: str | None = None  # of a model on the Hub
    trust_remote_code: bool = False
    exact: bool | None = None

    def head_origin(self, config) -> str:
        """What becomes of the output embedding, for a model of this config."""
        scheme = self.head_scheme(config)
        return "" if scheme is None else f", head {scheme.name}"

    def head_scheme(self, config) -> Scheme | None:
        """Of the output embedding, where that is dense."""
        if isinstance(self.lm_head, Scheme | None):
            return self.lm_head
        return HEAD_SCHEME if self.device == "cpu" and large_head(config) else None


def _peers(names: list[str], setting: Setting, scheme: Scheme, dtype, folder: Callable[[], Path]) -> list[Side]:
    """folder: gives the unquantized checkpoint, and is asked for it only when a peer that is installed wants it."""

    def load_one(name: str):
        if reason := PEERS[name].refuse(scheme):
            raise InputError(reason)
        return load_peer(name, Task(folder(), setting.work, scheme, dtype, setting.device))

    return [Side(name, "the unquantized ones", partial(load_one, name)) for name in names]


def save_random(model, folder: Path) -> None:
    """Some tools load no model without a tokenizer: any will do."""
    model.save_pretrained(folder)
    for file in resolve(REFERENCE).glob("*token*"):
        copy_file(file, folder / file.name)


@dataclass(frozen=True)
class Shapes:
    """Random weights in the shapes of the model `name`, of which `layers` are made."""

    name: str
    layers: int | None
    scheme: Scheme
    setting: Setting

    @cached_property
    def config(self):
        return config_of(self.name, self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.setting.dtype == "auto" else getattr(torch, self.setting.dtype)

    @property
    def describes(self) -> str:
        return f"{self.name} shapes, {self.config.num_hidden_layers} layers, random weights"

    def subject(self) -> Side:
        check_memory(self.config, self.scheme, self.dtype, available_memory())
        made = partial(
            quantized_model, self.config, self.scheme, dtype=self.dtype, device=self.setting.device,
            backend=self.setting.backend, lm_head=self.setting.head_scheme(self.config), exact=self.setting.exact,
        )  # fmt: skip
        return Side(LOWBIT, f"{self.scheme.name}{self.setting.head_origin(self.config)}, random codes", made)

    def others(self, unquantized: bool, peers: list[str]) -> list[Side]:
        sides = [Side(UNQUANTIZED, "random weights", self._dense)] if unquantized else []
        return sides + _peers(peers, self.setting, self.scheme, self.dtype, self._folder)

    def _dense(self, device: str | None = None):
        check_memory(self.config, None, self.dtype, available_memory())
        return dense_model(self.config, dtype=self.dtype, device=device or self.setting.device)

    def _folder(self) -> Path:
        folder = self.setting.work / "unquantized"
        if not folder.exists():
            save_random(self._dense("cpu"), folder)
        return folder


@dataclass(frozen=True)
class Checkpoint:
    """A model folder or Hub id. An unquantized one is quantized to `scheme` by `method`; of a quantized one, `source`
    is what it was made from, and without it, it is dequantized."""

    model: str
    source: str | None
    scheme: Scheme
    method: str
    setting: Setting

    @cached_property
    def folder(self) -> Path:
        return resolve(self.model, self.setting.revision)

    @cached_property
    def _reader(self) -> CheckpointReader:
        return decoded(CheckpointReader(self.folder))

    @property
    def is_quantized(self) -> bool:
        """Whether it has integers that run as they are stored."""
        return self._reader.quantization_config is not None

    @property
    def is_encoded(self) -> bool:
        """Whether all that is quantized in it is decoded when it is read."""
        return not self.is_quantized and any(info.is_encoded for info in self._reader.tensors.values())

    @property
    def describes(self) -> str:
        return self.model

    def subject(self) -> Side:
        require_language_head(load_config(self.folder), self.folder)
        if not self.is_quantized and self.source is not None:
            raise UsageError(f"--source is for a quantized MODEL, and {self.model} is not quantized")
        origin = "as stored" if self.is_quantized else f"{self.scheme.name}, {self.method}"
        asked = self.setting.lm_head
        if isinstance(asked, Scheme):  # what "auto" does depends on what is stored: `kernels` shows it
            origin += f", head {asked.name}"
        return Side(LOWBIT, origin, self._load_quantized)

    def others(self, unquantized: bool, peers: list[str]) -> list[Side]:
        origin = self.source or ("dequantized" if self.is_quantized or self.is_encoded else self.model)
        sides = [Side(UNQUANTIZED, origin, lambda: self._load(self._unquantized()))] if unquantized else []
        return sides + _peers(peers, self.setting, self._scheme(), self._dtype(), self._unquantized)

    def _load(self, folder: Path, **options):
        setting = self.setting
        options["trust_remote_code"] = setting.trust_remote_code
        return load(folder, dtype=setting.dtype, device_map=setting.device, **options)

    def _load_quantized(self):
        folder = self.folder
        if not self.is_quantized:
            folder = self.setting.work / "quantized"
            trust = self.setting.trust_remote_code
            quantize(self.folder, folder, scheme=self.scheme, method=self.method, trust_remote_code=trust)
        setting = self.setting
        return self._load(folder, backend=setting.backend, lm_head=setting.lm_head, exact=setting.exact)

    def _unquantized(self) -> Path:
        if self.source is not None or not (self.is_quantized or self.is_encoded):
            return self.folder if self.source is None else resolve(self.source)
        folder = self.setting.work / "unquantized"
        if not folder.exists():
            dequantize(self.folder, folder, trust_remote_code=self.setting.trust_remote_code)
        return folder

    def _scheme(self) -> Scheme:
        """What most layers of it have."""
        if not self.is_quantized:
            return self.scheme
        parts = {part["name"]: part["parameters"] for part in summarize(self.folder)["parts"]}
        names = [name for name in parts if name.startswith("W")]
        return Scheme.parse(max(names, key=parts.get).partition(",")[0])

    def _dtype(self) -> torch.dtype:
        name = self.setting.dtype
        if name != "auto":
            return getattr(torch, name)
        return load_config(self.folder, self.setting.trust_remote_code).dtype or torch.bfloat16
