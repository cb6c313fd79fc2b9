"""One 4096 x 4096 linear on the CPU with integer activations beside the dense one it stands for.

    python scripts/benchmarks/int8_linear.py

The dense linear multiplies in bfloat16, as a model in that dtype does, and in float32. Quantizing the inputs is part of
the time of the others, which run on the C kernels and, as where there is no C compiler, on the float32 GEMM. Each time
is a median over two different weights.
"""

import torch
from common import save, timed

from lowbit.backends import int8_cpu, native
from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.scheme import Scheme

SIZE, COPIES = 4096, 2
ROWS = (1, 16, 256, 2048)
SCHEMES = tuple(map(Scheme.parse, ("W8A8", "W4A8")))
BACKENDS = {"native": native, "int8_cpu": int8_cpu}


def milliseconds(function, weights) -> float:
    return timed(lambda: [function(weight) for weight in weights], 1) / len(weights) * 1e3


def main():
    dense = [0.02 * torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(COPIES)]
    wide = [weight.float() for weight in dense]
    weights = {}
    for scheme in SCHEMES:
        quantized = [quantize_nearest(weight, scheme.weight_only).with_inputs(scheme) for weight in dense]
        for name, backend in BACKENDS.items():
            weights[scheme, name] = [backend.prepare(qweight) for qweight in quantized]
    rows = []
    for count in ROWS:
        x = torch.randn(count, SIZE, dtype=torch.bfloat16)
        x32 = x.float()
        row = {
            "rows": count,
            "bf16_ms": milliseconds(lambda w, x=x: torch.nn.functional.linear(x, w), dense),
            "fp32_ms": milliseconds(lambda w, x=x32: torch.nn.functional.linear(x, w), wide),
        }
        for (scheme, name), buffers in weights.items():
            row[f"{scheme.name}_{name}_ms"] = milliseconds(
                lambda b, x=x, scheme=scheme, run=BACKENDS[name].linear: run(x, b, scheme, (SIZE, SIZE)), buffers
            )
        print(row, flush=True)
        rows.append(row)
    save("int8_linear", {"shape": [SIZE, SIZE], "rows": rows})


if __name__ == "__main__":
    main()
