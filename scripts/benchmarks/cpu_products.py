"""Products of the C kernels on the shapes of Llama-3.2-1B, for each way to compute them, variants in turn.

    LOWBIT_CPU_LEVEL=all OMP_NUM_THREADS=2 python scripts/benchmarks/cpu_products.py --levels avx512bf16 avx2

Variants: "exact16", inputs as 16-bit integers, what backends run for few rows; "dense", a dequantized copy and torch's
GEMM, what they run for many floats on AVX2; "int8" and "bf16" of lowbit.native.gemm; torch's bf16 product of the dense
weight. Shows 10^9 operations a second and core, two for each weight and row, and GB/s of packed weights read. A round
runs every variant once, on another copy of the weight, so that none is in a cache and noise meets all of them; the
median counts. The bandwidth of reading memory is measured in the same rounds.
"""

import argparse
import platform
import statistics
import time
from collections import defaultdict
from functools import partial

import torch
from common import read_bandwidth, save

from lowbit.backends import native
from lowbit.native import gemm, linear
from lowbit.native.build import library
from lowbit.numerics import dense
from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.scheme import Scheme

# of Llama-3.2-1B: [out_features, in_features] as they are fused
SHAPES = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
CACHE_BYTES = 2**28  # of weights that are gone through before one is read again


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--levels", nargs="+", default=None, help="of lowbit doctor; all but portable by default")
    parser.add_argument("--scheme", default="W4A16-G128")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--busy", action="store_true", help="the least processor time counts, where there is other work"
    )
    parser.add_argument("--save", nargs="?", const="cpu_products", metavar="NAME", help="write results/NAME.json")
    return parser.parse_args()


def on_level(level: str, call, *operands) -> torch.Tensor:
    library().use(level)
    return call(*operands)


def exact16(x: torch.Tensor, weight, scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    y = x.new_empty(len(x), shape[0])
    stored = weight["codes"], weight["scales"], weight.get("zeros"), scheme, shape
    linear.product(linear.weight_of_tensors(*stored), x, y, None, linear.PIECES[x.dtype])()
    return y


def dequantized(x: torch.Tensor, weight, scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    stored = weight["codes"], weight["scales"], weight.get("zeros"), scheme, shape
    blocks = linear.dense_blocks(linear.weight_of_tensors(*stored), dense.gemm_dtype(x.dtype))
    return dense.product(x, blocks, shape[0], None)


def tiled(x: torch.Tensor, weight, scheme: Scheme, shape: tuple[int, int], arithmetic: str) -> torch.Tensor:
    stored = weight["codes"], weight["scales"], weight.get("zeros")
    return torch.ops.lowbit.gemm_native(x, *stored, None, scheme.name, shape[0], arithmetic)


def variants(levels: list[str]) -> dict[tuple[str, str], object]:
    """(variant, level) -> function of (x, packed weight, scheme, shape)."""
    calls = {"exact16": exact16, **{name: partial(tiled, arithmetic=name) for name in gemm.ARITHMETICS}}
    made = {(name, level): partial(on_level, level, call) for level in levels for name, call in calls.items()}
    return made | {("dense", "torch"): dequantized}


def measure(
    shape: tuple[int, int], rows: int, scheme: Scheme, levels: list[str], rounds: int, busy: bool = False
) -> list[dict]:
    """A row of the table for each variant. busy: the least processor time counts, not the median of the clock's."""
    clock, typical = (time.process_time, min) if busy else (time.perf_counter, statistics.median)
    plain = 0.02 * torch.randn(shape, dtype=torch.bfloat16)
    packed = native.prepare(quantize_nearest(plain, scheme))
    weight_bytes = sum(tensor.nbytes for tensor in packed.values())
    copies = [
        {name: tensor.clone() for name, tensor in packed.items()} for _ in range(max(2, CACHE_BYTES // weight_bytes))
    ]
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
    seconds, bandwidths = defaultdict(list), []
    calls = variants(levels)
    for count in range(rounds + 1):  # the first one warms up
        bandwidths.append(read_bandwidth())
        for number, (name, call) in enumerate(calls.items()):
            weight = copies[(count * len(calls) + number) % len(copies)]
            seconds[name].append(_seconds(clock, call, x, weight, scheme, shape))
        seconds["bf16", "torch linear"].append(_seconds(clock, torch.nn.functional.linear, x, plain))
    operations = 2 * rows * shape[0] * shape[1] / torch.get_num_threads()
    table = []
    for (name, level), taken in seconds.items():
        median = typical(taken[1:])
        read = plain.nbytes if level == "torch linear" else weight_bytes
        table.append({
            "shape": list(shape), "rows": rows, "variant": name, "level": level, "ms": round(median * 1e3, 3),
            "gop_per_s_per_core": round(operations / median / 1e9, 1), "gb_per_s": round(read / median / 1e9, 2),
            "read_gb_per_s": round(statistics.median(bandwidths[1:]), 2),
        })  # fmt: skip
    return table


def _seconds(clock, call, *operands) -> float:
    started = clock()
    call(*operands)
    return clock() - started


def main():
    options = arguments()
    levels, scheme = options.levels or list(library().levels[:-1]), Scheme.parse(options.scheme)
    print(f"{'shape':>14} {'rows':>5} {'variant':>8} {'level':>12} {'ms':>9} {'Gop/s/core':>11} {'GB/s':>6}  of")
    table = []
    for name in options.shapes:
        for rows in options.rows:
            for row in measure(SHAPES[name], rows, scheme, levels, options.rounds, options.busy):
                table.append(row)
                print(
                    f"{'x'.join(map(str, row['shape'])):>14} {rows:>5} {row['variant']:>8} {row['level']:>12} "
                    f"{row['ms']:>9} {row['gop_per_s_per_core']:>11} {row['gb_per_s']:>6}  {row['read_gb_per_s']}",
                    flush=True,
                )
    if options.save:
        machine = {"threads": torch.get_num_threads(), "machine": platform.machine(), "levels": list(library().levels)}
        save(
            options.save,
            {"scheme": scheme.name, "rounds": options.rounds, "busy": options.busy, **machine, "rows": table},
        )


if __name__ == "__main__":
    main()
