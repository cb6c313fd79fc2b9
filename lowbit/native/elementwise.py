"""torch's small operations, as elementwise.c computes them: a list of instructions in one call."""

from collections.abc import Callable
from functools import partial

import torch

from lowbit.native.abi import Instruction, Operand
from lowbit.native.build import constant, library
from lowbit.native.linear import DTYPES
from lowbit.torch_api import COPY_TO, is_mutable

_LARGEST = 2**15  # elements; from there on torch divides an operation among its threads
_aten = torch.ops.aten
# Operators with their operands in front, and nothing else that counts -> operation of abi.h
_PLAIN = {
    _aten.mul: "MULTIPLY", _aten.div: "DIVIDE", _aten.neg: "NEGATE", _aten.rsqrt: "RSQRT", _aten.sigmoid: "SIGMOID",
    _aten.silu: "SILU", _aten.tanh: "TANH", COPY_TO: "COPY", _aten.clone: "COPY",
}  # fmt: skip
_SUMS = {_aten.add: "ADD", _aten.sub: "SUBTRACT"}
_POWERS = {2: "SQUARE", 3: "CUBE"}


def instructions(func, args: tuple, kwargs: dict, output) -> list[Instruction] | None:
    """What computes anew the `output` that operator `func` has given, None where the kernel does not know how."""
    made = [_instruction(*small) for small in _small_operations(func, args, kwargs, output)]
    return made if made and None not in made else None


def _instruction(
    operation: str, out: torch.Tensor, operands: tuple, index: torch.Tensor | None = None, step: int = 0
) -> Instruction | None:
    """out = operation(operands), which are numbers and tensors that broadcast to the shape of the result. index: one
    number that is read anew each time; `out` lies by that many `step` further on."""
    inputs = [value for value in operands if isinstance(value, torch.Tensor)]
    tensors = [out, *inputs]
    sizes = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    exact = operation == "COPY" or all(_fits(value, out.dtype) for value in operands)
    known = all(tensor.dtype in DTYPES and tensor.device.type == "cpu" for tensor in tensors)
    if not exact or not known or len(sizes) > constant("DIMENSIONS") or not 0 < sizes.numel() <= _LARGEST:
        return None
    a, b, *_ = (*(_operand(value, sizes) for value in operands), Operand())
    padded = (1,) * (constant("DIMENSIONS") - len(sizes)) + tuple(sizes)
    where = None if index is None else index.data_ptr()
    made = Instruction(constant(operation), padded, _operand(out, sizes), a, b, where, step)
    made.keeps = *tensors, index
    return made


def _fits(value: torch.Tensor | float, dtype: torch.dtype) -> bool:
    """Whether it makes no difference if an operand is rounded to `dtype` before, as some operators of torch do."""
    if dtype == torch.float32:
        return True
    return value.dtype == dtype if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype).item() == value


def _operand(value: torch.Tensor | float, sizes: torch.Size) -> Operand:
    if not isinstance(value, torch.Tensor):
        return Operand(value=value)
    strides = value.expand(sizes).stride()
    return Operand(
        value.data_ptr(), (0,) * (constant("DIMENSIONS") - len(sizes)) + strides, constant(DTYPES[value.dtype])
    )


def _small_operations(func, args: tuple, kwargs: dict, output) -> list[tuple]:
    """Arguments of `_instruction`."""
    packet = func.overloadpacket
    if packet is _aten.copy_:
        return [("COPY", args[0], args[1:2])]
    if packet is _aten.index_copy_ and args[2].numel() == 1 and args[2].dtype == torch.int64:
        into, dim, index, rows = args
        return [("COPY", into.narrow(dim, 0, 1), (rows,), index, into.stride(dim))]
    if is_mutable(func):
        return []
    if packet is _aten.cat and all(part.ndim == output.ndim for part in args[0]):
        parts, dim = args[0], args[1] if len(args) > 1 else 0
        pieces = output.split([part.shape[dim] for part in parts], dim)
        return [("COPY", piece, (part,)) for piece, part in zip(pieces, parts, strict=True) if part.numel()]
    if packet in _SUMS and kwargs.get("alpha", 1) == 1:
        return [(_SUMS[packet], output, args[:2])]
    if packet is _aten.pow and args[1] in _POWERS:
        return [(_POWERS[args[1]], output, args[:1])]
    if packet is _aten.gelu:
        return [("GELU_TANH" if kwargs.get("approximate") == "tanh" else "GELU", output, args[:1])]
    if packet is _aten.mean and len(args) > 2 and args[1] in ([-1], [args[0].ndim - 1]) and args[2]:
        return [("MEAN", output, args[:1])]
    if packet in _PLAIN and "rounding_mode" not in kwargs:
        return [(_PLAIN[packet], output, args[:2])]
    return []


def program(instructions: list[Instruction]) -> Callable:
    """The call that does them all, in order."""
    call = partial(library().lowbit_run, (Instruction * len(instructions))(*instructions), len(instructions))
    call.keeps = instructions
    return call
