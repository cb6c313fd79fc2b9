"""One 4096 x 4096 linear on the CPU over batch sizes: torch's packed kernels, dequantize + GEMM, and dense bf16.

    python scripts/benchmarks/cpu_linear.py

Shows from how many rows on the dense path wins, which is what the crossover in lowbit/backends/torch_cpu.py is set by.
Each time is a median over eight different weights, so that none of them is in a cache.
"""

import torch
from common import save, timed

from lowbit.backends import torch_cpu
from lowbit.grid import quantize_nearest
from lowbit.scheme import Scheme

SIZE, COPIES = 4096, 8
ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512)
SCHEMES = (Scheme(4, 128), Scheme(8, -1), Scheme(8, 128))


def milliseconds(function, weights) -> float:
    return timed(lambda: [function(weight) for weight in weights], 1) / len(weights) * 1e3


def main():
    dense = [torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(COPIES)]
    prepared = {scheme: [torch_cpu.prepare(quantize_nearest(weight, scheme)) for weight in dense] for scheme in SCHEMES}
    rows = []
    for count in ROWS:
        x = torch.randn(count, SIZE, dtype=torch.bfloat16)
        row = {"rows": count, "bf16_ms": milliseconds(lambda w, x=x: torch.nn.functional.linear(x, w), dense)}
        for scheme, weights in prepared.items():
            for name, path in (("packed", torch_cpu._packed), ("dense", torch_cpu._dense)):
                row[f"{scheme.name}_{name}_ms"] = milliseconds(
                    lambda b, x=x, path=path, scheme=scheme: path(x, b, scheme, (SIZE, SIZE)), weights
                )
        print(row, flush=True)
        rows.append(row)
    save("cpu_linear", {"shape": [SIZE, SIZE], "rows": rows})


if __name__ == "__main__":
    main()
