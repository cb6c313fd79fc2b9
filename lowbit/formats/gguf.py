"""GGML blocks of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, the types of a GGUF file that can hold our numbers.

Each block is an fp16 scale d and 32 integers q of consecutive inputs:
Q4_0, 18 bytes:  w = (q - 8) * d;   Q4_1, 20 bytes:  w = q * d + m with an fp16 minimum m;   Q5_0, 22 bytes, and Q5_1,
24: the same with q of 5 bits, less 16;   Q8_0, 34 bytes:  w = q * d with int8 q. Byte i of a block of nibbles holds the
integers i (low) and i + 16 (high); their fifth bits are 32 bits before the nibbles, bit i that of integer i.

A group of 64 inputs is two blocks of one scale, and so on; a narrower code is an integer of a wider type. Both cost
bytes and change no number. Which type holds an asymmetric weight is for its numbers to say.
"""

import torch

from lowbit.errors import InputError, UsageError
from lowbit.formats.bitpack import pack as pack_bits
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

BLOCK = 32
# Types of symmetric blocks -> the scheme of the weight that they are
SCHEMES = {"Q4_0": Scheme(4, BLOCK), "Q8_0": Scheme(8, BLOCK)}

# Metadata that llama.cpp's own converter derives from a config whatever its architecture, as transformers calls it
GENERAL_KEYS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def import_gguf():
    """The gguf package. Raises UsageError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF files need the gguf package: pip install 'lowbit[gguf]'") from None
    return gguf


def refuse(scheme: Scheme, in_features: int) -> str | None:
    if scheme.activations is not None:
        return f"GGUF has no quantized activations, which {scheme.name} has"
    group = scheme.group_of(in_features)
    if group % BLOCK:
        return f"GGML has one scale for {BLOCK} inputs, and groups of {group} inputs are no multiple of that"
    return None


def symmetric_type(scheme: Scheme) -> str:
    return "Q4_0" if scheme.bits <= 4 else "Q5_0" if scheme.bits == 5 else "Q8_0"


def asymmetric_type(qweight: QuantWeight) -> str:
    """The smallest type that holds the weight exactly. Raises InputError if there is none."""
    if qweight.scheme.bits <= 5:
        # Q8_0 holds every difference of two codes, Q4_1 and Q5_1 only some minima
        narrow = "Q4_1" if qweight.scheme.bits <= 4 else "Q5_1"
        return narrow if _is_half(_minima(qweight)) else "Q8_0"
    values = _values(qweight)
    if values.amin() < -128 or values.amax() > 127:
        raise InputError(
            f"code - zero lies in [{int(values.amin())}, {int(values.amax())}]; Q8_0 holds [-128, 127]: "
            "quantize to 8 bits symmetrically"
        )
    return "Q8_0"


def pack(qweight: QuantWeight, block: str) -> torch.Tensor:
    """uint8 [N, K / 32 * bytes of a block]. Raises InputError for a scale that fp16 does not hold."""
    qweight.require_natural_order("GGML")
    repeats = qweight.in_features // BLOCK // qweight.scales.shape[1]
    parts = [_bytes(_half(qweight.scales, "scale"), repeats)]
    if block == "Q8_0":
        parts.append(_blocks(_values(qweight).to(torch.int8).view(torch.uint8)))
    else:
        affine, middle = block.endswith("_1"), 2 ** (int(block[1]) - 1)
        if affine:
            parts.append(_bytes(_half(_minima(qweight), "minimum"), repeats))
        codes = _blocks(qweight.codes if affine else (_values(qweight) + middle).to(torch.uint8))
        if middle == 16:
            parts.append(pack_bits((codes >> 4).flatten(0, 1), 1).view(torch.uint8).view(*codes.shape[:2], 4))
        low, high = (codes & 15).chunk(2, dim=-1)
        parts.append(low | high << 4)
    return torch.cat(parts, dim=-1).flatten(1)


def unpack(blocks: torch.Tensor, block: str) -> QuantWeight:
    """The weight that symmetric blocks are, exactly; a block whose scale is 0 becomes one of zeros with scale 1.

    Args:
        blocks: uint8 [N, K / 32 * bytes of a block].
        block: One of `SCHEMES`.
    """
    scheme = SCHEMES[block]
    parts = blocks.view(len(blocks), -1, 2 + BLOCK * scheme.bits // 8)
    scales = parts[..., :2].contiguous().view(torch.float16).squeeze(-1)
    stored = parts[..., 2:]
    codes = torch.empty(*scales.shape, BLOCK, dtype=torch.uint8)
    if scheme.bits == 4:
        low, high = codes.chunk(2, dim=-1)
        torch.bitwise_and(stored, 0xF, out=low)
        torch.bitwise_right_shift(stored, 4, out=high)
    else:
        torch.bitwise_xor(stored, scheme.middle, out=codes)
    empty = scales == 0
    if empty.any():
        codes[empty], scales[empty] = scheme.middle, 1
    return QuantWeight(codes.view(len(blocks), -1), scales, scheme)


def _values(qweight: QuantWeight) -> torch.Tensor:
    """code - zero, int16 [N, K]."""
    codes = qweight.codes.to(torch.int16)
    if qweight.zeros is None:
        return codes.sub_(qweight.scheme.middle)
    groups = codes.view(*qweight.zeros.shape, -1)
    return groups.sub_(qweight.zeros.unsqueeze(-1)).view(codes.shape)


def _minima(qweight: QuantWeight) -> torch.Tensor:
    """float64 [N, G], exact."""
    assert qweight.zeros is not None, "symmetric weights have no minima"
    return qweight.scales.double() * -qweight.zeros.double()


def _is_half(numbers: torch.Tensor) -> bool:
    return torch.equal(numbers.half().double(), numbers.double())


def _half(numbers: torch.Tensor, what: str) -> torch.Tensor:
    half = numbers.half()
    wrong = numbers[half.double() != numbers.double()]
    if len(wrong):
        raise InputError(f"the {what} {float(wrong[0]):.9g} is not exact in float16, which GGML stores")
    return half


def _blocks(integers: torch.Tensor) -> torch.Tensor:
    return integers.view(len(integers), -1, BLOCK)


def _bytes(half: torch.Tensor, repeats: int) -> torch.Tensor:
    """fp16 [N, G] -> uint8 [N, G * repeats, 2]"""
    return half.repeat_interleave(repeats, dim=1).unsqueeze(-1).view(torch.uint8)
