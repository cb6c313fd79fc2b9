"""Random packed weights for the kernel tests, with what they stand for in float64; skips where kernels cannot run."""

from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels need triton")
if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("no GPU, and triton was imported before its interpreter was asked for", allow_module_level=True)

from lowbit_kernels import reference  # noqa: E402 - nothing of ours is worth importing where kernels cannot run
from lowbit_kernels.layout import PER_CHANNEL, Layout, pack  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.bfloat16: 3e-3, torch.float16: 5e-4}  # of an output in 16 bits
# sums in float32: the tensor cores keep a few bits less than the interpreter
EXACT = 1e-5 if torch.cuda.is_available() else 1e-6


@dataclass(frozen=True)
class Case:
    """A weight [N, K] and rows M of x."""

    bits: int
    group: int
    sym: bool
    dtype: str
    M: int
    N: int
    K: int

    def __str__(self):
        group = "channel" if self.group == PER_CHANNEL else f"g{self.group}"
        kind = f"w{self.bits}-{group}-{'sym' if self.sym else 'asym'}-{self.dtype}"
        return f"{kind}-{self.M}x{self.N}x{self.K}"


@dataclass
class Packed:
    weight: torch.Tensor
    meta: torch.Tensor
    layout: Layout
    matrix: torch.Tensor  # float64 [N, K]


def codes_and_grid(case, device, rows=None):
    """codes, scales, zeros of `rows` (N) rows."""
    rows, groups = rows or case.N, 1 if case.group == PER_CHANNEL else case.K // case.group
    codes = torch.randint(0, 2**case.bits, (rows, case.K), dtype=torch.uint8, device=device)
    scales = (torch.rand(rows, groups, device=device) * 0.02 + 0.005).to(DTYPES[case.dtype])
    zeros = None if case.sym else torch.randint(0, 2**case.bits, (rows, groups), dtype=torch.uint8, device=device)
    return codes, scales, zeros


def rms_norm(x, weight, eps):
    """x [..., K] / sqrt(mean of its squares + eps) * weight [K], float64."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def packed(codes, scales, zeros, bits):
    matrix = reference.dequantize(codes, scales, zeros, bits).double()
    return Packed(*pack(codes, scales, zeros, bits), Layout.of(codes, scales, zeros, bits), matrix)


def inputs(case, device, rows=None):
    """x [M, K] in rows that lie apart, with NaN between them."""
    storage = torch.full((rows or case.M, case.K + 8), float("nan"), dtype=DTYPES[case.dtype], device=device)
    x = storage[:, : case.K]
    return x.copy_(torch.randn(x.shape, device=device))


def error(result, expected):
    """Relative, over the whole result; NaN when any of it was not written."""
    return ((result.double() - expected).norm() / expected.norm()).item()


def poisoned(shape, dtype, device):
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
