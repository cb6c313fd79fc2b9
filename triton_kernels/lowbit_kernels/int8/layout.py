# SPDX-License-Identifier: Apache-2.0
"""The packed weight of a product of integers, in plain torch. The README beside it has the picture.

Eight bits need no decoding: the codes minus 128, row by row, read by the tensor core from shared memory.

    weight  int8 [N, K]

Four bits are unpacked in registers, so they are stored as a lane of a warp holds them: of a fragment of 16 rows and 32
inputs, rows g and g + 8 and inputs 4c to 4c + 3 and 16 more. The two nibbles of a byte, in two's complement, are the
same element of two slices of 64 inputs; masked, a nibble in the upper half of its byte is that code times 16.

    weight  uint8 [N/16, K/128, 2, 32, 16]                      (row tile, K tile, half slice, lane, byte)
    byte 8*kh + 4*rh + e of lane 4*g + c, half slice j, holds for each slice p (the low nibble is slice 0) the code
        codes[16*nt + 8*rh + g, 128*kt + 64*p + 32*j + 16*kh + 4*c + e] - 8

Both with N padded to 64 rows and K to tiles of 128 inputs by weights that are 0. Scales are float32 [groups, N], those
of padded groups 0.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from lowbit_kernels.layout import PER_CHANNEL, ROWS, check_stored

TILE = 128  # inputs that rows of x and of W are padded to
BITS = (4, 8)
GROUP_SIZES = (64, 128, 256, 512, 1024)
# A row of x is quantized in one block. Sums of products of two int8 stay within int32 for twice as many
MOST_INPUTS = 2**16


@dataclass(frozen=True)
class Int8Layout:
    """Shapes of one packed weight [out_features, in_features] that is multiplied by eight-bit rows.

    group_size: inputs that share a scale, PER_CHANNEL for one scale per row. dtype: of x before it is quantized, and of
    the result. Weights are symmetric.
    """

    bits: int
    group_size: int
    dtype: torch.dtype
    out_features: int
    in_features: int

    sym = True

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits!r}, expected one of {', '.join(map(str, BITS))}")
        if self.group_size not in (*GROUP_SIZES, PER_CHANNEL):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size is {self.group_size!r}, expected one of {sizes} or -1 (per channel)")
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype is {self.dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
        if self.out_features < 1 or not 1 <= self.in_features <= MOST_INPUTS:
            raise ValueError(
                f"weight is [{self.out_features}, {self.in_features}], expected at least [1, 1] and at most "
                f"{MOST_INPUTS} in_features"
            )
        if self.group_size != PER_CHANNEL and self.in_features % self.group_size:
            raise ValueError(f"in_features {self.in_features} is not a multiple of group_size {self.group_size}")

    @cached_property
    def tiles(self) -> int:
        return -(-self.in_features // TILE)

    @cached_property
    def padded_in(self) -> int:
        return self.tiles * TILE

    @cached_property
    def padded_out(self) -> int:
        return -(-self.out_features // ROWS) * ROWS

    @cached_property
    def groups(self) -> int:
        return 1 if self.group_size == PER_CHANNEL else self.in_features // self.group_size

    @cached_property
    def weight_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.uint8

    @cached_property
    def weight_shape(self) -> tuple[int, ...]:
        if self.bits == 8:
            return (self.padded_out, self.padded_in)
        return (self.padded_out // 16, self.tiles, 2, 32, 16)

    @cached_property
    def scales_shape(self) -> tuple[int, int]:
        """Groups of the padding included."""
        return (1 if self.group_size == PER_CHANNEL else -(-self.padded_in // self.group_size), self.padded_out)

    @cached_property
    def middle(self) -> int:
        """The zero point."""
        return 2 ** (self.bits - 1)

    def check(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        """Raise ValueError unless `weight` and `scales` are contiguous tensors of this layout on one device."""
        check_stored(self, "weight", weight, self.weight_dtype, self.weight_shape)
        check_stored(self, "scales", scales, torch.float32, self.scales_shape)
        if weight.device != scales.device:
            raise ValueError(f"weight is on {weight.device} and scales on {scales.device}, expected one device")


def pack(codes: torch.Tensor, scales: torch.Tensor, layout: Int8Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """codes uint8 [N, K] in [0, 2^bits), scales [N, G] of any float dtype -> weight and scales as `layout` has them."""
    expected = (layout.out_features, layout.in_features)
    if codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, expected torch.uint8 {list(expected)}")
    if tuple(scales.shape) != (layout.out_features, layout.groups):
        raise ValueError(
            f"scales have shape {list(scales.shape)}, expected {[layout.out_features, layout.groups]} for {layout}"
        )
    if (largest := int(codes.max())) >= 2**layout.bits:
        raise ValueError(f"codes reach {largest}, expected below {2**layout.bits} for {layout.bits} bits")
    rows = layout.padded_out - layout.out_features
    columns = layout.padded_in - layout.in_features
    codes = torch.nn.functional.pad(codes, (0, columns, 0, rows), value=layout.middle) ^ layout.middle
    packed = torch.zeros(layout.scales_shape, device=scales.device)
    packed[: layout.groups, : layout.out_features] = scales.T
    if layout.bits == 8:
        return codes.view(torch.int8), packed
    low, high = _lane_order(codes, layout)
    return (low | high << 4).reshape(layout.weight_shape), packed


def unpack(weight: torch.Tensor, scales: torch.Tensor, layout: Int8Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact inverse of `pack`: codes uint8 [N, K], scales float32 [N, G]."""
    layout.check(weight, scales)
    if layout.bits == 8:
        codes = weight.view(torch.uint8)
    else:
        codes = weight.new_empty(layout.padded_out, layout.padded_in)
        low, high = _lane_order(codes, layout)  # views: writing to them fills `codes`
        low.copy_((weight & 15).view(low.shape))
        high.copy_((weight >> 4).view(high.shape))
    codes = codes[: layout.out_features, : layout.in_features] ^ layout.middle
    return codes, scales[: layout.groups, : layout.out_features].T.contiguous()


def dequantize(weight: torch.Tensor, scales: torch.Tensor, layout: Int8Layout) -> torch.Tensor:
    """layout.dtype [N, K]"""
    codes, scales = unpack(weight, scales, layout)
    grouped = codes.view(layout.out_features, layout.groups, -1).to(scales.dtype) - layout.middle
    return (grouped * scales[..., None]).flatten(1).to(layout.dtype)


def row_sums(codes: torch.Tensor, scales: torch.Tensor, layout: Int8Layout) -> torch.Tensor:
    """float32 [padded_out]: the sum of each row of the weight, which a zero point of x is multiplied by."""
    grouped = codes.view(layout.out_features, layout.groups, -1).to(torch.int32) - layout.middle
    sums = torch.zeros(layout.padded_out, device=codes.device)
    sums[: layout.out_features] = (grouped.sum(-1).double() * scales.double()).sum(-1)
    return sums


def _lane_order(codes: torch.Tensor, layout: Int8Layout) -> torch.Tensor:
    """codes [padded_out, padded_in] -> a view [slice 2, N/16, K/128, j 2, g 8, c 4, kh 2, rh 2, e 4]."""
    codes = codes.view(layout.padded_out // 16, 2, 8, layout.tiles, 2, 2, 2, 4, 4)
    return codes.permute(4, 0, 3, 5, 2, 7, 6, 1, 8)  # from nt, rh, g, kt, p, j, kh, c, e
