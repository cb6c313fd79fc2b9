"""What a run is calibrated with, and whether it needs to be."""

import re
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import UsageError
from lowbit.numerics.scheme import Recipe
from lowbit.options import CalibrationOptions, SampleOptions, changed
from lowbit.quantization.plan import statistics


@dataclass(frozen=True)
class Calibration(CalibrationOptions):
    """What to calibrate with, checked. max_memory: bytes, None for half of what is free."""

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


def require_data_method(recipe: Recipe, calibration: SampleOptions) -> None:
    """Raise UsageError for an option that says how to calibrate, where nothing is calibrated."""
    given = changed(calibration)
    if given and not needs_data(recipe):
        raise UsageError(
            f"{given[0].name} is of runs with calibration data, and {recipe.method} of {recipe.scheme.name} takes "
            "none: leave it out, or pass a method that does (gptq)"
        )
