"""What a config may ask for, compared with what the weight files hold, before any of it is built.

Two checks, neither of which knows an architecture. `check_counts` looks at the numbers in config.json before
transformers does, which makes lists as long as some of them. `no_larger_than` watches a model being built: its
parameters may be no more, and no larger, than the files have tensors for. Both leave room for what is not one to one:
tied and split weights, codes of two bits, what is computed rather than stored.
"""

import math
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lowbit.errors import InputError
from lowbit.guards.records import shown

# Keys of numbers of layers, of which each has a tensor at least; and of sizes that are a dimension of some tensor
_LAYERS = re.compile(r"(^|_)(n?layers?|depths?|n?blocks)$", re.IGNORECASE)
_SIZES = re.compile(
    r"vocab|hidden|intermediate|embd|(^|_)(embed|inner|ffn|ff|dim|heads?|experts?|labels|rank|channels|features)(_|$)"
    r"|d_model|d_ff|d_kv",
    re.IGNORECASE,
)
_NO_SIZES = re.compile(r"position|token|context|length|(^|_)ids?$", re.IGNORECASE)
# Numbers up to here are built whatever the files hold: they cost seconds at worst
_FEW_LAYERS, _SMALL_SIZE = 1_000, 2**17
# Codes in a word of 32 bits, so a dimension of 32 bits stands for 16 of them at most
_MOST_CODES = 16

# A stored tensor is split into at most so many parameters, unless it is a stack of matrices
_MOST_PARTS = 16
_SPARE_PARAMETERS, _SPARE_VALUES = 5_000, 2**23
# Buffers are computed, and in no file: masks and tables of positions
_MOST_BUFFER_VALUES = 2**31


def check_counts(config: dict, tensors: Iterable) -> None:
    """Compare the numbers of layers and the sizes in config.json, and in the configs in it, with the stored tensors.

    Args:
        config: The object in config.json.
        tensors: `TensorInfo` of all that the weight files hold; gone through only where a number is large.

    Raises:
        InputError: For a number that the files do not bear out, by its key.
    """
    large = list(_large(config))
    if not large:
        return
    shapes = [info.shape for info in tensors]
    widest = max((max(shape, default=1) for shape in shapes), default=0)
    for key, number, is_layers in large:
        limit = len(shapes) if is_layers else widest * _MOST_CODES
        if number > limit:
            held = f"{len(shapes):,} tensors, their longest dimension is {widest:,}"
            raise InputError(f"config.json says {key} is {shown(number)}, but the weight files hold {held}")


def _large(config, key: str = "") -> Iterator[tuple[str, int, bool]]:
    """(key, number, whether it counts layers) of each number that is worth a look."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _large(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from _large(value, key)
    elif type(config) in (int, float):
        if _LAYERS.search(key) and config > _FEW_LAYERS:
            yield key, config, True
        elif _SIZES.search(key) and not _NO_SIZES.search(key) and config > _SMALL_SIZE:
            yield key, config, False


@contextmanager
def no_larger_than(tensors: Iterable) -> Iterator[None]:
    """While this lasts, a model that this thread builds has at most what `tensors` (`TensorInfo`) can hold.

    Raises InputError from within the constructor of the module that goes beyond it.
    """
    tensors = list(tensors)
    most = _SPARE_PARAMETERS + sum(max(_MOST_PARTS, info.shape[0] if len(info.shape) > 2 else 0) for info in tensors)
    # a tied weight is made anew by each module that has it; a byte of codes is four of them
    most_values = _SPARE_VALUES + 8 * sum(
        info.numel if info.dtype.is_floating_point else info.nbytes * _MOST_CODES // 4 for info in tensors
    )
    made, values, buffers = 0, 0, 0
    thread = threading.get_ident()

    def count(module, name, parameter):
        nonlocal made, values
        if parameter is None or threading.get_ident() != thread:
            return
        made, values = made + 1, values + math.prod(parameter.shape)
        if made > most or values > most_values:
            raise InputError(
                f"config.json describes a model of more than {made - 1:,} parameters with {values:,} values, the "
                f"weight files hold {len(tensors):,} tensors with {sum(info.nbytes for info in tensors):,} bytes: it "
                "is the config of another model"
            )

    def count_buffer(module, name, buffer):
        nonlocal buffers
        if buffer is None or threading.get_ident() != thread:
            return
        buffers += math.prod(buffer.shape)
        if buffers > _MOST_BUFFER_VALUES:
            raise InputError(f"config.json describes a model whose buffer {name} has {buffer.numel():,} values")

    hooks = (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count_buffer),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
