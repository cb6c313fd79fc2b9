"""Quality ladder of the embedded model: bytes, perplexity and KL divergence of each scheme, on held-out text.

    python scripts/benchmarks/quality.py

The text is the held-out modules of the standard library of the Python that runs this (the model never saw them).
"""

import shutil

from common import WORK, save

import lowbit
from lowbit.eval import evaluate
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream

SCHEMES = ("W8A16-G128", "W4A16-G128", "W4A16_ASYM-G128", "W4A16-G32", "W4A16-CHANNEL", "W3A16-G64", "W3A16_ASYM-G32",
           "W2A16_ASYM-G32", "W2A16_ASYM-G16")  # fmt: skip
TOKENS, SEQLEN = 16_384, 512


def main():
    stream = token_stream(load_tokenizer("reference"), "stdlib", TOKENS)
    reference = lowbit.load("reference", dtype="float32")
    rows = []
    for scheme in SCHEMES:
        for search in ("minmax", "mse"):
            folder = WORK / "quality" / f"{scheme}-{search}"
            report = lowbit.quantize(
                "reference", folder, scheme=scheme, options={"scale_search": search}, overwrite=True
            )
            # in float32 both sides compute alike, so that the difference is that of the weights
            quality = evaluate(lowbit.load(folder, dtype="float32"), stream, reference=reference, seqlen=SEQLEN)
            rows.append({"scheme": scheme, "scale_search": search, "bytes": report.output_bytes,
                         "bits_per_weight": report.bits_per_weight, **quality.to_dict()})  # fmt: skip
            print(scheme, search, f"{quality.perplexity:.3f} {quality.kl_mean:.5f}", flush=True)
    shutil.rmtree(WORK / "quality")
    save("quality", {"model": "reference", "dataset": "stdlib", "source_bytes": report.source_bytes, "rows": rows})


if __name__ == "__main__":
    main()
