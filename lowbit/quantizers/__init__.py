"""Quantizers: weight (and statistics) in, QuantWeight out. They know neither files nor formats nor models.

`Quantizer` is what a module in the table has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from lowbit.errors import UsageError

if TYPE_CHECKING:  # commands check the names in the table before they import torch
    import torch

    from lowbit.numerics.qweight import QuantWeight
    from lowbit.numerics.scheme import Scheme

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

    def __contains__(self, value: object) -> bool:
        if isinstance(value, str):
            return value == self.default
        kinds = (int,) if isinstance(self.low, int) else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        number = f"{'an integer' if isinstance(self.low, int) else 'a number'} from {self.low} to {self.high}"
        return f"{self.default}, or {number}" if isinstance(self.default, str) else number


class Quantizer(Protocol):
    """A quantizer module.

    Attributes:
        OPTIONS: Name -> allowed values: a tuple, of which the first is the default, or `Between`.
    """

    OPTIONS: Mapping[str, tuple | Between]

    def needs(self, options: Mapping) -> tuple[str, ...]:
        """The statistics that it wants with these options: "hessian", "missing" (`lowbit.calibration.moments`); none if
        it takes no data."""

    def quantize(self, weight: torch.Tensor, stats: dict, scheme: Scheme, options: Mapping) -> tuple[QuantWeight, dict]:
        """Quantize one weight.

        Args:
            weight: Floating [out_features, in_features]; not changed.
            stats: The statistics by name. What is not needed any longer may be taken out, so that it is freed.
            scheme: The grid; it fits in_features.
            options: All of `OPTIONS`, with allowed values.

        Returns:
            The weight, and notes for the report.
        """


def get_quantizer(name: str) -> Quantizer:
    if name not in QUANTIZERS:
        raise UsageError(f"method {name!r} is not known; allowed: {', '.join(QUANTIZERS)}")
    return cast(Quantizer, import_module(QUANTIZERS[name]))


def checked_options(name: str, options: Mapping) -> dict:
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


def _number(value: object) -> object:
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
