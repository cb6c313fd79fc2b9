"""Options that say what an adapter is merged into, and how the result is measured."""

from dataclasses import dataclass
from typing import Any

from lowbit.numerics.scheme import Scheme
from lowbit.options.keywords import like, option
from lowbit.options.model import DeviceOptions
from lowbit.options.recipe import FileOptions, RecipeOptions


@dataclass(frozen=True)
class MergeOptions:
    """What becomes of the merged weights."""

    scheme: str | Scheme | None = like(
        RecipeOptions, "scheme", None, help="Quantize the merged model to this scheme, all of it.", spelled=""
    )
    method: str | None = like(
        RecipeOptions,
        "method",
        None,
        help="Quantize the merged model anew: rtn, or gptq, which is calibrated (default: a dense model stays dense; "
        "in a quantized one the weights that the adapter changes are rounded to nearest, in the scheme they have).",
    )
    format: str | None = like(FileOptions, "format", None, help="Of --scheme or --method (default: that of MODEL).")

    @property
    def in_place(self) -> bool:
        """Whether the weights stay in what they are stored in."""
        return self.scheme is None and self.method is None


@dataclass(frozen=True)
class ComparisonOptions:
    """What the merged model is compared with the unmerged one on."""

    compare: bool = option(
        True,
        "Measure the KL divergence of the merged model to the model with the adapter beside it.",
        flags=("--compare/--no-compare",),
    )
    heldout: str = option(
        "stdlib",
        "The text of that: a file, 'stdlib' (Python modules), 'wikitext2', or org/name[:config[:split[:column]]].",
    )
    heldout_tokens: int = option(2048, "Tokens of that text.", least=16)
    device_map: Any = like(DeviceOptions, "device_map")
