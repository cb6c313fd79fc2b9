"""Everything that lowbit uses of torch beyond its documentation, but for the operators that `backends.torch_cpu` tries
out before it uses them. Nothing else in lowbit spells these names (tests/test_layers.py)."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["COPY_TO", "TorchDispatchMode", "tree_leaves"]

# The operator behind `tensor.to`
COPY_TO = torch.ops.aten._to_copy


def parameter_dict(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict in which a module keeps its own parameters: it follows `.to()` and deepcopy, and reading it calls no
    `__getattr__`."""
    return module._parameters


def buffer_dict(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The dict in which a module keeps its own buffers."""
    return module._buffers


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place. Raises RuntimeError for a tensor of inference mode, which does not
    count."""
    return tensor._version


def place_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(its storage, the element of it that the tensor begins at): where a tensor lies, for as long as it lives, on the
    meta device too, which has no addresses."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def operator_name(operator: torch._ops.OpOverload) -> str:
    """ "aten::add" for torch.ops.aten.add.Tensor."""
    return operator._schema.name


def is_mutable(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator writes to one of its arguments."""
    return operator._schema.is_mutable


def written_arguments(operator: torch._ops.OpOverload) -> Iterator[tuple[int, str]]:
    """(position, name) of each argument that an operator writes to."""
    for position, argument in enumerate(operator._schema.arguments):
        if argument.is_write:
            yield position, argument.name


def direct_call(operator: torch._ops.OpOverload) -> Callable:
    """The function of an operator without torch's Python around it: the same, a microsecond faster."""
    return operator._op


def out_variant(operator: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, list[str]] | None:
    """(the overload that writes what `operator` returns into arguments, their names), None if there is none."""
    inputs = [(argument.name, str(argument.type)) for argument in operator._schema.arguments]
    for name in operator.overloadpacket.overloads():
        overload = getattr(operator.overloadpacket, name)
        arguments = overload._schema.arguments
        taken = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        names = [argument.name for argument in arguments if argument.is_out]
        if taken == inputs and len(names) == len(operator._schema.returns):
            return overload, names
    return None


def is_composite(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator is made of others, for any kind of tensor."""
    return operator.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def cpu_has_bf16_products() -> bool:
    """Whether this CPU has instructions for dot products of bfloat16 numbers."""
    return torch.cpu._is_avx512_bf16_supported()


def cpu_has_fp16_products() -> bool:
    """Whether this CPU has instructions for dot products of float16 numbers."""
    return torch.cpu._is_amx_fp16_supported()
