"""One 4096 x 4096 linear on the CPU over batch sizes: C kernels, those of torch, a dense copy and its GEMM, and bf16.

    python scripts/benchmarks/cpu_linear.py

Shows from how many rows on the dense copy wins, which is what the crossovers of the backends `native` and `torch_cpu`
are set by. Each time is a median over eight different weights, so that none of them is in a cache.
"""

from unittest.mock import patch

import torch
from common import save, timed

from lowbit.backends import native, torch_cpu
from lowbit.native import operators as native_linear
from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.scheme import Scheme

SIZE, COPIES = 4096, 8
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 512)
SCHEMES = (Scheme(2, 128), Scheme(4, 128), Scheme(4, 32, False), Scheme(8, 128), Scheme(8, -1))
NEVER = 10**9


def milliseconds(function, weights) -> float:
    return timed(lambda: [function(weight) for weight in weights], 1) / len(weights) * 1e3


def paths():
    """(name, backend, what has it make a dense copy always, or never)"""
    for kind, crossover in (("packed", NEVER), ("dense", 0)):
        chosen = patch.object(native_linear, "dense_is_faster", lambda x, crossover=crossover: len(x) > crossover)
        yield f"native_{kind}_ms", native, chosen
        chosen = patch.multiple(torch_cpu, _CROSSOVER_FP32=crossover, _CROSSOVER_BF16=crossover)
        yield f"torch_{kind}_ms", torch_cpu, chosen


def main():
    dense = [torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(COPIES)]
    rows = [{"rows": count} for count in ROWS]
    for row in rows:
        x = torch.randn(row["rows"], SIZE, dtype=torch.bfloat16)
        row["bf16_ms"] = milliseconds(lambda w, x=x: torch.nn.functional.linear(x, w), dense)
    for scheme in SCHEMES:
        quantized = [quantize_nearest(weight, scheme) for weight in dense]
        for name, backend, chosen in paths():
            if backend.refuse(scheme, torch.device("cpu"), torch.bfloat16, (SIZE, SIZE)):
                continue
            weights = [backend.prepare(qweight) for qweight in quantized]
            with chosen:
                for row in rows:
                    x = torch.randn(row["rows"], SIZE, dtype=torch.bfloat16)
                    row[f"{scheme.name}_{name}"] = milliseconds(
                        lambda b, x=x, run=backend.linear, scheme=scheme: run(x, b, scheme, (SIZE, SIZE)), weights
                    )
        print(scheme.name, *(f"{row['rows']}: {row}" for row in rows), sep="\n", flush=True)
    save("cpu_linear", {"shape": [SIZE, SIZE], "rows": rows})


if __name__ == "__main__":
    main()
