# SPDX-License-Identifier: Apache-2.0
"""What every kernel must compute, in plain torch on plain tensors. No layout, no speed: the oracle of the kernel
tests."""

import torch


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, g_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None (2^(bits-1)), g_idx int [K] or None (k // (K/G)).

    Returns float32 [N, K] = (codes - zeros) * scales.
    """
    in_features = codes.shape[1]
    groups = scales.shape[1]
    if in_features % groups:
        raise ValueError(f"in_features {in_features} is not a multiple of the {groups} groups of scales")
    if g_idx is None:
        g_idx = torch.arange(in_features, device=codes.device) // (in_features // groups)
    index = g_idx.long()
    zero = float(2 ** (bits - 1)) if zeros is None else zeros.float()[:, index]
    return (codes.float() - zero) * scales.float()[:, index]


def linear(x, codes, scales, zeros, bits, g_idx=None, bias=None) -> torch.Tensor:
    """x [..., K] -> [..., N] in x.dtype; products and sums in float32, one rounding at the end."""
    y = x.float() @ dequantize(codes, scales, zeros, bits, g_idx).T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def quantize_rows(
    x: torch.Tensor, sym: bool = True, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [..., K] -> codes int8 [..., K], scales float32 [...] and zeros int8 [...], or None if sym:
    x ~ (codes - zeros) * scales.

    scale float32 [1] and, unless sym, zero int8 [1] are those of all rows; None: each row has its own. Quotients are
    rounded to nearest even. The scale of a row with NaN is NaN, without `scale` that of one with an infinity too.
    """
    x = x.float()
    tiny = torch.finfo(torch.float32).tiny
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if scale is not None:
        scales = scale.expand(low.shape).masked_fill(x.isnan().any(-1), float("nan"))
        zeros = None if sym else zero.expand(low.shape)
    else:
        scales = x.abs().amax(-1) / 127.5 if sym else (high - low) / 255
        scales = scales.clamp(min=tiny).masked_fill(~x.isfinite().all(-1), float("nan"))
        zeros = None if sym else (-128 - low / scales).round().clamp(-128, 127).to(torch.int8)
    codes = (x / scales[..., None]).round() + (0 if zeros is None else zeros[..., None].float())
    return codes.clamp(-128, 127).to(torch.int8), scales, zeros


def int8_linear(
    x_codes: torch.Tensor,
    x_scales: torch.Tensor,
    x_zeros: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x_codes int8 [M, K], x_scales float32 [M], x_zeros int8 [M] or None (0), codes uint8 [N, K] around 2^(bits-1),
    scales [N, G]: float32 [M, N]. Sums of products of codes are exact: float64 holds every integer on the way."""
    groups = scales.shape[1]
    x = x_codes.double() - (0 if x_zeros is None else x_zeros.double()[:, None])
    w = codes.double() - 2 ** (bits - 1)
    sums = torch.einsum("mgk,ngk->mng", x.unflatten(1, (groups, -1)), w.unflatten(1, (groups, -1)))
    y = (sums * scales.double()).sum(-1) * x_scales.double()[:, None]
    return (y if bias is None else y + bias.double()).float()
