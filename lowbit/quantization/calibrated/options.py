"""What a run is calibrated with, and whether it needs to be."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from lowbit.errors import UsageError
from lowbit.numerics.scheme import Recipe
from lowbit.quantization.plan import statistics


@dataclass(frozen=True)
class Calibration:
    """What to calibrate with, as `quantize` is asked for it. max_memory: bytes, None for half of what is free."""

    dataset: object = None
    num_samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    redo: str | None = None
    max_memory: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("seqlen", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is {value!r}; expected a whole number of at least {least}")
        try:
            re.compile(self.redo or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{self.redo!r} is not a regular expression: {error}") from None

    def to_dict(self) -> dict:
        """What a job remembers of it; of a local file also when it was changed."""
        named = self.dataset is None or isinstance(self.dataset, str | Path)
        dataset = str(self.dataset) if named else "token ids"
        if named and Path(dataset).is_file():
            dataset += f" of {Path(dataset).stat().st_mtime_ns}"
        return {"dataset": dataset, "num_samples": self.num_samples, "seqlen": self.seqlen, "seed": self.seed}


def needs_data(recipe: Recipe) -> bool:
    """Whether a run goes through the layers with calibration samples."""
    return bool(statistics(recipe)) or recipe.smooth is not None


def require_data_method(recipe: Recipe, **options: object) -> None:
    """Raise UsageError for an option of `Calibration` that was given, where nothing is calibrated."""
    if needs_data(recipe):
        return
    defaults = {field.name: field.default for field in fields(Calibration)}
    for name, value in options.items():
        if value is not defaults[name] and not (type(value) is int and value == defaults[name]):
            raise UsageError(
                f"{name} is of runs with calibration data, and {recipe.method} of {recipe.scheme.name} takes none: "
                "leave it out, or pass a method that does (gptq)"
            )
