"""The kernel configurations we ship, one line each, and how each kernel is called."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

PER_CHANNEL = -1
MEASURED = ("sm_80", "sm_90")
NVIDIA = ("sm_86", "sm_89", "sm_100", "sm_120")
AMD = ("gfx942",)
ANY = (*NVIDIA, *AMD)


@dataclass(frozen=True)
class Shipped:
    """kernel: a key of CALLS. block_m x block_n: rows of x and of W that a program owns. joined: slices of a dot.
    targets: measured there; also: only compiled there. since: triton version it needs."""

    kernel: str
    bits: int
    group: int
    sym: bool
    dtype: str
    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int
    joined: int = 1
    targets: tuple[str, ...] = MEASURED
    also: tuple[str, ...] = ()
    since: tuple[int, int] = (3, 6)

    @property
    def id(self) -> str:
        if self.kernel.startswith("quantize"):
            return f"{self.kernel}-{self.dtype}-k{self.group}"
        if not self.multiplies:
            return f"{self.kernel}-w{self.bits}-g{self.group}"
        group = "channel" if self.group == PER_CHANNEL else f"g{self.group}"
        sym = "sym" if self.sym else "asym"
        joined = f"-joined{self.joined}" if self.joined > 1 else ""
        return (
            f"{self.kernel}-w{self.bits}-{group}-{sym}-{self.dtype}-m{self.block_m}-n{self.block_n}"
            f"-split{self.split}-warps{self.warps}-stages{self.stages}{joined}"
        )

    @property
    def multiplies(self) -> bool:
        return self.block_m > 0


@dataclass(frozen=True)
class Call:
    """A kernel with its arguments: types of those a launch passes, values of those it is compiled for."""

    function: Any
    types: dict[str, str]  # "*bf16" an aligned pointer, "*bf16:1" any, "i32" any number, "i32:16" a multiple of 16
    constants: dict[str, Any]
    options: dict[str, Any]
    gluon: bool = False

    @property
    def pointers(self) -> list[str]:
        """Names of the pointers, in the order of the kernel's arguments."""
        return [name for name in self.function.arg_names if self.types.get(name, "").startswith("*")]


# kernel, bits, group, sym, dtype, block_m, block_n, split, warps, stages
SHIPPED = (
    Shipped("skinny", 4, 128, True, "bf16", 8, 64, 4, 2, 3, also=NVIDIA),
    Shipped("skinny", 4, 128, False, "bf16", 8, 64, 4, 2, 3),
    Shipped("skinny", 4, 64, True, "bf16", 8, 64, 4, 2, 3),
    Shipped("skinny", 4, 64, False, "bf16", 8, 64, 4, 2, 3),
    Shipped("skinny", 4, 32, True, "bf16", 8, 64, 4, 2, 3),
    Shipped("skinny", 4, 128, True, "fp16", 8, 64, 4, 2, 3),
    Shipped("skinny", 4, PER_CHANNEL, True, "bf16", 8, 64, 1, 2, 3),
    Shipped("skinny", 4, 128, True, "bf16", 8, 32, 4, 1, 3),
    Shipped("skinny", 4, 128, True, "bf16", 16, 64, 4, 2, 3, also=ANY),
    Shipped("skinny", 4, 128, True, "bf16", 16, 128, 4, 4, 3),
    Shipped("skinny", 4, 128, True, "bf16", 32, 64, 4, 2, 3),
    Shipped("skinny", 4, 128, True, "bf16", 32, 128, 4, 4, 3),
    Shipped("skinny", 8, PER_CHANNEL, True, "bf16", 8, 64, 4, 2, 3, also=NVIDIA),
    Shipped("skinny", 8, 128, False, "bf16", 8, 64, 4, 2, 3),
    Shipped("skinny", 3, 128, True, "bf16", 8, 64, 4, 2, 3, also=NVIDIA),
    Shipped("skinny", 3, 128, False, "bf16", 8, 64, 4, 2, 3),
    Shipped("skinny", 3, 128, True, "bf16", 16, 64, 4, 2, 3, also=AMD),
    Shipped("skinny", 3, 128, True, "bf16", 32, 64, 4, 4, 3, targets=("sm_90",)),
    Shipped("skinny", 3, 64, False, "bf16", 32, 64, 4, 4, 3, targets=("sm_90",)),
    Shipped("skinny", 3, 128, True, "bf16", 32, 32, 4, 2, 3, targets=("sm_90",)),
    Shipped("skinny", 2, 128, True, "bf16", 8, 64, 4, 2, 3, also=NVIDIA),
    Shipped("skinny", 2, 128, False, "bf16", 8, 64, 4, 2, 3),
    Shipped("skinny", 2, 128, True, "bf16", 16, 64, 4, 2, 3),
    Shipped("skinny", 2, 64, True, "bf16", 8, 64, 4, 2, 3, targets=("sm_90",)),
    Shipped("skinny", 2, 64, True, "bf16", 16, 128, 4, 2, 2, targets=("sm_90",)),
    Shipped("skinny", 2, 64, False, "bf16", 16, 128, 4, 2, 2, targets=("sm_90",)),
    Shipped("skinny", 8, 128, False, "bf16", 16, 64, 4, 2, 3, targets=(), also=AMD),
    Shipped("skinny", 2, 128, False, "fp16", 16, 64, 4, 2, 3, targets=(), also=AMD),
    Shipped("gemm", 4, 128, True, "bf16", 64, 128, 1, 4, 3, also=ANY),
    Shipped("gemm", 4, 128, True, "bf16", 128, 128, 1, 8, 3),
    Shipped("gemm", 4, 128, False, "bf16", 128, 128, 1, 8, 3),
    Shipped("gemm", 8, PER_CHANNEL, True, "bf16", 128, 128, 1, 8, 3),
    Shipped("gemm", 4, 128, False, "bf16", 128, 128, 1, 8, 2, targets=(), also=AMD),
    Shipped("gemm", 8, PER_CHANNEL, True, "fp16", 128, 128, 1, 8, 2, targets=(), also=AMD),
    Shipped("gemm", 3, 128, True, "bf16", 32, 128, 1, 4, 2, targets=(), also=AMD),
    Shipped("gemm", 2, 128, False, "bf16", 64, 128, 1, 4, 2, targets=(), also=AMD),
    Shipped("gemm", 4, 128, True, "bf16", 128, 128, 1, 8, 3, joined=4, targets=("sm_90",), since=(3, 8)),
    Shipped("hopper", 4, 128, True, "bf16", 64, 128, 4, 8, 4, targets=("sm_90",)),
    Shipped("hopper", 4, 128, True, "bf16", 128, 128, 1, 8, 4, targets=("sm_90",)),
    Shipped("hopper", 4, 128, False, "bf16", 128, 128, 4, 8, 4, targets=("sm_90",)),
    Shipped("hopper", 4, 128, True, "fp16", 128, 128, 1, 8, 4, targets=("sm_90",)),
    Shipped("hopper", 4, 32, False, "bf16", 128, 128, 1, 8, 4, targets=("sm_90",)),
    Shipped("hopper", 4, 128, True, "bf16", 256, 128, 1, 8, 3, targets=("sm_90",)),
    Shipped("hopper", 4, 128, False, "bf16", 256, 128, 1, 8, 3, targets=("sm_90",)),
    Shipped("hopper", 8, PER_CHANNEL, True, "bf16", 128, 128, 1, 8, 4, targets=("sm_90",)),
    Shipped("hopper", 8, 128, False, "bf16", 64, 128, 4, 8, 4, targets=("sm_90",)),
    Shipped("dequantize", 4, 128, True, "bf16", 0, 64, 1, 4, 1, also=ANY),
    Shipped("gptq_columns", 4, 128, False, "fp32", 0, 0, 1, 1, 1, also=ANY),
    Shipped("gptq_descend", 4, 128, False, "fp32", 0, 0, 1, 1, 1, also=ANY),
    Shipped("int8", 8, PER_CHANNEL, True, "bf16", 8, 64, 4, 2, 3, also=NVIDIA),
    Shipped("int8", 8, PER_CHANNEL, True, "bf16", 64, 64, 4, 4, 3),
    Shipped("int8", 8, PER_CHANNEL, True, "bf16", 128, 128, 1, 8, 3, also=NVIDIA),
    Shipped("int8", 8, 128, True, "bf16", 128, 128, 1, 8, 3),
    Shipped("int8", 4, PER_CHANNEL, True, "bf16", 8, 64, 4, 2, 3, also=NVIDIA),
    Shipped("int8", 4, 128, True, "bf16", 8, 64, 4, 2, 3),
    Shipped("int8", 4, PER_CHANNEL, True, "bf16", 64, 64, 4, 4, 3),
    Shipped("int8", 4, PER_CHANNEL, True, "bf16", 128, 128, 1, 8, 3, also=NVIDIA),
    Shipped("int8", 4, 128, True, "bf16", 128, 128, 1, 8, 3),
    Shipped("int8", 8, PER_CHANNEL, True, "bf16", 16, 64, 4, 2, 2, targets=(), also=AMD),
    Shipped("int8", 4, 128, True, "fp16", 16, 64, 4, 2, 2, targets=(), also=AMD),
    Shipped("int8", 8, PER_CHANNEL, True, "bf16", 128, 128, 1, 8, 2, targets=(), also=AMD),
    Shipped("int8", 4, 128, True, "bf16", 128, 128, 1, 8, 2, targets=(), also=AMD),
    # group: elements of a row
    Shipped("quantize", 8, 4096, True, "bf16", 0, 0, 1, 8, 1, also=ANY),
    Shipped("quantize", 8, 32768, True, "bf16", 0, 0, 1, 16, 1),
    Shipped("quantize_normed", 8, 8192, True, "bf16", 0, 0, 1, 16, 1, also=ANY),
)


def find(names: list[str]) -> Iterator[Shipped]:
    """Configurations whose id holds one of `names`; all when there are none."""
    return (shipped for shipped in SHIPPED if not names or any(name in shipped.id for name in names))


def skinny(shipped: Shipped) -> Call:
    from lowbit_kernels.skinny import long_tiles, skinny_kernel

    types = {
        "x": f"*{shipped.dtype}", "weight": "*i16", "meta": "*i32", "y": f"*{shipped.dtype}",
        "rows": "i32", "in_features": "i32:16", "out_features": "i32:16", "x_stride": "i32:16", "k_tiles": "i32",
        "padded_out": "i32:16", "words": "i32",
    }  # fmt: skip
    if shipped.split > 1:
        types |= {"partials": "*fp32", "counters": "*i32"}
    constants = {
        "BITS": shipped.bits, "GROUP_SIZE": shipped.group, "SYM": shipped.sym, "GATE_UP": False, "EVEN_K": True,
        "BN": shipped.block_n, "BM": shipped.block_m, "SPLIT": shipped.split,
        "TILES": long_tiles(shipped.bits, shipped.block_m, shipped.block_n),
    }  # fmt: skip
    options = {"num_warps": shipped.warps, "num_stages": shipped.stages, "enable_fp_fusion": True}
    return Call(skinny_kernel, types, constants, options)


def gemm(shipped: Shipped) -> Call:
    from lowbit_kernels.gemm import gemm_kernel

    types = {
        "x": f"*{shipped.dtype}", "weight": "*i16", "meta": "*i32", "y": f"*{shipped.dtype}",
        "rows": "i32", "in_features": "i32:16", "out_features": "i32:16", "x_stride": "i32:16", "k_tiles": "i32",
        "padded_out": "i32:16",
    }  # fmt: skip
    constants = {
        "BITS": shipped.bits, "GROUP_SIZE": shipped.group, "SYM": shipped.sym, "GATE_UP": False, "EVEN_K": True,
        "BN": shipped.block_n, "BM": shipped.block_m, "GROUP_M": 8, "JOINED": shipped.joined,
    }  # fmt: skip
    options = {"num_warps": shipped.warps, "num_stages": shipped.stages, "enable_fp_fusion": True}
    return Call(gemm_kernel, types, constants, options)


def dequantize(shipped: Shipped) -> Call:
    from lowbit_kernels.gemm import dequantize_kernel

    types = {
        "weight": "*i16", "meta": "*i32", "out": f"*{shipped.dtype}", "first_row": "i32:16", "last_row": "i32:16",
        "in_features": "i32:16", "k_tiles": "i32", "padded_out": "i32:16",
    }  # fmt: skip
    constants = {
        "BITS": shipped.bits, "GROUP_SIZE": shipped.group, "SYM": shipped.sym, "BN": shipped.block_n
    }  # fmt: skip
    return Call(dequantize_kernel, types, constants, {"num_warps": shipped.warps, "enable_fp_fusion": True})


def hopper(shipped: Shipped) -> Call:
    from lowbit_kernels.gemm_hopper import ONE_GROUP, hopper_kernel, x_layout

    types = {
        "x": f"tensordesc<{shipped.dtype}[{shipped.block_m}, 128],{x_layout()!r}>", "weight": "*i16", "meta": "*i32",
        "y": f"*{shipped.dtype}", "bias": f"*{shipped.dtype}", "rows": "i32", "out_features": "i32:16",
        "padded_out": "i32:16", "all_turns": "i32", "part_turns": "i32",
    }  # fmt: skip
    if shipped.split > 1:
        types |= {"partials": "*fp32", "counters": "*i32"}
    constants = {
        "BITS": shipped.bits, "GROUP": ONE_GROUP if shipped.group == PER_CHANNEL else shipped.group,
        "SYM": shipped.sym, "BM": shipped.block_m, "STAGES": shipped.stages, "SPLIT": shipped.split,
    }  # fmt: skip
    return Call(hopper_kernel, types, constants, {"num_warps": 4, "enable_fp_fusion": True}, gluon=True)


def gptq(shipped: Shipped) -> Call:
    from lowbit_kernels import gptq as module

    kernel = {"gptq_columns": module._columns_kernel, "gptq_descend": module._descend_kernel}[shipped.kernel]
    constants = {"TOP": 2**shipped.bits - 1, **module._shape(shipped.group)}
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    types = {}
    for name in kernel.arg_names:
        if name not in constants:
            types[name] = "i32:16" if name == "n" or name.endswith("_stride") else "i32" if name == "tried" else "*fp32"
    return Call(kernel, types, constants, options)


def int8(shipped: Shipped) -> Call:
    from lowbit_kernels.int8.kernel import int8_kernel

    types = {
        "x": "*i8", "x_scales": "*fp32", "weight": "*i8" if shipped.bits == 8 else "*u8", "scales": "*fp32",
        "y": f"*{shipped.dtype}", "rows": "i32", "out_features": "i32:16", "k_tiles": "i32",
        "padded_out": "i32:16",
    }  # fmt: skip
    if shipped.split > 1:
        types |= {"partials": "*fp32", "counters": "*i32"}
    constants = {
        "BITS": shipped.bits, "GROUP_SIZE": shipped.group, "BN": shipped.block_n, "BM": shipped.block_m,
        "TILES": 2 if shipped.split > 1 else 1, "SPLIT": shipped.split, "GROUP_M": 8,
    }  # fmt: skip
    options = {"num_warps": shipped.warps, "num_stages": shipped.stages, "enable_fp_fusion": True}
    return Call(int8_kernel, types, constants, options)


def quantize(shipped: Shipped) -> Call:
    from lowbit_kernels.int8.quantize import quantize_kernel

    types = {
        "x": f"*{shipped.dtype}", "codes": "*i8", "scales": "*fp32", "in_features": "i32:16", "padded_in": "i32:16",
        "x_stride": "i32:16", "eps": "fp32",
    }  # fmt: skip
    if shipped.kernel == "quantize_normed":
        types |= {"norm_weight": f"*{shipped.dtype}"}
    options = {"num_warps": shipped.warps, "enable_fp_fusion": True}
    return Call(quantize_kernel, types, {"BLOCK": shipped.group}, options)


CALLS = {
    "skinny": skinny,
    "gemm": gemm,
    "hopper": hopper,
    "dequantize": dequantize,
    "gptq_columns": gptq,
    "gptq_descend": gptq,
    "int8": int8,
    "quantize": quantize,
    "quantize_normed": quantize,
}


def call(shipped: Shipped) -> Call:
    """How a launch calls the kernel; arguments it leaves out are None."""
    made = CALLS[shipped.kernel](shipped)
    left_out = set(made.function.arg_names) - made.types.keys() - made.constants.keys()
    return replace(made, constants=made.constants | dict.fromkeys(left_out))
