"""What the kernels are measured against: each peer as a function of x, made from the same weight."""

from collections.abc import Callable

import torch

from lowbit_kernels import reference
from lowbit_kernels.layout import Layout

# A peer takes (codes, scales, zeros, layout) and gives a function of x
Made = Callable[[torch.Tensor], torch.Tensor]


def cublas(codes, scales, zeros, layout: Layout) -> Made:
    """Dense weights in 16 bits, the product of the vendor's library."""
    dense = reference.dequantize(codes, scales, zeros, layout.bits).to(layout.dtype)
    return lambda x: torch.nn.functional.linear(x, dense)


def tinygemm(codes, scales, zeros, layout: Layout) -> Made:
    """torch's own 4-bit kernel, the one that torchao uses."""
    if layout.bits != 4 or layout.dtype != torch.bfloat16 or layout.group_size not in (32, 64, 128, 256):
        raise NotImplementedError("runs 4 bits in bfloat16 with groups of 32 to 256")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    # it computes (code - 8) * scale + offset
    middle = torch.full_like(scales, 8.0) if zeros is None else zeros.to(scales.dtype)
    both = torch.stack([scales, (8 - middle) * scales], 2).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, layout.group_size, both)


def gemlite(codes, scales, zeros, layout: Layout) -> Made:
    from gemlite.core import DType, GemLiteLinearTriton

    kind = DType.BF16 if layout.dtype == torch.bfloat16 else DType.FP16
    linear = GemLiteLinearTriton(
        layout.bits, layout.group_size, layout.in_features, layout.out_features, input_dtype=kind, output_dtype=kind
    )
    middle = torch.full_like(scales, layout.middle) if zeros is None else zeros.to(scales.dtype)
    linear.pack(codes, scales.view(-1, 1), middle.view(-1, 1), None)
    return linear.forward


def bitsandbytes(codes, scales, zeros, layout: Layout) -> Made:
    """NF4 of the same weight: another format of the same size."""
    from bitsandbytes import functional, matmul_4bit

    if layout.bits != 4:
        raise NotImplementedError("its kernels run 4 bits")
    dense = reference.dequantize(codes, scales, zeros, layout.bits).to(layout.dtype)
    packed, state = functional.quantize_4bit(dense, blocksize=128, quant_type="nf4")
    return lambda x: matmul_4bit(x, packed.t(), state)


# name -> (maker, largest relative error that says it computed this weight; None: it rounds the weight itself)
PEERS = {
    "cublas": (cublas, 2e-2),
    "tinygemm": (tinygemm, 2e-2),
    "gemlite": (gemlite, 2e-2),
    "bitsandbytes nf4": (bitsandbytes, None),
}
