"""Every module in a table has what the contract of the table says, under the names that callers use."""

import inspect

import pytest

from lowbit.backends import BACKENDS, Backend, ExpertsBackend, get_backend
from lowbit.formats import FORMATS, Format, get_format
from lowbit.quantizers import QUANTIZERS, Quantizer, get_quantizer

MODULES = [
    *((name, get_quantizer(name), Quantizer) for name in QUANTIZERS),
    *((name, get_format(name), Format) for name in FORMATS),
    *((name, get_backend(name), Backend) for name in BACKENDS),
    *((name, get_backend(name), ExpertsBackend) for name in BACKENDS if hasattr(get_backend(name), "experts")),
]


@pytest.mark.parametrize(("name", "module", "contract"), MODULES, ids=lambda value: getattr(value, "__name__", value))
def test_a_module_meets_its_contract(name, module, contract):
    for attribute in {key for each in contract.__mro__ for key in getattr(each, "__annotations__", {})}:
        assert hasattr(module, attribute), attribute
    functions = {key: value for key, value in inspect.getmembers(contract, inspect.isfunction) if key[0] != "_"}
    assert functions
    for attribute, wanted in functions.items():
        found = list(inspect.signature(getattr(module, attribute)).parameters)
        expected = list(inspect.signature(wanted).parameters)[1:]  # without self
        assert found[: len(expected)] == expected, attribute
