"""Options that say which model is opened, how it is loaded, and how one is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit.numerics.scheme import Scheme
from lowbit.options.keywords import option

if TYPE_CHECKING:  # commands show their options before they import it
    import torch


@dataclass(frozen=True)
class RevisionOptions:
    """Which of the models of a name is read."""

    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")


@dataclass(frozen=True)
class SourceOptions(RevisionOptions):
    """Which of the models of a name is read, and how far it is trusted."""

    trust_remote_code: bool = option(False, "Run Python code that the model ships.")


@dataclass(frozen=True)
class ShardOptions:
    """How weights are spread over files."""

    max_shard_size: str | int = option("5GB", "Largest weight file.", typed=str)


@dataclass(frozen=True)
class OutputOptions(ShardOptions):
    """How a model folder is written."""

    overwrite: bool = option(False, "Replace an existing model folder.")


@dataclass(frozen=True)
class DeviceOptions:
    """What a model runs on."""

    device_map: Any = option(
        None,
        "As in transformers: auto, cpu, cuda, ...",
        spelled="(default: cuda if there is one, else cpu).", typed=str | None,
    )  # fmt: skip
    dtype: "torch.dtype | str | None" = option("auto", "Compute dtype: auto, bfloat16, float16, float32.", typed=str)
    backend: str | None = option(None, "Run on this backend or fail (default: the first that can).")
    exact: bool | None = option(
        None,
        "Multiply inputs as they are; else, on CPUs, as 8-bit integers where they are many rows and that was measured "
        "to change little (default: as LOWBIT_EXACT says).",
        flags=("--exact/--no-exact",),
    )


@dataclass(frozen=True)
class ShareOptions:
    """How several processes share a model."""

    tp_plan: "str | Mapping[str, str] | None" = option(
        None,
        "How the processes of torchrun share the weights: auto for the tensor parallel plan of transformers, "
        "experts for that with whole experts on each.",
        spelled="(default: auto under torchrun).", typed=str | None,
    )  # fmt: skip


@dataclass(frozen=True)
class LoadOptions(DeviceOptions, ShareOptions):
    """What a model runs on, and what is done to it for that."""

    fuse: bool = option(True, "Linears that share an input share one product: fewer launches, the same result.")
    lm_head: str | Scheme | None = option(
        None,
        'A scheme such as "W8A16-G128" for an output embedding that the checkpoint holds dense, tied or not; "auto": '
        "that one on CPUs, where it is large.",
    )
