"""MLX's affine quantization, as mlx-lm loads it. Write only.

Tensors of a module X with weight [N, K]: `weight` uint32 [N, K*bits/32], the dense bit stream of the codes; `scales`
and `biases` [N, G];  w = code * scale + bias, so a bias is -zero * scale. A symmetric zero is a power of two and its
bias exact in any dtype; any other zero adds up to eight bits to the mantissa, so those biases are float32. MLX computes
in the widest of the dtypes it is given: the sum is exact too where scales have 16 bits.
"""

from collections.abc import Mapping

import torch

from lowbit.errors import InputError
from lowbit.formats.bitpack import pack as pack_bits
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

SUFFIXES = ("weight", "scales", "biases")
GROUP_SIZES = (32, 64, 128)


def refuse(scheme: Scheme) -> str | None:
    if scheme.activations is not None:
        return f"MLX has no quantized activations, which {scheme.name} has"
    if scheme.group_size not in GROUP_SIZES:
        return f"MLX has groups of {', '.join(map(str, GROUP_SIZES))} inputs only, not {scheme.name}"
    return None


def pack(qweight: QuantWeight) -> dict[str, torch.Tensor]:
    """Meta tensors give meta tensors. Raises InputError for scales whose biases no dtype of MLX holds exactly."""
    qweight.require_natural_order("MLX")
    scheme, scales = qweight.scheme, qweight.scales
    zeros = scheme.middle if qweight.zeros is None else qweight.zeros.double()
    exact = scales.double() * -zeros
    biases = exact.to(scales.dtype if scheme.sym else torch.float32)
    if biases.device.type != "meta" and not torch.equal(biases.double(), exact):
        wrong = exact[biases.double() != exact][0]
        raise InputError(
            f"the bias -zero * scale = {wrong:.9g} is not exact in {str(biases.dtype).removeprefix('torch.')}; MLX "
            f"needs {'smaller scales' if scheme.sym else 'scales of 16 bits'}: quantize the model in bfloat16"
        )
    return {"weight": pack_bits(qweight.codes, scheme.bits).view(torch.uint32), "scales": scales, "biases": biases}


def _parameters(scheme: Scheme) -> dict:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}


def config(default: Scheme, exceptions: Mapping[str, Scheme]) -> dict:
    """The `quantization` entry of mlx-lm's config.json. exceptions: module name in MLX -> Scheme unlike `default`.
    Modules without scales in the checkpoint are dense there, and need no mention."""
    return _parameters(default) | {name: _parameters(scheme) for name, scheme in exceptions.items()}
