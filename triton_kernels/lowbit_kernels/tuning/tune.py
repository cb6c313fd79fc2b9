# SPDX-License-Identifier: Apache-2.0
"""Find the fastest kernel and configuration for a weight shape on this GPU.

The candidates are few: those that arithmetic leaves over. Each must compute the right thing, the same in every repeat,
before its time counts: a fast kernel that a compiler broke loses here, not in somebody's model.
"""

from collections.abc import Iterator
from itertools import product

import torch

from lowbit_kernels import gemm, gemm_hopper, launching, ops, reference, skinny
from lowbit_kernels.int8 import kernel as int8
from lowbit_kernels.int8 import layout as int8_layout
from lowbit_kernels.int8.layout import Int8Layout
from lowbit_kernels.layout import SLICES, Layout, pack
from lowbit_kernels.tuning import select
from lowbit_kernels.tuning.timing import copies_for, microseconds

# Largest relative error against float32 of the dequantized weight: two roundings to 16 bits (the scaled weight, y)
_TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
_REPEATS, _REPEATS_INTERPRETED = 5, 2


def candidates(layout: Layout | Int8Layout, rows: int, gpu: select.Gpu) -> Iterator[tuple[str, object]]:
    """(kernel, config) that may be the fastest for [rows, in_features], and that this triton compiles right."""
    return ((kernel, config) for kernel, config in _all(layout, rows, gpu) if select.refuse(config, gpu) is None)


def _all(layout: Layout | Int8Layout, rows: int, gpu: select.Gpu) -> Iterator[tuple[str, object]]:
    if isinstance(layout, Int8Layout):
        yield from _int8(layout, rows, gpu)
        return
    if rows <= 2 * select.SKINNY_ROWS:
        yield from _skinny(layout, rows, gpu)
    if rows > 8:
        yield from _gemm(layout, rows, gpu)
    if rows > select.SKINNY_ROWS and gpu.capability == (9, 0):
        for block_m in (size for size in (64, 128, 256) if size <= 2 * rows):
            for split in (1, 2, 4) if block_m < 256 else (1,):
                yield "hopper", gemm_hopper.Config(block_m, 3 if block_m == 256 else 4, split)
    if rows >= 256:
        yield from (("dense", select.Dense(chunk * 2**20)) for chunk in (8, 16, 32, 64))


def _skinny(layout: Layout, rows: int, gpu: select.Gpu) -> Iterator[tuple[str, object]]:
    block_m = max(launching.FEWEST_ROWS, 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64)
    long = launching.tiles_per_iteration(layout.tiles, most=skinny.long_tiles(layout.bits, block_m))
    blocks = ((32, 1), (64, 2), (64, 4), (128, 4))
    for (block_n, warps), tiles in product(blocks, sorted({skinny.default_tiles(layout), long})):
        if layout.padded_out % block_n:
            continue
        programs = layout.padded_out // block_n
        for split in (1, 2, 4, 8, 16):
            # fewer programs than processors leave some idle, many more only add partial sums
            if split > 1 and (programs * split > 16 * gpu.processors or split > layout.tiles // tiles):
                continue
            yield from (
                ("skinny", skinny.Config(block_n, block_m, split, tiles, warps, stages)) for stages in (2, 3, 4)
            )


def _gemm(layout: Layout, rows: int, gpu: select.Gpu) -> Iterator[tuple[str, object]]:
    blocks = ((64, 4), (128, 4), (128, 8)) if launching.most_warps(gpu.capability) >= 4 else ((32, 2), (64, 2))
    joined = [n for n in (1, 4) if n <= SLICES[layout.bits]]
    for block_m in (size for size in (16, 32, 64, 128, 256) if size <= max(16, 2 * rows)):
        for block_n, warps in blocks:
            if layout.padded_out % block_n or block_m * block_n > min(128 * 256, 4096 * warps):
                continue
            yield from (("gemm", gemm.Config(block_n, block_m, join, 8, warps, 3)) for join in joined)


def _int8(layout: Int8Layout, rows: int, gpu: select.Gpu) -> Iterator[tuple[str, object]]:
    most = max(16, 2 * rows)
    for block_m in (size for size in (8, 16, 32, 64, 128, 256) if launching.FEWEST_ROWS <= size <= most):
        for block_n, warps in ((64, 2), (64, 4), (128, 4), (128, 8), (256, 8)):
            if layout.padded_out % block_n or block_m * block_n > 4096 * warps:
                continue
            programs = layout.padded_out // block_n * -(-rows // block_m)
            for split in (1, 2, 4, 8):
                if split > 1 and (programs * split > 16 * gpu.processors or split > layout.tiles):
                    continue
                for tiles in (t for t in (1, 2) if layout.tiles % t == 0):
                    yield from (
                        ("int8", int8.Config(block_n, block_m, split, tiles, 8, warps, stages)) for stages in (3, 4)
                    )


def packed(weight: tuple[torch.Tensor, ...], layout: Layout | Int8Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` of `random_weight` as the kernels for `layout` read it."""
    if isinstance(layout, Int8Layout):
        codes, scales, _ = weight
        return int8_layout.pack(codes, scales, layout)
    return pack(*weight, layout.bits)


def seen(x: torch.Tensor, layout: Layout | Int8Layout) -> torch.Tensor:
    """x as the kernels for `layout` see it, float32: what is left of it in eight bits, or x."""
    if isinstance(layout, Int8Layout):
        codes, scales, _ = reference.quantize_rows(x)
        return codes.float() * scales[:, None]
    return x.float()


def random_weight(layout: Layout | Int8Layout, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None, for measuring."""
    rng = torch.Generator(device=device).manual_seed(seed)

    def integers(*shape):
        return torch.randint(2**layout.bits, shape, generator=rng, device=device, dtype=torch.uint8)

    codes = integers(layout.out_features, layout.in_features)
    shape = (layout.out_features, layout.groups)
    scales = (torch.rand(shape, generator=rng, device=device) * 0.02 + 0.005).to(layout.dtype)
    return codes, scales, None if layout.sym else integers(*shape)


def fastest(layout: Layout | Int8Layout, rows: int, device: torch.device) -> tuple[str, object, float, dict[str, str]]:
    """(kernel, config, microseconds, candidate -> why it was dropped). Raises RuntimeError if none is left."""
    gpu = select.gpu_of(device)
    weight = random_weight(layout, device)
    stored = packed(weight, layout)
    copies = copies_for(sum(part.nbytes for part in stored), device)
    weights = [stored, *(tuple(part.clone() for part in stored) for _ in range(copies - 1))]
    rng = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(rows, layout.in_features, generator=rng, device=device).to(layout.dtype)
    wanted = reference.linear(seen(x, layout), *weight, layout.bits)
    best, dropped = None, {}
    for kernel, config in candidates(layout, rows, gpu):
        choice = select.Choice(kernel, config, "candidate")
        try:
            if reason := _wrong(x, weights[0], layout, choice, wanted):
                dropped[f"{kernel} {config}"] = reason
                continue
            calls = [lambda pair=pair, choice=choice: ops.run(x, *pair, layout, None, choice) for pair in weights]
            us, _ = microseconds(calls, device)
        except Exception as error:  # of a compiler, or too much shared memory: this one is out
            dropped[f"{kernel} {config}"] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            continue
        if best is None or us < best[2]:
            best = kernel, config, us
    if best is None:
        raise RuntimeError(f"no kernel runs {select.key(layout, rows)} on {gpu.name}: {dropped}")
    return *best, dropped


def _wrong(x, weight, layout: Layout, choice: select.Choice, wanted: torch.Tensor) -> str | None:
    """What is wrong with the results of a candidate, or None."""
    first = ops.run(x, *weight, layout, None, choice)
    error = float((first.float() - wanted).norm() / wanted.norm())
    if not error <= _TOLERANCE[layout.dtype]:
        return f"relative error {error:.1e}, expected at most {_TOLERANCE[layout.dtype]:.0e}"
    for _ in range(_REPEATS if x.is_cuda else _REPEATS_INTERPRETED):
        if not torch.equal(ops.run(x, *weight, layout, None, choice), first):
            return "repeats differ"
    return None
