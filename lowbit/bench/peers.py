"""Other tools that run a model quantized, each set up as its documents say for the device."""

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.errors import UsageError
from lowbit.numerics.scheme import Scheme
from lowbit.quantization.run import quantize


@dataclass(frozen=True)
class Task:
    """What a peer is to load: the unquantized checkpoint in `folder`, with a grid as close to `scheme` as it has one.
    work: a folder for files it needs."""

    folder: Path
    work: Path
    scheme: Scheme
    dtype: torch.dtype
    device: str


def _with_config(task: Task, config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        task.folder, quantization_config=config, dtype=task.dtype, device_map=task.device
    )


def _bitsandbytes_nf4(task: Task):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=task.dtype
    )  # fmt: skip
    return _with_config(task, config)


def _bitsandbytes_int8(task: Task):
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each product that it casts to float16
    return _with_config(task, BitsAndBytesConfig(load_in_8bit=True))


def _torchao_int4(task: Task):
    """On a GPU the layout of its tinygemm kernels, on a CPU the one that it packs for torch's CPU kernel."""
    from transformers import TorchAoConfig

    if task.device == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=task.scheme.group_size)
    else:
        from torchao.quantization import Int4WeightOnlyConfig

        config = Int4WeightOnlyConfig(group_size=task.scheme.group_size, int4_packing_format="tile_packed_to_4d")
    return _with_config(task, TorchAoConfig(config))


def load_gptqmodel(task: Task, backend: str | None = None):
    """The kernel that it takes itself for the device, or the `backend` of this name."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores or fewer it does not start without
    from gptqmodel import BACKEND, GPTQModel

    folder = task.work / f"gptq-{task.scheme.name}"
    if not folder.exists():
        quantize(task.folder, folder, scheme=task.scheme, format="gptq")
    loaded = GPTQModel.load(
        str(folder), device=task.device, dtype=task.dtype, backend=BACKEND.AUTO if backend is None else BACKEND(backend)
    )
    return loaded.model


@dataclass(frozen=True)
class Peer:
    """package: what has to be installed. load: gives a model of transformers. bits: those it has."""

    package: str
    bits: tuple[int, ...]
    load: Callable[[Task], torch.nn.Module]

    def refuse(self, scheme: Scheme) -> str | None:
        """Why it cannot be measured here, or None."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if scheme.bits not in self.bits:
            return f"it has {' and '.join(map(str, self.bits))} bits, not {scheme.bits}"
        return None


# As `--against` names them; what one tool offers in several ways has its name in front
PEERS = {
    "bitsandbytes NF4": Peer("bitsandbytes", (4,), _bitsandbytes_nf4),
    "bitsandbytes int8": Peer("bitsandbytes", (8,), _bitsandbytes_int8),
    "torchao int4": Peer("torchao", (4,), _torchao_int4),
    "gptqmodel": Peer("gptqmodel", (2, 3, 4, 8), load_gptqmodel),
}
UNQUANTIZED = "unquantized"


def parse_against(text: str) -> tuple[bool, list[str]]:
    """(whether the unquantized model is measured, names of PEERS) from "unquantized,torchao", or "none".

    Raises UsageError for a name that is not known.
    """
    wanted = [] if text.strip() == "none" else [part.strip() for part in text.split(",")]
    allowed = (UNQUANTIZED, *dict.fromkeys(peer.package for peer in PEERS.values()))
    for name in wanted:
        if name not in allowed:
            raise UsageError(f"cannot compare against {name!r}; allowed: {', '.join(allowed)}, or none")
    return UNQUANTIZED in wanted, [name for name, peer in PEERS.items() if peer.package in wanted]


def load_peer(name: str, task: Task) -> torch.nn.Module:
    """Raises whatever the tool raises."""
    return PEERS[name].load(task).eval()
