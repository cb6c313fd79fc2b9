"""Quantizers: weight (and statistics) in, QuantWeight out. They know neither files nor formats nor models.

A quantizer module has `OPTIONS`, its options with their allowed values (a tuple, the first is the default, or
`Between`), `needs(options)`, a tuple of the statistics it wants with them ("hessian", "missing"; empty: data-free), and
`quantize(weight [N, K], stats: dict, scheme: Scheme, options: Mapping) -> (QuantWeight, notes: dict for the report)`;
it may take what it does not need any longer out of `stats`.
"""

from dataclasses import dataclass
from importlib import import_module

from lowbit.errors import UsageError

QUANTIZERS = {
    "rtn": "lowbit.quantizers.rtn",
    "gptq": "lowbit.quantizers.gptq",
}


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`, whole if `low` is; or the word that `default` is."""

    default: float | str
    low: float
    high: float

    def __contains__(self, value) -> bool:
        if isinstance(value, str):
            return value == self.default
        kinds = (int,) if isinstance(self.low, int) else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        number = f"{'an integer' if isinstance(self.low, int) else 'a number'} from {self.low} to {self.high}"
        return f"{self.default}, or {number}" if isinstance(self.default, str) else number


def get_quantizer(name: str):
    if name not in QUANTIZERS:
        raise UsageError(f"method {name!r} is not known; allowed: {', '.join(QUANTIZERS)}")
    return import_module(QUANTIZERS[name])


def checked_options(name: str, options) -> dict:
    """`options` completed with the defaults of quantizer `name`; raises UsageError for an unknown option or value.

    Values may be text, as command lines have them."""
    known = get_quantizer(name).OPTIONS
    given = {}
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"method {name} has no option {option!r}; allowed: {', '.join(known) or 'none'}")
        allowed = known[option]
        given[option] = _number(value) if isinstance(allowed, Between) else value
        if given[option] not in allowed:
            choices = str(allowed) if isinstance(allowed, Between) else ", ".join(map(str, allowed))
            raise UsageError(f"{option} is {value!r}; allowed: {choices}")
    defaults = {option: a.default if isinstance(a, Between) else a[0] for option, a in known.items()}
    return {**defaults, **given}


def _number(value):
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
