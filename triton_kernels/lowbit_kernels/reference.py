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
