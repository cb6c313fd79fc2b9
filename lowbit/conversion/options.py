"""Options of conversions: what commands show of them before anything heavy is imported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowbit.options import RunOptions, like, option

if TYPE_CHECKING:  # commands show their options before they import it
    import torch


@dataclass(frozen=True)
class ExportOptions:
    """What some formats need to know."""

    pre: str | None = option(
        None, "Of gguf: llama.cpp's name of the tokenizer's splitting rules, where they are not found."
    )


@dataclass(frozen=True)
class DenseOptions:
    """What a dequantized model is stored as."""

    dtype: "torch.dtype | str | None" = option(
        None, "bfloat16, float16 or float32 for all of it (default: as stored).", typed=str | None
    )


@dataclass(frozen=True)
class DtypeOptions:
    """What becomes of values that a dtype cannot hold, and what the report says."""

    clamp: bool = option(False, "Of FP16 and BF16: values that are too large become the largest.")
    command: str | None = like(RunOptions, "command")
