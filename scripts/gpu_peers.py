"""What the kernels are measured against: each peer as a function of x, made from the same weight."""

from collections.abc import Callable
from pathlib import Path

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
        raise ValueError("runs 4 bits in bfloat16 with groups of 32 to 256")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    # it computes (code - 8) * scale + offset
    middle = torch.full_like(scales, 8.0) if zeros is None else zeros.to(scales.dtype)
    both = torch.stack([scales, (8 - middle) * scales], 2).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, layout.group_size, both)


def gemlite(codes, scales, zeros, layout: Layout) -> Made:
    """What its tables do not hold would be tuned when it first runs, for minutes per number of rows. There is none for
    the H200, which has the processors of the H100."""
    import gemlite
    from gemlite.core import GEMLITE_TRITON_CONFIG_CACHE as tables
    from gemlite.helper import A16Wn

    if torch.cuda.get_device_capability(codes.device) == (9, 0):
        gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
    kind = 100 * gemlite.DType.FP16.value + layout.bits  # one entry for both dtypes
    entry = (64, layout.out_features, layout.in_features, layout.group_size, 32 // layout.bits, kind)
    if str(entry) not in tables.get("GEMM_SPLITK", {}):
        raise ValueError("its tables do not hold this shape")
    middle = torch.full_like(scales, layout.middle) if zeros is None else zeros.to(scales.dtype)
    maker = A16Wn(device=codes.device, dtype=layout.dtype)
    return maker.from_weights(codes, scales, middle, layout.bits, layout.group_size).forward


def bitsandbytes_nf4(codes, scales, zeros, layout: Layout) -> Made:
    """NF4 of the same weight: another format of the same size."""
    from bitsandbytes import functional, matmul_4bit

    if layout.bits != 4:
        raise ValueError("runs 4 bits")
    dense = reference.dequantize(codes, scales, zeros, layout.bits).to(layout.dtype)
    packed, state = functional.quantize_4bit(dense, blocksize=128, quant_type="nf4")
    return lambda x: matmul_4bit(x, packed, state)


def bitsandbytes_int8(codes, scales, zeros, layout: Layout) -> Made:
    """LLM.int8() without outliers: a scale per row of the weight, and x in 8 bits too."""
    from bitsandbytes import functional

    if layout.bits != 8:
        raise ValueError("runs 8 bits")
    dense = reference.dequantize(codes, scales, zeros, layout.bits).to(torch.float16)
    rows, absmax, _ = functional.int8_vectorwise_quant(dense)

    def product(x):
        x8, x_absmax, _ = functional.int8_vectorwise_quant(x.to(torch.float16))
        return torch.ops.bitsandbytes.int8_scaled_mm(x8, rows, x_absmax, absmax, dtype=x.dtype)

    return product


# name -> (maker, largest relative error that says it computed this weight; None: it rounds the weight itself)
PEERS = {
    "cublas": (cublas, 2e-2),
    "tinygemm": (tinygemm, 2e-2),
    "gemlite": (gemlite, 2e-2),
    "bitsandbytes nf4": (bitsandbytes_nf4, None),
    "bitsandbytes int8": (bitsandbytes_int8, None),
}
