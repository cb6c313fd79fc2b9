"""Which schemes the engine takes that a model is meant for."""

from collections.abc import Callable, Iterable, Mapping

from lowbit.errors import UsageError
from lowbit.formats import gguf, mlx
from lowbit.numerics.scheme import Scheme
from lowbit.serving import RANKS, RULES, Module, modules_taken

# Schemes whose GGML blocks hold the same numbers in the same bytes; others become a wider type (`formats.gguf`)
_GGML_EXACT = tuple(Scheme(bits, gguf.BLOCK) for bits in (4, 5, 8))


def _refuse_gguf(module: Module) -> str | None:
    if module.scheme in _GGML_EXACT:
        return None
    return f"no type of GGML holds {module.scheme.name} in as many bytes"


# Engines that read an export of the files, not the files themselves -> why they do not take a module
_EXPORTS: dict[str, Callable[[Module], str | None]] = {
    "llama.cpp": _refuse_gguf,
    "mlx": lambda module: mlx.refuse(module.scheme),
}

ENGINES = tuple(dict.fromkeys([*(rule.engine.lower() for rule in RULES), *_EXPORTS]))


def check_engine(name: str | None, format_name: str) -> None:
    """Raise UsageError for an engine that is not known, or does not read a format."""
    if name is None or name in _EXPORTS:
        return
    if name not in ENGINES:
        raise UsageError(f"engine {name!r} is not known; allowed: {', '.join(ENGINES)}")
    if not any(rule.engine.lower() == name and rule.format == format_name for rule in RULES):
        raise UsageError(f"{name} reads no {format_name} files: `lowbit plan` shows which engines read which format")


def ranks_that_take(
    engine: str | None, format_name: str, modules: Mapping[str, Module], joined: Iterable[tuple[str, ...]]
) -> dict[str, frozenset[int]]:
    """The numbers of GPUs on which an engine takes each module.

    Args:
        engine: One of `ENGINES`; None: no engine in particular, so that only whole groups and words count.
        format_name: Of the files.
        modules: Module name -> what is quantized (`serving.modules_of`).
        joined: Names that engines merge (`serving.fused_units`).

    Returns:
        Module name -> sizes of tensor parallelism, none if the engine does not take it at all.
    """
    if engine in _EXPORTS:
        refuse = _EXPORTS[engine]
        return {name: frozenset() if refuse(module) else frozenset({1}) for name, module in modules.items()}
    taken = modules_taken(engine, format_name, modules, joined)
    return {name: frozenset(size for size in RANKS if name in taken.get(size, ())) for name in modules}
