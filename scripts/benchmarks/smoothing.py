"""What smoothing does to quality: the embedded model with and without, for each method, on held-out text.

python scripts/benchmarks/smoothing.py
"""

import itertools
import shutil

from common import WORK, save

import lowbit
from lowbit.eval import evaluate
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream

SCHEMES = ("W4A16-G128", "W3A16-G64")
METHODS = ("rtn", "gptq")
SMOOTH = (None, "auto")
CALIBRATION = {"dataset": "stdlib-train", "num_samples": 32, "seqlen": 512}
TOKENS, SEQLEN = 16_384, 512


def main():
    stream = token_stream(load_tokenizer("reference"), "stdlib", TOKENS)
    reference = lowbit.load("reference", dtype="float32")
    rows = []
    for scheme, method, smooth in itertools.product(SCHEMES, METHODS, SMOOTH):
        folder = WORK / "smoothing" / f"{scheme}-{method}-{smooth}"
        lowbit.quantize("reference", folder, scheme=scheme, method=method, smooth=smooth, overwrite=True, **CALIBRATION)
        dense = lowbit.load(folder, dtype="float32").dequantize()
        quality = evaluate(dense, stream, reference=reference, seqlen=SEQLEN)
        rows.append({"scheme": scheme, "method": method, "smooth": smooth, **quality.to_dict()})
        print(scheme, method, smooth, f"{quality.perplexity:.3f} {quality.kl_mean:.5f}", flush=True)
        # after each, so that a run that is stopped leaves what it has
        save("smoothing", {"model": "reference", "dataset": "stdlib", "calibration": CALIBRATION, "rows": rows})
    shutil.rmtree(WORK / "smoothing")


if __name__ == "__main__":
    main()
