"""Shapes, strides of x, splits, blocks and dtypes that nobody chose, drawn by seed. Kernels are imported inside of
functions, as in shipped_runs.py."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from executed.shipped_runs import Problem, Result, run_on

if TYPE_CHECKING:
    from executed.problems import Comparison, Weight

KERNELS = ("skinny", "skinny", "gemm", "int8", "dequantize", "quantize", "gptq")  # as often as they stand here
Runner = Callable[["Weight"], "list[Comparison]"]


def run_drawn(gpu: str, seed: int) -> Result:
    """In a process that has imported the kernels without the interpreter (process.py)."""
    draw = random.Random(seed)
    kernel = draw.choice((*KERNELS, "hopper") if gpu == "sm_90" else KERNELS)
    name, problem = {"gptq": _gptq, "quantize": _quantize}.get(kernel, _product)(draw, kernel)
    return run_on(gpu, seed, f"{kernel} {name}", problem)


def _product(draw: random.Random, kernel: str) -> tuple[str, Problem]:
    """A product with a packed weight, or that weight made dense."""
    from executed import problems

    weight = problems.Weight(
        bits=draw.choice((4, 8, 3, 2)), group=draw.choice((32, 64, 128, 256, -1)), sym=draw.random() < 0.5,
        dtype=draw.choice(("bf16", "fp16")), rows=draw.choice((1, draw.randint(2, 20), draw.randint(20, 70))),
        out_features=draw.randint(1, 140), in_features=0, padding=draw.choice((0, 0, 8, draw.randint(1, 9))),
        bias=draw.random() < 0.5, residual=draw.random() < 0.3, exact=draw.random() < 0.7,
    )  # fmt: skip
    if kernel == "int8":
        weight = replace(
            weight, bits=draw.choice((4, 8)), group=draw.choice((64, 128, 256, -1)), padding=0, residual=False
        )
    if kernel == "hopper":  # TMA wants rows a multiple of 16 bytes apart
        weight = replace(
            weight, bits=draw.choice((4, 8)), group=draw.choice((128, 256, -1)), padding=8 * draw.randint(0, 2),
            residual=False, exact=False,
        )  # fmt: skip
    longest = 700 if kernel in ("gemm", "dequantize") else 1500
    if weight.group > 0:
        weight.in_features = weight.group * draw.randint(1, longest // weight.group)
    else:
        weight.in_features = draw.randint(1, longest)
    if kernel == "hopper":
        weight.in_features = -(-weight.in_features // 128) * 128
    run = {"skinny": _skinny, "gemm": _gemm, "int8": _int8, "hopper": _hopper}.get(kernel)
    config, problem = run(draw, weight) if run else ("", problems.run_dequantize)

    def launch(generator: torch.Generator) -> "list[Comparison]":
        weight.generator = generator
        return problem(weight)

    shape = f"{weight.rows}x{weight.out_features}x{weight.in_features}+{weight.padding}"
    kind = f"w{weight.bits} group {weight.group} {'sym' if weight.sym else 'asym'} {weight.dtype}"
    return f"{kind} {shape} {config}".strip(), launch


def _blocks(draw: random.Random, out_features: int) -> int:
    """A block_n that divides the padded out_features."""
    padded = -(-out_features // 64) * 64
    return draw.choice([n for n in (32, 64, 128) if padded % n == 0])


def _skinny(draw: random.Random, weight: "Weight") -> tuple[object, Runner]:
    from executed import problems
    from lowbit_kernels import skinny
    from lowbit_kernels.layout import SLICES

    k_tiles = -(-weight.in_features // (32 * SLICES[weight.bits]))
    tiles = draw.choice([t for t in (1, 2, 4) if k_tiles % t == 0 and t * SLICES[weight.bits] <= 16])
    config = skinny.Config(
        _blocks(draw, weight.out_features), draw.choice((8, 16, 32)), draw.randint(1, 4), tiles,
        draw.choice((1, 2, 4)), draw.randint(1, 4),
    )  # fmt: skip
    return config, lambda weight: problems.run_skinny(weight, config, launches=2)


def _gemm(draw: random.Random, weight: "Weight") -> tuple[object, Runner]:
    from executed import problems
    from lowbit_kernels import gemm, launching
    from lowbit_kernels.layout import SLICES

    joined = draw.choice([j for j in (1, 2, 4) if j <= SLICES[weight.bits]]) if launching.JOINABLE else 1
    config = gemm.Config(
        _blocks(draw, weight.out_features), draw.choice((16, 32, 64)), joined, draw.randint(1, 3),
        draw.choice((2, 4)), draw.randint(1, 3),
    )  # fmt: skip
    return config, lambda weight: problems.run_gemm(weight, config)


def _int8(draw: random.Random, weight: "Weight") -> tuple[object, Runner]:
    from executed import problems
    from lowbit_kernels.int8 import kernel as int8

    asymmetric, k_tiles = draw.random() < 0.5, -(-weight.in_features // 128)
    config = int8.Config(
        _blocks(draw, weight.out_features), draw.choice((8, 16, 32, 64)), draw.randint(1, 3),
        draw.choice([t for t in (1, 2) if k_tiles % t == 0]), draw.randint(1, 3), draw.choice((2, 4)),
        draw.randint(1, 3),
    )  # fmt: skip
    return config, lambda weight: problems.run_int8(weight, config, asymmetric, launches=2)


def _hopper(draw: random.Random, weight: "Weight") -> tuple[object, Runner]:
    from executed import problems
    from lowbit_kernels import gemm_hopper

    config = gemm_hopper.Config(draw.choice((64, 128)), draw.randint(2, 4), draw.randint(1, 3))
    return config, lambda weight: problems.run_hopper(weight, config)


def _quantize(draw: random.Random, _: str) -> tuple[str, Problem]:
    from executed import problems

    rows, inputs, padding, sym = draw.randint(1, 5), draw.randint(1, 3000), draw.randint(0, 9), draw.random() < 0.5
    dtype, normed = draw.choice(("bf16", "fp16", "fp32")), draw.random() < 0.4

    def launch(generator: torch.Generator) -> "list[Comparison]":
        x = torch.randn(rows, inputs + padding, generator=generator).to(problems.DTYPES[dtype])[:, :inputs]
        norm = torch.randn(inputs, generator=generator).to(x.dtype) if normed else None
        return problems.run_quantize(x, sym, norm)

    return f"{'sym' if sym else 'asym'} {dtype} {rows}x{inputs}+{padding}{' normed' if normed else ''}", launch


def _gptq(draw: random.Random, _: str) -> tuple[str, Problem]:
    from executed import problems

    which, length, rows = draw.choice(("columns", "descend")), draw.randint(1, 70), draw.randint(1, 70)
    bits = draw.choice((2, 3, 4, 8))
    return f"{which} {length}x{rows} w{bits}", lambda generator: problems.run_gptq(which, length, rows, bits, generator)
