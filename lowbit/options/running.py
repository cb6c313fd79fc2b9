"""Options that say how a quantized model is going to be run, which decides on the memory that it takes."""

import re
from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.options.generation import SessionOptions
from lowbit.options.keywords import changed, like, option
from lowbit.options.recipe import FileOptions

# bf16: another name of full, which is the dtype that the model computes in
KV_CACHES = ("full", "bf16", "int8")


@dataclass(frozen=True)
class LoadedOptions:
    """What a quantized model is going to run at a time."""

    context: str | int | None = option(
        None,
        "Tokens of a prompt and its answer, such as 4096 or 32k: with --fit, what is to fit (default 4096, or what the "
        "model was made for where that is less); with plan, shows the memory that running takes.",
        typed=str | None,
    )
    batch: int = option(1, "Sequences at a time.", least=1)
    kv_cache: str = like(SessionOptions, "kv_cache")

    def __post_init__(self):
        if self.kv_cache not in KV_CACHES:
            raise UsageError(f"kv_cache is {self.kv_cache!r}; expected one of {', '.join(KV_CACHES)}")
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}; expected 1 or more")
        if self.context is not None:
            _count(self.context)

    @property
    def tokens(self) -> int | None:
        """`context` as a number."""
        return None if self.context is None else _count(self.context)

    @property
    def asked(self) -> list[str]:
        """What was passed, as it is typed."""
        names = [each.name for each in changed(self) if each.name in ("context", "batch", "kv_cache")]
        return [f"--{name.replace('_', '-')} {getattr(self, name)}" for name in names]


@dataclass(frozen=True)
class TargetOptions(LoadedOptions, FileOptions):
    """What a quantized model becomes: its files, and what they are going to be run with."""


def _count(text: str | int) -> int:
    """ "32k" -> 32768. Raises UsageError for anything else than a number of 2 or more."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(k?)\s*", str(text), re.IGNORECASE)
    count = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if count < 2:
        raise UsageError(f"context {text!r} is not understood; expected a number of tokens, such as 4096 or 32k")
    return count
