"""The options that say how a model is quantized: of `quantize`, and of `plan`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from lowbit.cli.common import HeadOptions, RevisionOption, ShardSizeOption
from lowbit.errors import UsageError
from lowbit.numerics.scheme import Scheme

SchemeOption = Annotated[
    str | None,
    typer.Option(
        help="W4A16, W8A16-G64, W4A16_ASYM, ...; with integer activations W8A8, W8A8-STATIC, W4A8; or FP16, BF16 "
        "(default W4A16).",
        show_default=False,
    ),
]
BitsOption = Annotated[int | None, typer.Option(help="2, 3, 4 or 8; instead of --scheme.", show_default=False)]
GroupSizeOption = Annotated[
    int | None, typer.Option(help="16 ... 1024, or -1 per channel (default 128).", show_default=False)
]
SymOption = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Symmetric grid, or a zero point per group.", show_default=False)
]
MethodOption = Annotated[
    str, typer.Option(help="rtn (round to nearest, no data), or gptq (error compensation, calibrated).")
]
ScaleSearchOption = Annotated[
    str | None, typer.Option(help="Of rtn: minmax or mse; of gptq: columns or minmax.", show_default=False)
]
MethodOptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=VALUE for the method: gptq has order, scale_search, damping, drift, sweeps.", show_default=False
    ),
]
NumSamplesOption = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
SeqlenOption = Annotated[int, typer.Option(min=2, help="Tokens in a sample.")]
IncludeVisionOption = Annotated[
    bool,
    typer.Option(
        "--include-vision", help="Of a model that sees or hears, quantize all of it, not its language model alone."
    ),
]
SmoothOption = Annotated[
    str | None,
    typer.Option(
        help="auto, or a SmoothQuant alpha from 0 to 1: scale the inputs of linears, and fold the scales into what is "
        "before them. Needs calibration samples, with rtn too.",
        show_default=False,
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        help="MODULES=SCHEME, where MODULES is a regex from the start of their names, or words of them: "
        "down_proj=W8A16; repeatable.",
        show_default=False,
    ),
]
ActivationRangeOption = Annotated[
    str | None,
    typer.Option(
        help="Of W8A8-STATIC: the range of inputs is mse, minmax or percentile (default mse).", show_default=False
    ),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Modules to leave alone: a regex from the start of their names, or words of them: down_proj, mlp, "
        "layers.0; repeatable.",
        show_default=False,
    ),
]
FormatOption = Annotated[str, typer.Option(help="compressed-tensors, gptq or awq.")]


@dataclass(frozen=True)
class RecipeOptions:
    """How a model is quantized."""

    scheme: SchemeOption = None
    bits: BitsOption = None
    group_size: GroupSizeOption = None
    sym: SymOption = None
    method: MethodOption = "rtn"
    scale_search: ScaleSearchOption = None
    option: MethodOptionsOption = None
    include_vision: IncludeVisionOption = False
    smooth: SmoothOption = None
    activation_range: ActivationRangeOption = None
    override: OverrideOption = None
    ignore: IgnoreOption = None

    def keywords(self, head: HeadOptions) -> dict:
        """Those of `lowbit.quantize` and `lowbit.plan`. Raises UsageError."""
        if self.scheme is not None and self.bits is not None:
            raise UsageError("--scheme and --bits say the same thing: pass one of them")
        scheme = self.scheme or (f"W{self.bits}A16" if self.bits is not None else "W4A16")
        overrides = [_override(text) for text in self.override or ()]
        for name in (scheme, *(other for _, other in overrides)):
            if name.strip().upper().startswith("W"):  # others may be dtypes, which are known to what is slow to import
                Scheme.parse(name)
        return {
            "scheme": scheme,
            "group_size": self.group_size,
            "sym": self.sym,
            "method": self.method,
            "options": _options(self.option, self.scale_search),
            "overrides": overrides,
            "ignore": self.ignore or (),
            "lm_head": head.scheme(),
            "include_vision": self.include_vision,
            "smooth": self.smooth,
            "activation_range": self.activation_range,
        }


@dataclass(frozen=True)
class SampleOptions:
    """How much data a run is calibrated with."""

    num_samples: NumSamplesOption = 128
    seqlen: SeqlenOption = 2048


@dataclass(frozen=True)
class FileOptions:
    """What is read and written."""

    format: FormatOption = "compressed-tensors"
    max_shard_size: ShardSizeOption = "5GB"
    revision: RevisionOption = None


def _options(texts: list[str] | None, scale_search: str | None) -> dict[str, str]:
    options = {} if scale_search is None else {"scale_search": scale_search}
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"option {text!r} is not understood; expected NAME=VALUE, e.g. damping=0.05")
        options[name.replace("-", "_")] = value
    return options


def _override(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator:
        raise UsageError(f"override {text!r} is not understood; expected REGEX=SCHEME, e.g. '.*down_proj=W8A16'")
    return pattern, scheme
