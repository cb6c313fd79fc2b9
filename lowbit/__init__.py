"""lowbit: quantize, run, check and publish LLMs with low-bit weights.

Public names: `plan`, `quantize`, `convert`, `convert_dtype`, `dequantize`, `merge`, `verify`, `load`, `resolve`,
`LowbitConfig`, `Scheme`, `Recipe`, `LowbitError`. Each is imported on first use, so that `import lowbit` stays cheap.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Scheme": "lowbit.numerics.scheme:Scheme",
    "Recipe": "lowbit.numerics.scheme:Recipe",
    "LowbitError": "lowbit.errors:LowbitError",
    "LowbitConfig": "lowbit.hf:LowbitConfig",
    "load": "lowbit.hf:load",
    "plan": "lowbit.quantization.preview:plan",
    "quantize": "lowbit.quantization.run:quantize",
    "convert": "lowbit.conversion.formats:convert",
    "convert_dtype": "lowbit.conversion.dtype:convert_dtype",
    "dequantize": "lowbit.conversion.formats:dequantize",
    "merge": "lowbit.merging.run:merge",
    "verify": "lowbit.eval:verify",
    "resolve": "lowbit.folders.locate:resolve",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    module, attribute = _PUBLIC[name].split(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_PUBLIC])
