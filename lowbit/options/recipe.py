"""Options that say how a model is quantized, with which data, and what becomes of the result."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import UsageError
from lowbit.numerics.scheme import Scheme
from lowbit.options.keywords import changed, like, option
from lowbit.options.model import LoadOptions, OutputOptions


def _named_values(texts: list[str]) -> dict[str, str]:
    options = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"option {text!r} is not understood; expected NAME=VALUE, e.g. damping=0.05")
        options[name.replace("-", "_")] = value
    return options


def _check_name(scheme: object) -> None:
    """Raise UsageError for a grid that does not exist. Other names may be dtypes, which are known to what is slow to
    import."""
    if isinstance(scheme, str) and scheme.strip().upper().startswith("W"):
        Scheme.parse(scheme)


def _overrides(texts: list[str]) -> list[tuple[str, str]]:
    found = []
    for text in texts:
        pattern, separator, scheme = text.rpartition("=")
        if not separator:
            raise UsageError(f"override {text!r} is not understood; expected REGEX=SCHEME, e.g. '.*down_proj=W8A16'")
        _check_name(scheme)
        found.append((pattern, scheme))
    return found


# What else says how a weight is stored, and so cannot be said beside a budget
_OF_ONE_SCHEME = ("scheme", "group_size", "sym", "smooth", "activation_range")


@dataclass(frozen=True)
class RecipeOptions:
    """How a model is quantized."""

    scheme: str | Scheme | None = option(
        None,
        "W4A16, W8A16-G64, W4A16_ASYM, ...; with integer activations W8A8, W8A8-STATIC, W4A8 (default W4A16).",
        spelled="FP16 and BF16 quantize nothing: weights are converted.", typed=str | None,
    )  # fmt: skip
    bits: float | None = option(
        None,
        "2 to 6, or 8, instead of a scheme. 3.5, or 4.25, is an average, scales and all: a scheme for each part of "
        "the model is chosen, for the least KL.",
    )
    group_size: int | None = option(None, "16 ... 1024, or -1 per channel (default 128).")
    sym: bool | None = option(None, "Symmetric grid, or a zero point per group.", flags=("--sym/--asym",))
    method: str = option("rtn", "rtn (round to nearest, no data), or gptq (error compensation, calibrated).")
    scale_search: str | None = option(None, "Of rtn: minmax or mse; of gptq: columns or minmax.")
    options: Mapping[str, Any] | None = option(
        None,
        "Of the method: gptq has order, scale_search, damping, drift, sweeps.",
        spelled="NAME=VALUE, repeatable.", flags=("--option",), typed=list[str] | None, read=_named_values,
    )  # fmt: skip
    overrides: Mapping[str, str | Scheme] | Iterable[tuple[str, str | Scheme]] = option(
        (),
        "Schemes of other modules, by a regex from the start of their names, or words of them; the first that fits.",
        spelled="MODULES=SCHEME, as in down_proj=W8A16; repeatable.", flags=("--override",), typed=list[str] | None,
        read=_overrides,
    )  # fmt: skip
    ignore: str | Iterable[str] = option(
        (),
        "Modules to leave alone: a regex from the start of their names, or words of them: down_proj, mlp, layers.0.",
        spelled="Repeatable.", typed=list[str] | None, read=tuple,
    )  # fmt: skip
    include_vision: bool = option(
        False, "Of a model that sees or hears, quantize all of it, not its language model alone."
    )
    embeddings: str | Scheme | None = option(
        None,
        "Quantize the input embedding too, to a scheme such as W8A16-G128. An output embedding that is tied to it gets "
        "a table of its own, in the scheme of lm_head, or else in 8 bits.",
        typed=str | None,
    )
    smooth: float | str | None = option(
        None,
        "auto, which searches it by module, or a SmoothQuant alpha from 0 to 1: scale the inputs of linears, and fold "
        "the scales into what is before them. Needs calibration samples, with rtn too.",
        typed=str | None,
    )
    unclaimed: str = option(
        "copy",
        "Of tensors that no module of the model has, most of them of layers that predict further tokens (MTP), which "
        "servers use: copy them, quantize their linears as those of other layers, or drop them.",
    )
    activation_range: str | None = option(
        None, "Of W8A8-STATIC: the range of inputs is mse, minmax or percentile (default mse)."
    )

    size: str | int | None = option(
        None,
        "Instead of a scheme: bytes of all weight files at most, or 4.2GB; each part of the model gets a scheme.",
        typed=str | None,
    )
    max_kl: float | None = option(
        None, "Instead of a scheme: mean KL to the model at most, in nats per token, on text like the data set."
    )
    fit: str | int | None = option(
        None,
        "Instead of a scheme: bytes of memory at most, or 24GB, that running takes: weights, KV cache and working "
        "memory, at --context, --batch and --kv-cache.",
        typed=str | None,
    )
    engine: str | None = option(
        None, "For a budget, choose what this engine takes: vllm, sglang, transformers, gptqmodel, llama.cpp or mlx."
    )

    def __post_init__(self):
        if self.scheme is not None and self.bits is not None:
            raise UsageError("--scheme and --bits say the same thing: pass one of them")
        if isinstance(self.bits, float) and self.bits.is_integer():  # of a command line
            object.__setattr__(self, "bits", int(self.bits))
        if self.budgets:
            self._check_budget()
        elif self.engine is not None:
            raise UsageError(
                "--engine says which schemes a budget may choose: pass --bits 3.5, --size, --fit or --max-kl too"
            )
        else:
            _check_name(self.base)
        if isinstance(self.embeddings, str):
            Scheme.parse(self.embeddings)

    @property
    def average_bits(self) -> float | None:
        """The average that `bits` is, where it is no whole number."""
        return self.bits if isinstance(self.bits, float) else None

    @property
    def budgets(self) -> list[str]:
        """What was passed to which a scheme is to be chosen for each part of the model, as it is typed."""
        average = [] if self.average_bits is None else [f"--bits {self.bits}"]
        given = {"--size": self.size, "--fit": self.fit, "--max-kl": self.max_kl}
        return [name for name, value in given.items() if value is not None] + average

    def _check_budget(self) -> None:
        """Raise UsageError for several budgets, and for options that do not go with one."""
        budget, *others = self.budgets
        if others:
            raise UsageError(f"{budget} and {others[0]} are two budgets: pass one of them")
        if self.bits is not None and self.average_bits is None:
            raise UsageError(f"{budget} chooses the bits of each part: leave --bits {self.bits} out")
        for each in changed(self):
            if each.name in _OF_ONE_SCHEME:
                raise UsageError(f"{budget} chooses a scheme for each part: leave --{each.name.replace('_', '-')} out")
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise UsageError(f"max_kl is {self.max_kl!r}; expected a number above 0, in nats per token")

    @property
    def base(self) -> str | Scheme:
        """What scheme and bits stand for; with a budget, what nothing is decided by."""
        if self.budgets:
            return Scheme()
        return self.scheme or ("W4A16" if self.bits is None else f"W{self.bits}A16")


@dataclass(frozen=True)
class HeadOption:
    """The scheme of the output embedding."""

    lm_head: bool | str | Scheme | None = option(
        False, "Quantize the output embedding too: to this scheme, or to W8A16-G128 where it is True."
    )


@dataclass(frozen=True)
class SampleOptions:
    """How much data a run is calibrated with."""

    num_samples: int = option(128, "Calibration samples.", least=1)
    seqlen: int = option(2048, "Tokens in a sample.", least=2)


@dataclass(frozen=True)
class DrawnSampleOptions(SampleOptions):
    """How much data a run is calibrated with, and which of all there is."""

    seed: int = option(0, "Seed of the choice of samples.")


@dataclass(frozen=True)
class DataOptions(DrawnSampleOptions):
    """What a run is calibrated with."""

    dataset: Any = option(
        None,
        "What gptq calibrates with, and what schemes for a budget are chosen on: a name of `datasets` "
        "(org/name[:config[:split[:column]]]), a txt, jsonl or parquet file, token ids (.safetensors, .npy), or self: "
        "text that the model itself writes. Default: a public data set, or self where it cannot be reached.",
        typed=str | None,
    )


@dataclass(frozen=True)
class CalibrationOptions(DataOptions):
    """What a run is calibrated with, and how it goes on."""

    redo: str | None = option(None, "Regex of modules of an unfinished run: do their layers and all later ones again.")
    max_memory: str | int | None = option(
        None,
        "Bytes, or 8GB: walk layers again rather than hold more (default: half of what is free).",
        typed=str | None,
    )


@dataclass(frozen=True)
class FileOptions:
    """The files of a quantized model."""

    format: str = option("compressed-tensors", "compressed-tensors, gptq or awq.")
    max_shard_size: str | int = like(OutputOptions, "max_shard_size")


@dataclass(frozen=True)
class RunOptions:
    """What a run may replace, and whom it tells of what it does."""

    overwrite: bool = like(OutputOptions, "overwrite")
    dry_run: bool = option(False, "Show what `plan` shows; write nothing.")
    command: str | None = option(None, "The shell command that this is, for the report.", command=False)
    on_plan: Callable[[Any], Callable[..., None] | None] | None = option(
        None, "Called with the Plan before anything is written; may return what is called with each step that is done.",
        command=False,
    )  # fmt: skip
    announce: Callable[[str], None] | None = option(None, "Called with lines that a user should read.", command=False)


@dataclass(frozen=True)
class OnLoadOptions:
    """How a model is quantized while it is loaded."""

    bits: int = like(RecipeOptions, "bits", 4, help="2 to 6, or 8.")
    group_size: int = like(RecipeOptions, "group_size", 128, help="16 ... 1024, or -1 per channel.")
    sym: bool = like(RecipeOptions, "sym", True)
    scale_search: str = like(RecipeOptions, "scale_search", "minmax", help="minmax or mse.")
    ignore: str | Iterable[str] = like(RecipeOptions, "ignore")
    backend: str | None = like(LoadOptions, "backend")
    exact: bool | None = like(LoadOptions, "exact")
    source: dict | None = option(None, "The `quantization_config` of a checkpoint that is quantized already.")
    include_vision: bool = like(RecipeOptions, "include_vision")
    fuse: bool = like(LoadOptions, "fuse")
    tp_plan: str | Mapping[str, str] | None = like(LoadOptions, "tp_plan")
    overrides: Mapping[str, str | Scheme] | Iterable[tuple[str, str | Scheme]] = like(RecipeOptions, "overrides")
    embeddings: str | Scheme | None = like(
        RecipeOptions,
        "embeddings",
        help="Quantize the input embedding too, to a scheme such as W8A16-G128. An output embedding that is tied to it "
        "gets a table of its own, in 8 bits.",
    )
