"""What becomes of the inputs of a model's products: multiplied as they are, or rounded where they are many."""

import os

from torch import nn

from lowbit.backends import EXACT
from lowbit.errors import UsageError
from lowbit.layers.experts import QuantizedExperts, expert_weights
from lowbit.layers.linear import LowbitLinear

# 1: no inputs are rounded, 0: all that a backend can round; it counts where nothing else says `exact`
EXACT_VARIABLE = "LOWBIT_EXACT"
_VALUES = {"": None, "0": False, "1": True}


def wanted_exactness(exact: bool | None) -> bool | None:
    """`exact`, or what LOWBIT_EXACT says where that is None. Raises UsageError for what it cannot be."""
    value = os.environ.get(EXACT_VARIABLE, "")
    if value not in _VALUES:
        raise UsageError(f"{EXACT_VARIABLE} is {value!r}: expected 1 (inputs as they are), 0 (rounded), or nothing")
    return _VALUES[value] if exact is None else exact


def choose_inputs(model: nn.Module, exact: bool | None) -> None:
    """See `LowbitLinear.choose_inputs`, for all layers of a model; where `exact` is None, LOWBIT_EXACT says it."""
    exact = wanted_exactness(exact)
    for module in model.modules():
        if isinstance(module, LowbitLinear | QuantizedExperts):
            module.choose_inputs(exact)


def inputs_of_model(model: nn.Module) -> str:
    """What its products do to their inputs: "exact", or in a few words how those are rounded that are."""
    found = {module.inputs for module in model.modules() if isinstance(module, LowbitLinear)}
    found |= {weights.inputs for module in model.modules() for weights in expert_weights(module).values()}
    return ", ".join(sorted(found - {EXACT})) or EXACT
