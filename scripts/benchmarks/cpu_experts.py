"""Experts on this CPU, in the shapes of Mixtral, Qwen3-MoE and gpt-oss, with a part of their experts or width.

    python scripts/benchmarks/cpu_experts.py [--scheme W4A16-G32] [--rounds 7] [--save]

One layer's gate_up and down of the experts that tokens are routed to, at random. "rounded" and "exact": the kernels, on
packed weights; "dequantized": the matrix of each expert that has tokens is made dense in bf16 first, as where there is
no backend for experts. Variants take turns; the median counts. GB/s are of the packed weights of experts with tokens.
"""

import argparse
import statistics
import time
from collections import defaultdict
from itertools import pairwise

import torch
from common import read_bandwidth, save

from lowbit.backends import native
from lowbit.layers.experts import stacked
from lowbit.native.build import library
from lowbit.numerics.grid import dequantize, quantize_nearest
from lowbit.numerics.scheme import Scheme

# name -> (hidden size, width of an expert, experts, experts for each token)
SHAPES = {
    "mixtral, a quarter of its width": (4096, 3584, 8, 2),
    "qwen3-moe, a quarter of its experts": (2048, 768, 32, 8),
    "gpt-oss, a quarter of its experts": (2880, 2880, 8, 4),
}
TOKENS = (1, 16, 512)


def dequantized(x, buffers, start, scheme: Scheme, shape) -> torch.Tensor:
    y = x.new_zeros(len(x), shape[1])
    for expert, (first, last) in enumerate(pairwise(start.tolist())):
        if first < last:
            one = native.restore({name: tensor[expert] for name, tensor in buffers.items()}, scheme, shape[1:])
            y[first:last] = torch.nn.functional.linear(x[first:last], dequantize(one, x.dtype))
    return y


VARIANTS = {"rounded": native.experts_rounded, "exact": native.experts, "dequantized": dequantized}


def weights(scheme: Scheme, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    one = (0.02 * torch.randn(shape[1:], dtype=torch.bfloat16) for _ in range(shape[0]))
    return stacked((native.prepare(quantize_nearest(each, scheme)) for each in one), shape[0])


def measure(name: str, scheme: Scheme, rounds: int, busy: bool) -> list[dict]:
    """busy: the least processor time counts, not the median of the clock's."""
    clock, typical = (time.process_time, min) if busy else (time.perf_counter, statistics.median)
    hidden, width, experts, each_token = SHAPES[name]
    shapes = {"gate_up": (experts, 2 * width, hidden), "down": (experts, hidden, width)}
    packed = {part: weights(scheme.fitted(shape[2]), shape) for part, shape in shapes.items()}
    rows = []
    for tokens in TOKENS:
        chosen = torch.stack([torch.randperm(experts)[:each_token] for _ in range(tokens)]).flatten()
        start = torch.searchsorted(chosen.sort()[0], torch.arange(experts + 1), out_int32=True)
        used = int((start.diff() > 0).sum())
        inputs = {part: torch.randn(len(chosen), shape[2], dtype=torch.bfloat16) for part, shape in shapes.items()}
        seconds = defaultdict(list)
        for _ in range(rounds + 1):  # the first one warms up
            for variant, run in VARIANTS.items():
                started = clock()
                for part, shape in shapes.items():
                    run(inputs[part], packed[part], start, scheme.fitted(shape[2]), shape)
                seconds[variant].append(clock() - started)
        read = sum(t.nbytes for buffers in packed.values() for t in buffers.values()) * used / experts
        operations = sum(2 * len(chosen) * shape[1] * shape[2] for shape in shapes.values())
        for variant, taken in seconds.items():
            median = typical(taken[1:])
            rows.append({
                "shapes": name, "tokens": tokens, "experts": experts, "used": used, "variant": variant,
                "ms": median * 1e3, "gb_per_s": read / median / 1e9,
                "gop_per_s_per_core": operations / median / 1e9 / torch.get_num_threads(),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", type=Scheme.parse, default=Scheme(4, 32))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--busy", action="store_true", help="the least processor time counts, where there is other work"
    )
    parser.add_argument("--save", action="store_true", help="write results/cpu_experts.json")
    options = parser.parse_args()
    asked = options.scheme, options.rounds, options.busy
    rows = [row for name in SHAPES for row in measure(name, *asked)]
    if options.save:
        how = {"scheme": options.scheme.name, "rounds": options.rounds, "busy": options.busy}
        save("cpu_experts", {**how, "instructions": library().level, "read_gb_per_s": read_bandwidth(), "rows": rows})


if __name__ == "__main__":
    main()
