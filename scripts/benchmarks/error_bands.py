"""How the relative error of the linears becomes KL divergence: what the bands of `lowbit report` are derived from.

    python scripts/benchmarks/error_bands.py

Quantizes the embedded model from 2 to 8 bits, with and without data, and measures each result on held-out text.
"""

import itertools
import shutil

from common import WORK, save

import lowbit
from lowbit.calibration.data import token_stream
from lowbit.eval import evaluate
from lowbit.generation.stream import load_tokenizer

SCHEMES = ("W4A16_ASYM-G128", "W3A16-G128", "W2A16_ASYM-G32", "W8A16-G128")
METHODS = {"rtn": {}, "gptq": {"dataset": "stdlib-train", "num_samples": 16, "seqlen": 256}}
TOKENS, SEQLEN = 4_096, 512


def root_mean_square(values) -> float:
    values = list(values)
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def main():
    stream = token_stream(load_tokenizer("reference"), "stdlib", TOKENS)
    reference = lowbit.load("reference", dtype="float32")
    rows = []
    for scheme, (method, options) in itertools.product(SCHEMES, METHODS.items()):
        folder = WORK / "error_bands" / f"{scheme}-{method}"
        report = lowbit.quantize("reference", folder, scheme=scheme, method=method, overwrite=True, **options)
        key = "output_error" if options else "error"
        error = root_mean_square(layer[key] for layer in report.layers)
        dense = lowbit.load(folder, dtype="float32").dequantize()
        quality = evaluate(dense, stream, reference=reference, seqlen=SEQLEN)
        rows.append({"method": method, "scheme": scheme, "kind_of_error": key, "error": error, **quality.to_dict()})
        # after each, so that a run that is stopped leaves what it has
        save("error_bands", {"model": "reference", "dataset": "stdlib", "calibration": METHODS["gptq"], "rows": rows})
    shutil.rmtree(WORK / "error_bands")


if __name__ == "__main__":
    main()
