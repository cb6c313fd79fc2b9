"""Packed weights, and products of few rows with them: packed.h and linear.c say what lies where and what is computed.

3-bit codes are widened to 4-bit fields: unpacking 3-bit fields costs more time than the bandwidth that they save. 5 and
6 bits are widened to 8, and run as fast as these: what they save lies in the file.
"""

from collections.abc import Callable
from functools import partial

import torch

from lowbit.native.abi import Weight
from lowbit.native.build import constant, library
from lowbit.numerics import dense
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.scheme import Scheme

# Bits of a code -> of the field it is packed in
_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
# 16-bit integers that stand for an input
PIECES = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}
# What the kernels read and write, and their name for it; float16 becomes float32
DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16"}


def _width(in_features: int) -> int:
    """in_features in whole chunks."""
    return -(-in_features // constant("CHUNK")) * constant("CHUNK")


def pack(qweight: QuantWeight) -> dict[str, torch.Tensor]:
    """The buffers of a weight in the layout of packed.h."""
    qweight.require_natural_order("native")
    bits, (out_features, in_features) = _BITS[qweight.scheme.bits], qweight.codes.shape
    rows = constant("ROWS")
    slices = _width(in_features) // (8 // bits * constant("PART"))
    codes = torch.empty(-(-out_features // rows), slices, rows, dtype=torch.int32)
    scales = _by_block(qweight.scales if qweight.scales.dtype in DTYPES else qweight.scales.float())
    # scales_like, without elements: for `unpack` to know the dtype
    buffers = {"codes": codes, "scales": scales, "scales_like": qweight.scales.new_empty(0)}
    zeros = _zeros(qweight)
    if zeros is not None:
        buffers["zeros"] = _by_block(zeros)
    buffers |= {name: getattr(qweight, name) for name in input_grid(qweight.scheme)}
    source = qweight.codes.contiguous()
    weight = _weight_of(buffers, qweight.scheme, qweight.codes.shape)
    library().lowbit_pack(weight, source.data_ptr(), codes.data_ptr())
    if not library().lowbit_linear_knows(weight):
        raise AssertionError(f"there is no kernel for {bits} bits in groups of {weight.group_size}")
    return buffers


def _zeros(qweight: QuantWeight) -> torch.Tensor | None:
    scheme = qweight.scheme
    if scheme.sym and _BITS[scheme.bits] != scheme.bits:  # whose middle is not that of the field
        return torch.full_like(qweight.scales, scheme.middle, dtype=torch.uint8)
    return qweight.zeros


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """[N, groups] -> [N / ROWS, groups, ROWS]"""
    rows = constant("ROWS")
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % rows))
    return padded.view(-1, rows, values.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: torch.Tensor, out_features: int) -> torch.Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:out_features]


def weight_of_tensors(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: Scheme, shape: tuple[int, int]
) -> Weight:
    """What the kernels know of a weight; the tensors must outlive it."""
    pointers = codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr()
    bits, integer_inputs = _BITS[scheme.bits], scheme.activations is not None
    group_size = scheme.group_size if scheme.groups(shape[1]) > 1 else _width(shape[1])
    return Weight(*pointers, constant(DTYPES[scales.dtype]), bits, *shape, group_size, integer_inputs)


def _weight_of(buffers, scheme: Scheme, shape: tuple[int, int]) -> Weight:
    return weight_of_tensors(buffers["codes"], buffers["scales"], buffers.get("zeros"), scheme, shape)


def unpack(buffers, scheme: Scheme, shape: tuple[int, int]) -> QuantWeight:
    """The weight of shape (out_features, in_features) that `pack` made buffers of."""
    out_features, in_features = shape
    codes = torch.empty(out_features, in_features, dtype=torch.uint8)
    library().lowbit_unpack(_weight_of(buffers, scheme, shape), 0, out_features, codes.data_ptr(), None)
    scales = _by_row(buffers["scales"], out_features).to(buffers["scales_like"].dtype)
    zeros = None if scheme.sym else _by_row(buffers["zeros"], out_features).contiguous()
    grid = {name: buffers[name] for name in input_grid(scheme)}
    return QuantWeight(codes, scales.contiguous(), scheme, zeros, **grid)


def dense_blocks(weight: Weight, dtype: torch.dtype):
    step = max(constant("ROWS"), dense.BLOCK_ELEMENTS // weight.in_features)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        block = torch.empty(stop - start, weight.in_features)
        library().lowbit_unpack(weight, start, stop, None, block.data_ptr())
        yield start, stop, block.to(dtype)


def product(weight: Weight, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, pieces: int) -> Callable:
    """The call that computes y = x W^T + bias, all three contiguous and of one dtype of DTYPES; what `weight` points to
    must outlive it."""
    scratch = torch.empty(library().lowbit_linear_scratch(weight, len(x)), dtype=torch.uint8)
    pointers = x.data_ptr(), constant(DTYPES[x.dtype]), None if bias is None else bias.data_ptr(), y.data_ptr()
    call = partial(library().lowbit_linear, weight, *pointers, len(x), pieces, scratch.data_ptr())
    call.keeps = x, y, bias, scratch
    return call
