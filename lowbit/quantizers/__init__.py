"""Quantizers: weight (and statistics) in, QuantWeight out. They know neither files nor formats nor models.

A quantizer module has `needs`, a tuple of the statistics it wants ("hessian", ...; empty: data-free), `OPTIONS`, its
options with their allowed values (the first is the default), and
`quantize(weight [N, K], stats: dict, scheme: Scheme, options: Mapping) -> QuantWeight`.
"""

from importlib import import_module

from lowbit.errors import UsageError

QUANTIZERS = {
    "rtn": "lowbit.quantizers.rtn",
}


def get_quantizer(name: str):
    if name not in QUANTIZERS:
        raise UsageError(f"method {name!r} is not known; allowed: {', '.join(QUANTIZERS)}")
    return import_module(QUANTIZERS[name])


def checked_options(name: str, options) -> dict:
    """`options` completed with the defaults of quantizer `name`; raises UsageError for an unknown option or value."""
    known = get_quantizer(name).OPTIONS
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"method {name} has no option {option!r}; allowed: {', '.join(known)}")
        if value not in known[option]:
            raise UsageError(f"{option} is {value!r}; allowed: {', '.join(map(str, known[option]))}")
    return {option: options.get(option, values[0]) for option, values in known.items()}
