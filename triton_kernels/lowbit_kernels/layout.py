# SPDX-License-Identifier: Apache-2.0
"""frag32: the packed weight every kernel of this package reads, in plain torch. The README beside it has the picture.

A tensor core takes its left operand as 16x16 fragments: lane 4g + c of a warp holds rows g and g + 8, columns 2c,
2c + 1, 2c + 8 and 2c + 9. Weights are stored in exactly that order, so that what a lane loads is what it feeds to the
tensor core, and one 16-bit halfword holds the same element of several K slices of 32:

    weight  int16 [N/16, K/tile, planes * 2, 32, 8]       (row tile, K tile, plane and half slice, lane, halfword)
    halfword 4*kh + 2*rh + e of lane 4*g + c, half slice kb, holds for each slice p of the tile the code
        codes[16*nt + 8*rh + g, tile*kt + 32*p + 16*kb + 8*kh + 2*c + e]      at the bits that `fields(bits, p)` names

    meta    int32 [words, N], the 16-bit scale of a group in each half of a word when symmetric (even group low);
            otherwise one word per group, (scale low, -(zero + zero_offset) high): the summand that ends the decoding
"""

from dataclasses import dataclass
from functools import cached_property

import torch

SLICE = 32  # inputs of one slice: two tensor core fragments of 16
ROWS = 64  # out_features are padded to this
SLICES = {2: 8, 3: 16, 4: 4, 8: 2}  # slices of a K tile, by bits
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
PER_CHANNEL = -1


def fields(bits, p):
    """Where slice `p` of a tile lies: ((plane, shift, low, width), ...), the bits [low, low + width) of the code are
    the bits [shift, shift + width) of the halfword of that plane.

    Three bits do not divide sixteen: three planes hold five slices each and, in their top bits, the sixteenth.
    """
    if bits == 3:
        if p == 15:
            return ((0, 15, 0, 1), (1, 15, 1, 1), (2, 15, 2, 1))
        return ((p // 5, 3 * (p % 5), 0, 3),)
    return ((0, bits * p, 0, bits),)


def zero_offset(bits, float16):
    """What decoding adds to a code, before the zero point is taken off.

    A code is written into the low bits of a mantissa, under the exponent of 1024 (fp16, 10 bits) or 128 (bf16, 7 bits).
    Eight bits do not fit in seven: they are stored as code - 128, and in bf16 decoded to that.
    """
    if float16:
        return 1024
    return -128 if bits == 8 else 128


def check_stored(layout: object, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor of a packed weight is contiguous, of the dtype and shape that `layout` says."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)} for {layout}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")


@dataclass(frozen=True)
class Layout:
    """Shapes of one packed weight [out_features, in_features].

    group_size: inputs that share a scale, PER_CHANNEL for one scale per row. dtype: of scales and activations.
    What follows from the fields is cached: every launch asks for it.
    """

    bits: int
    group_size: int
    sym: bool
    dtype: torch.dtype
    out_features: int
    in_features: int

    def __post_init__(self):
        if self.bits not in SLICES:
            raise ValueError(f"bits is {self.bits!r}, expected one of {', '.join(map(str, SLICES))}")
        if self.group_size not in (*GROUP_SIZES, PER_CHANNEL):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size is {self.group_size!r}, expected one of {sizes} or -1 (per channel)")
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {self.dtype}, expected torch.bfloat16 or torch.float16")
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"weight is [{self.out_features}, {self.in_features}], expected at least [1, 1]")
        if self.group_size != PER_CHANNEL and self.in_features % self.group_size:
            raise ValueError(f"in_features {self.in_features} is not a multiple of group_size {self.group_size}")

    @classmethod
    def of(cls, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> "Layout":
        """The layout of codes uint8 [N, K], scales [N, G] and zeros uint8 [N, G] or None; G == 1 is per channel."""
        if codes.dtype != torch.uint8 or codes.ndim != 2:
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, expected torch.uint8 [N, K]")
        out_features, in_features = codes.shape
        if scales.ndim != 2 or scales.shape[0] != out_features or not scales.shape[1] or in_features % scales.shape[1]:
            raise ValueError(
                f"scales have shape {list(scales.shape)}, expected [{out_features}, G], G a divisor of {in_features}"
            )
        if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != scales.shape):
            raise ValueError(
                f"zeros are {zeros.dtype} {list(zeros.shape)}, expected torch.uint8 {list(scales.shape)} like scales"
            )
        groups = scales.shape[1]
        group_size = in_features // groups if groups > 1 else PER_CHANNEL
        return cls(bits, group_size, zeros is None, scales.dtype, out_features, in_features)

    @cached_property
    def tile(self) -> int:
        """Inputs of a K tile; in_features are padded to it."""
        return SLICE * SLICES[self.bits]

    @cached_property
    def planes(self) -> int:
        return 3 if self.bits == 3 else 1

    @cached_property
    def tiles(self) -> int:
        return -(-self.in_features // self.tile)

    @cached_property
    def padded_in(self) -> int:
        return self.tiles * self.tile

    @cached_property
    def padded_out(self) -> int:
        return -(-self.out_features // ROWS) * ROWS

    @cached_property
    def groups(self) -> int:
        return 1 if self.group_size == PER_CHANNEL else self.in_features // self.group_size

    @cached_property
    def words(self) -> int:
        """Meta words per row, those of the padding included."""
        groups = 1 if self.group_size == PER_CHANNEL else -(-self.padded_in // self.group_size)
        return -(-groups // 2) if self.sym else groups

    @cached_property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.padded_out // 16, self.tiles, 2 * self.planes, 32, 8)

    @cached_property
    def meta_shape(self) -> tuple[int, int]:
        return (self.words, self.padded_out)

    @cached_property
    def middle(self) -> int:
        """The zero point of a symmetric weight."""
        return 2 ** (self.bits - 1)

    @cached_property
    def zero_offset(self) -> int:
        return zero_offset(self.bits, self.dtype == torch.float16)

    def check(self, weight: torch.Tensor, meta: torch.Tensor) -> None:
        """Raise ValueError unless `weight` and `meta` are contiguous tensors of this layout on one device."""
        check_stored(self, "weight", weight, torch.int16, self.weight_shape)
        check_stored(self, "meta", meta, torch.int32, self.meta_shape)
        if weight.device != meta.device:
            raise ValueError(f"weight is on {weight.device} and meta on {meta.device}, expected one device")


def pack(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """codes uint8 [N, K] in [0, 2^bits), scales bf16 or fp16 [N, G], zeros uint8 [N, G] or None (2^(bits-1)).

    Returns weight and meta as `Layout.of(codes, scales, zeros, bits)` says, on the device of `codes`. Padded weights
    decode to exactly 0.
    """
    layout = Layout.of(codes, scales, zeros, bits)
    for name, tensor in (("codes", codes), ("zeros", zeros)):
        if tensor is not None and tensor.numel() and (largest := int(tensor.max())) >= 2**bits:
            raise ValueError(f"{name} reach {largest}, expected below {2**bits} for {bits} bits")
    return _pack_weight(_padded(codes, zeros, layout), layout), _pack_meta(scales, zeros, layout)


def unpack(
    weight: torch.Tensor, meta: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The exact inverse of `pack`: codes uint8 [N, K], scales layout.dtype [N, G], zeros uint8 [N, G] or None."""
    layout.check(weight, meta)
    codes = torch.zeros(layout.padded_out, layout.padded_in, dtype=torch.uint8, device=weight.device)
    ordered = _fragment_order(codes, layout)  # a view: writing to it fills `codes`
    planes = weight.reshape(*weight.shape[:2], layout.planes, 2, 8, 4, 2, 2, 2)
    for p in range(SLICES[layout.bits]):
        for plane, shift, low, width in fields(layout.bits, p):
            ordered[p] |= (((planes[:, :, plane] >> shift) & (2**width - 1)) << low).to(torch.uint8)
    if layout.bits == 8:
        codes ^= 128

    halves = torch.stack([meta, meta >> 16], 1).to(torch.int16)  # [words, 2, N]; wraps to the low 16 bits
    halves = halves[:, :, : layout.out_features].view(layout.dtype)
    scales = halves.flatten(0, 1) if layout.sym else halves[:, 0]
    zeros = None
    if not layout.sym:
        zeros = (-halves[: layout.groups, 1].float() - layout.zero_offset).to(torch.uint8).T.contiguous()
    return (
        codes[: layout.out_features, : layout.in_features].contiguous(),
        scales[: layout.groups].T.contiguous(),
        zeros,
    )


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of [I, ...] gate and up, eight of each in turn, as [2I, ...]; I is a multiple of 8.

    For codes, scales, zeros and bias of a fused gate_up weight: gate row g and up row g then lie in rows g and g + 8 of
    one fragment, in the same thread, which can multiply SiLU(gate) by up without asking another.
    """
    if gate.shape != up.shape or gate.shape[0] % 8:
        raise ValueError(
            f"gate is {list(gate.shape)} and up {list(up.shape)}, expected equal shapes with a multiple of 8 rows"
        )
    return torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], 1).flatten(0, 2)


def _padded(codes: torch.Tensor, zeros: torch.Tensor | None, layout: Layout) -> torch.Tensor:
    """codes [padded_out, padded_in]; padded inputs hold their row's last zero point, so that they decode to 0."""
    rows, columns = layout.padded_out - layout.out_features, layout.padded_in - layout.in_features
    if columns:
        fill = codes.new_full((layout.out_features, 1), layout.middle) if zeros is None else zeros[:, -1:]
        codes = torch.cat([codes, fill.expand(-1, columns)], 1)
    return torch.nn.functional.pad(codes, (0, 0, 0, rows), value=layout.middle if zeros is None else 0)


def _fragment_order(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """codes [padded_out, padded_in] -> a view [slices, N/16, K/tile, kb 2, g 8, c 4, kh 2, rh 2, e 2]."""
    codes = codes.reshape(layout.padded_out // 16, 2, 8, layout.tiles, SLICES[layout.bits], 2, 2, 4, 2)
    return codes.permute(4, 0, 3, 5, 2, 7, 6, 1, 8)  # from nt, rh, g, kt, p, kb, kh, c, e


def _pack_weight(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    ordered = _fragment_order(codes ^ 128 if layout.bits == 8 else codes, layout)
    weight = torch.zeros(layout.weight_shape, dtype=torch.int16, device=codes.device)
    planes = weight.view(*weight.shape[:2], layout.planes, 2, 8, 4, 2, 2, 2)
    for p in range(SLICES[layout.bits]):
        for plane, shift, low, width in fields(layout.bits, p):
            planes[:, :, plane] |= ((ordered[p].to(torch.int16) >> low) & (2**width - 1)) << shift
    return weight


def _pack_meta(scales: torch.Tensor, zeros: torch.Tensor | None, layout: Layout) -> torch.Tensor:
    halves = torch.zeros(layout.words, 2, layout.padded_out, dtype=layout.dtype, device=scales.device)
    if layout.sym:
        halves.flatten(0, 1)[: layout.groups, : layout.out_features] = scales.T
    else:
        halves[: layout.groups, 0, : layout.out_features] = scales.T
        # padded rows have code and zero point 0, padded inputs of a real row its last zero point twice
        padded = torch.zeros(layout.words, layout.padded_out, device=scales.device)
        padded[: layout.groups, : layout.out_features] = zeros.T.float()
        padded[layout.groups :] = padded[layout.groups - 1]
        halves[:, 1] = -(padded + layout.zero_offset)
    low, high = halves.view(torch.int16).to(torch.int32).unbind(1)
    return (low & 0xFFFF) | (high << 16)
