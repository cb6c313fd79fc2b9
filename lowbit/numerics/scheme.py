"""What to do with a weight (`Scheme`), with what it multiplies (`Activations`), and with a model (`Recipe`)."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from lowbit.errors import UsageError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)
PER_CHANNEL = -1
SCALE_SEARCHES = ("minmax", "mse")
# What `--scheme` may say instead of a grid
DTYPE_NAMES = ("FP16", "BF16")

TOKEN, TENSOR = "token", "tensor"
ACTIVATION_RANGES = ("mse", "minmax", "percentile")  # the first is the default

_NAME = re.compile(
    r"W(?P<bits>\d+)A(?P<activation_bits>8|16)(?P<asym>_ASYM)?(-G(?P<group>\d+)|-(?P<channel>CHANNEL))?"
    r"(-(?P<activations>STATIC|STATIC_SYM|DYNAMIC_ASYM))?",
    re.IGNORECASE,
)


def _one_of(name: str, value, allowed) -> None:
    # 4.0 == 4 and True == 1, but neither is what a config should carry
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise UsageError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")


def _alpha(smooth) -> float | str | None:
    """A number from 0 to 1, which may be text, "auto" or None."""
    if smooth is None or smooth == "auto":
        return smooth
    try:
        alpha = float(smooth)
    except (TypeError, ValueError):
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise UsageError(f"smooth is {smooth!r}; expected auto, or a number from 0 to 1")
    return alpha


@dataclass(frozen=True)
class Activations:
    """Uniform integer grid of the inputs of a linear: signed codes of 8 bits.

    strategy: TOKEN, a scale (and zero point) for each token, taken from its own range when it arrives; or TENSOR, one
    for all tokens, fixed in calibration and stored beside the weight. sym: the zero point is 0.
    """

    bits: int = 8
    sym: bool = True
    strategy: str = TOKEN

    def __post_init__(self):
        _one_of("activation bits", self.bits, (8,))
        _one_of("activation sym", self.sym, (True, False))
        _one_of("activation strategy", self.strategy, (TOKEN, TENSOR))

    @property
    def static(self) -> bool:
        """Whether the scale is stored, not computed from each token."""
        return self.strategy == TENSOR


# Activations -> how the name of a scheme ends
_ACTIVATION_NAMES = {
    Activations(): "",
    Activations(sym=False): "-DYNAMIC_ASYM",
    Activations(sym=False, strategy=TENSOR): "-STATIC",
    Activations(strategy=TENSOR): "-STATIC_SYM",
}


@dataclass(frozen=True)
class Scheme:
    """Uniform integer grid of a weight [out_features, in_features], and of its inputs where those are integers too.

    bits: 2 to 6, or 8. group_size: how many consecutive in_features share a scale, -1 for one scale per output channel.
    sym: the zero point is fixed at the middle code, 2^(bits-1); otherwise each group stores one.
    activations: None where the inputs stay in floating point.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    activations: Activations | None = None

    def __post_init__(self):
        _one_of("bits", self.bits, BITS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("sym", self.sym, (True, False))

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Read a scheme name such as W4A16, W8A16-G64, W4A16_ASYM, W4A16-CHANNEL, W4A8, W8A8 or W8A8-STATIC.

        Unless named, groups are of 128 inputs; of W8A8, weights are per channel (as in llm-compressor and vLLM).
        """
        match = _NAME.fullmatch(name.strip())
        integers = match is not None and match["activation_bits"] == "8"
        if match is None or (match["activations"] and not integers):
            raise UsageError(
                f"scheme {name!r} is not known; expected W<bits>A16[_ASYM][-G<group>|-CHANNEL], e.g. W4A16-G128, or "
                "W<bits>A8[_ASYM][-G<group>|-CHANNEL][-STATIC|-STATIC_SYM|-DYNAMIC_ASYM], e.g. W8A8"
            )
        bits = int(match["bits"])
        usual = PER_CHANNEL if integers and bits == 8 else 128
        group = PER_CHANNEL if match["channel"] else int(match["group"] or usual)
        suffix = f"-{match['activations'].upper()}" if match["activations"] else ""
        activations = next(a for a, ending in _ACTIVATION_NAMES.items() if ending == suffix) if integers else None
        return cls(bits, group, not match["asym"], activations)

    @property
    def name(self) -> str:
        group = "CHANNEL" if self.group_size == PER_CHANNEL else f"G{self.group_size}"
        weight = f"{'' if self.sym else '_ASYM'}-{group}"
        if self.activations is None:
            return f"W{self.bits}A16{weight}"
        return f"W{self.bits}A{self.activations.bits}{weight}{_ACTIVATION_NAMES[self.activations]}"

    @property
    def weight_only(self) -> "Scheme":
        """The same grid for the weight, inputs in floating point."""
        return replace(self, activations=None)

    @property
    def is_static(self) -> bool:
        """Whether the range of the inputs has to be known beforehand."""
        return self.activations is not None and self.activations.static

    def to_dict(self) -> dict:
        """Without `activations` where there are none."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping) -> "Scheme":
        activations = data.get("activations")
        return cls(**{**data, "activations": Activations(**activations) if activations else None})

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def middle(self) -> int:
        """The code that stands for zero in a symmetric scheme."""
        return 2 ** (self.bits - 1)

    def group_of(self, in_features: int) -> int:
        """Length of one group along in_features."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def groups(self, in_features: int) -> int:
        return in_features // self.group_of(in_features)

    def fits(self, in_features: int) -> bool:
        return in_features % self.group_of(in_features) == 0

    def fitted(self, in_features: int) -> "Scheme":
        """This scheme, or where the group does not divide in_features: a smaller group, else per channel.

        compressed-tensors cannot express a short last group, so the fallback is a config group of its own.
        """
        if self.fits(in_features):
            return self
        smaller = [g for g in GROUP_SIZES if 0 < g < self.group_size and in_features % g == 0]
        return replace(self, group_size=max(smaller, default=PER_CHANNEL))


# The default scheme of an output embedding: every token reads all of it, and int8 costs it next to nothing
HEAD_SCHEME = Scheme(8, 128)


# What becomes of tensors that no module claims and other programs use
UNCLAIMED = ("copy", "quantize", "drop")
# What is no regex but a name, or the end of one
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


def names_module(pattern: str, name: str) -> bool:
    """Whether `pattern` means the module `name`: as a regex it matches from the start of the name; as a plain name it
    stands in it, whole words between dots (`down_proj`, `mlp`, `layers.0`)."""
    plain = _PLAIN_NAME.fullmatch(pattern) is not None and f".{pattern}." in f".{name}."
    return plain or re.match(pattern, name) is not None


def _pairs(overrides) -> list[tuple[str, Scheme]]:
    """(pattern, Scheme) of pairs, or of a dict, whose schemes may be names."""
    made = []
    for pair in overrides.items() if isinstance(overrides, Mapping) else overrides:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UsageError(
                f"override {pair!r} is not understood; expected (pattern, scheme), e.g. ('.*down_proj', 'W8A16')"
            )
        pattern, scheme = pair
        made.append((pattern, Scheme.parse(scheme) if isinstance(scheme, str) else scheme))
    return made


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model: the scheme of its linears, the method, and what is left alone.

    overrides: (pattern, Scheme) pairs, or a dict of them, of schemes or their names; the first one that names a module
    (`names_module`) wins over `scheme`.
    ignore: patterns of modules that stay in the source dtype.
    options: of the method, by name. lm_head: the scheme of the output embedding, None to leave it alone. embeddings:
    the same of the input embedding, whose rows are looked up, so that nothing but the weight can be quantized.
    include_vision: of a model that sees or hears, quantize all of it, not its language model alone. smooth: scale the
    inputs of linears before they are quantized, by the alpha of SmoothQuant, or "auto", which searches it.
    activation_range: how static schemes find the range of their inputs, "mse", "minmax" or "percentile"
    (`lowbit.numerics.activations`). unclaimed: what becomes of tensors that the model has no modules for, such as those
    of layers that predict further tokens: "copy", "quantize" or "drop".
    """

    scheme: Scheme = field(default_factory=Scheme)
    method: str = "rtn"
    options: Mapping = field(default_factory=dict)
    overrides: tuple[tuple[str, Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    lm_head: Scheme | None = None
    include_vision: bool = False
    smooth: float | str | None = None
    activation_range: str = ACTIVATION_RANGES[0]
    embeddings: Scheme | None = None
    unclaimed: str = UNCLAIMED[0]

    def __post_init__(self):
        _one_of("activation_range", self.activation_range, ACTIVATION_RANGES)
        _one_of("unclaimed", self.unclaimed, UNCLAIMED)
        if self.embeddings is not None and self.embeddings.activations is not None:
            raise UsageError(
                f"embeddings is {self.embeddings.name}; expected W<bits>A16[_ASYM][-G<group>|-CHANNEL]: a row is "
                "looked up, it has no inputs to quantize"
            )
        object.__setattr__(self, "options", dict(self.options))
        object.__setattr__(self, "smooth", _alpha(self.smooth))
        # `re:` marks a regex in compressed-tensors and llm-compressor recipes; here every pattern is one
        overrides = ((pattern.removeprefix("re:"), scheme) for pattern, scheme in _pairs(self.overrides))
        object.__setattr__(self, "overrides", tuple(overrides))
        if isinstance(self.ignore, str):
            object.__setattr__(self, "ignore", (self.ignore,))
        object.__setattr__(self, "ignore", tuple(pattern.removeprefix("re:") for pattern in self.ignore))
        for pattern in (*self.ignore, *(p for p, _ in self.overrides)):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None

    def ignored_by(self, *names: str) -> str | None:
        """The ignore pattern that means a module known by `names`, else None."""
        return next((p for p in self.ignore for name in names if names_module(p, name)), None)

    def overridden_by(self, *names: str) -> str | None:
        """The pattern of the override that means a module known by `names`, else None."""
        return next((p for p, _ in self.overrides for name in names if names_module(p, name)), None)

    def asked_for(self, *names: str, is_head: bool = False, is_embedding: bool = False) -> Scheme:
        """The scheme of a module known by `names`, whether it fits its in_features or not. is_head: the output
        embedding. is_embedding: the input embedding."""
        of_kind = self.lm_head if is_head else self.embeddings if is_embedding else None
        usual = self.scheme if of_kind is None else of_kind
        pattern = self.overridden_by(*names)
        return usual if pattern is None else dict(reversed(self.overrides))[pattern]

    @property
    def is_static(self) -> bool:
        """Whether any scheme needs ranges of inputs, and so a calibration."""
        schemes = (self.scheme, self.lm_head, *(scheme for _, scheme in self.overrides))
        return any(scheme is not None and scheme.is_static for scheme in schemes)

    def to_dict(self) -> dict:
        """`activation_range` is part of it where a scheme is static."""
        ranges = {"activation_range": self.activation_range} if self.is_static else {}
        return {
            "scheme": self.scheme.to_dict(),
            "method": self.method,
            "options": dict(self.options),
            "overrides": [[pattern, scheme.to_dict()] for pattern, scheme in self.overrides],
            "ignore": list(self.ignore),
            "lm_head": None if self.lm_head is None else self.lm_head.to_dict(),
            "include_vision": self.include_vision,
            **({} if self.embeddings is None else {"embeddings": self.embeddings.to_dict()}),
            **({} if self.smooth is None else {"smooth": self.smooth}),
            **({} if self.unclaimed == UNCLAIMED[0] else {"unclaimed": self.unclaimed}),
            **ranges,
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> "Recipe":
        overrides = [(pattern, Scheme.from_dict(scheme)) for pattern, scheme in data.get("overrides", ())]
        head, embeddings = data.get("lm_head"), data.get("embeddings")
        if head is True:  # of a report from before heads had a scheme of their own
            head = data["scheme"]
        return cls(
            Scheme.from_dict(data["scheme"]),
            data["method"],
            data.get("options", {}),
            tuple(overrides),
            data.get("ignore", ()),
            Scheme.from_dict(head) if head else None,
            data.get("include_vision", False),
            smooth=data.get("smooth"),
            activation_range=data.get("activation_range", ACTIVATION_RANGES[0]),
            embeddings=Scheme.from_dict(embeddings) if embeddings else None,
            unclaimed=data.get("unclaimed", UNCLAIMED[0]),
        )


def is_dtype(scheme: object) -> bool:
    """Whether a scheme is the name of a half precision dtype."""
    return isinstance(scheme, str) and scheme.strip().upper() in DTYPE_NAMES
