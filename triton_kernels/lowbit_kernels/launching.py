# SPDX-License-Identifier: Apache-2.0
"""What all launchers do on the host: configurations and their limits, checks of arguments, memory for split inputs.

A program owns block_n out_features and block_m rows of x. Where that makes too few programs, `split` of them share the
inputs of such a tile; their partial sums meet in a `Workspace` (`epilogue.store_part`).
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import triton

from lowbit_kernels.decode import AMD
from lowbit_kernels.int8.layout import Int8Layout
from lowbit_kernels.layout import Layout

# The compiler: what it gets wrong decides on configurations, here and nowhere else
TRITON = tuple(map(int, re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", triton.__version__).groups(default="0")))
# Where one dot takes several slices, Triton 3.6 overwrites operand registers of wgmmas that are still running (triton
# issue 9433); the machine code that 3.9 makes was checked and is right
JOINABLE = TRITON >= (3, 9)
# Before 3.7.1 no fence.proxy.async comes between the cp.async that brings x to shared memory and the wgmma (Hopper) or
# tcgen05.mma (Blackwell) that reads it there: it may read what was there before (triton pull request 10537)
FENCED = TRITON >= (3, 7, 1)
# Four warps and more make triton pick those instructions; two use mma.sync, which reads registers
_MOST_WARPS, _MOST_WARPS_UNFENCED = 8, 2

# Compute capabilities
AMPERE, HOPPER = (8, 0), (9, 0)

# Rows of x that a matrix instruction takes at least: fewer would be multiplied without one, far slower
FEWEST_ROWS = 16 if AMD else 8
# Programs that share a tile add that many partial sums, more than which cost more than they bring
_LARGEST_SPLIT = 16


def one_of(default: int, choices: tuple[int, ...]) -> Any:
    """A field of a Config that takes one of `choices`."""
    return field(default=default, metadata={"choices": choices})


def at_least(least: int, default: int) -> Any:
    """A field of a Config that takes a number from `least` on."""
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for besides the layout: whole numbers within the limits that their fields name."""

    def __post_init__(self) -> None:
        for limited in fields(self):
            value, limits = getattr(self, limited.name), limited.metadata
            if "choices" in limits and value not in limits["choices"]:
                raise ValueError(f"{limited.name} is {value}, expected one of {limits['choices']}")
            if "least" in limits and value < limits["least"]:
                raise ValueError(f"{limited.name} is {value}, expected at least {limits['least']}")


def tiles_per_iteration(k_tiles: int, most: int) -> int:
    """K tiles of a loop iteration: 4, 2 or 1, at most `most`, a divisor of all `k_tiles`."""
    return next(tiles for tiles in (4, 2, 1) if tiles <= most and k_tiles % tiles == 0)


def split_of_inputs(iterations: int, tiles: int, programs: int) -> int:
    """Programs that share the inputs of each of `tiles` output tiles, for about `programs` in all: each is to have two
    iterations at least."""
    return max(1, min(iterations // 2, programs // tiles, _LARGEST_SPLIT))


def most_warps(capability: tuple[int, int]) -> int:
    """Warps that a program may have on a GPU of this compute capability, for the compiler not to break its product."""
    unfenced = not FENCED and not AMD and capability[0] in (9, 10)
    return _MOST_WARPS_UNFENCED if unfenced else _MOST_WARPS


def compiler_limit(capability: tuple[int, int]) -> str | None:
    """What the compiler forbids there, in a line for users, or None."""
    limit = most_warps(capability)
    if limit == _MOST_WARPS:
        return None
    return (
        f"triton {triton.__version__} lets tensor cores read x before it is there (fixed in 3.7.1): "
        f"kernels take at most {limit} warps, which is slower"
    )


def check_warps(warps: int, device: torch.device) -> None:
    """Raise ValueError where the compiler would break a product of so many warps."""
    if FENCED or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if warps > most_warps(capability):
        raise ValueError(f"warps is {warps}: {compiler_limit(capability)}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless `tensor` is contiguous, of `shape`, on `device`, and of `dtype` or one of several."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != tuple(shape) or tensor.device != device:
        kinds = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
            f"expected {kinds} {list(shape)} on {device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")


def check_blocks(layout: Layout | Int8Layout, block_n: int, tiles: int = 1) -> None:
    """Raise ValueError unless blocks of `block_n` rows and iterations of `tiles` K tiles cover the weight exactly."""
    if layout.padded_out % block_n:
        raise ValueError(f"block_n {block_n} does not divide the {layout.padded_out} padded out_features")
    if layout.tiles % tiles:
        raise ValueError(f"tiles {tiles} does not divide the {layout.tiles} K tiles of the weight")


def check_input(x: torch.Tensor, weight: torch.Tensor, layout: Layout) -> None:
    """Raise ValueError unless x is layout.dtype [M, in_features] beside `weight`, rows of any stride."""
    if x.dtype != layout.dtype or x.ndim != 2 or x.shape[1] != layout.in_features or x.stride(1) != 1:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}, "
            f"expected {layout.dtype} [M, {layout.in_features}] with rows in one piece"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}, expected one device")


@dataclass(frozen=True)
class Ending:
    """What becomes of sums [M, N], see `epilogue.finish`: + bias [N], with gate_up SiLU(gate) * up (N halves), +
    residual like y. out: y itself, x.dtype or float32, allocated if it is None."""

    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    gate_up: bool = False
    out: torch.Tensor | None = None

    def output(
        self, rows: int, layout: Layout | Int8Layout, device: torch.device, experts: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """y [rows, N], contiguous. Raises ValueError where a tensor does not fit. experts: (E,) for a bias [E, N]."""
        if self.gate_up and layout.out_features % 16:
            raise ValueError(f"gate_up has {layout.out_features} out_features, expected a multiple of 16, interleaved")
        shape = (rows, layout.out_features // 2 if self.gate_up else layout.out_features)
        out = torch.empty(shape, dtype=layout.dtype, device=device) if self.out is None else self.out
        check_tensor("out", out, (layout.dtype, torch.float32), shape, device)
        if self.residual is not None:
            check_tensor("residual", self.residual, out.dtype, shape, device)
        if self.bias is not None:
            check_tensor("bias", self.bias, layout.dtype, (*experts, layout.out_features), device)
        return out


class Workspace:
    """Partial sums and counters of split launches on one stream; the counters are zero between launches.

    Buffers only grow and are never freed: a CUDA graph may have captured the address of an old one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.partials: list[torch.Tensor] = []
        self.counters: list[torch.Tensor] = []

    def get(self, elements: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [>= elements], not initialised, and int32 [>= tiles], zero."""
        if not self.partials or self.partials[-1].numel() < elements:
            size = max(elements, 2 * self.partials[-1].numel() if self.partials else 1 << 20)
            self.partials.append(torch.empty(size, dtype=torch.float32, device=self.device))
        if not self.counters or self.counters[-1].numel() < tiles:
            size = max(tiles, 2 * self.counters[-1].numel() if self.counters else 1 << 12)
            self.counters.append(torch.zeros(size, dtype=torch.int32, device=self.device))
        return self.partials[-1], self.counters[-1]


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def stream_of(device: torch.device) -> int:
    """The current stream of a device; CPUs have one."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def workspace_of(device: torch.device) -> Workspace:
    """The workspace of the current stream: launches on one stream follow each other, those on two must not share."""
    key = (device, stream_of(device))
    if key not in _workspaces:
        _workspaces[key] = Workspace(device)
    return _workspaces[key]


def split_buffers(
    workspace: Workspace | None, device: torch.device, split: int, tiles: int, size: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """partials float32 [>= tiles * split * size] and counters int32 [>= tiles], zero, for `tiles` output tiles of
    `size` sums; None for both where one program has all inputs. From `workspace`, or from that of the stream."""
    if split == 1:
        return None, None
    return (workspace or workspace_of(device)).get(tiles * split * size, tiles)
