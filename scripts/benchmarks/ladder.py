"""The ladder of post-training quantization: bytes and quality of the embedded model on each rung.

    python scripts/benchmarks/ladder.py

Half precision computes in its own dtype, all else in float32 like the original: what differs is the integers then. The
text is the held-out modules of the standard library of the Python that runs this.
"""

import shutil
from operator import itemgetter
from pathlib import Path

from common import WORK, save

import lowbit
from lowbit.bench.bytes_moved import model_bytes
from lowbit.eval import evaluate
from lowbit.folders.stored import summarize
from lowbit.generation.stream import load_tokenizer
from lowbit.numerics.scheme import ACTIVATION_RANGES
from lowbit.text.datasets import token_stream

MSE, GPTQ = {"options": {"scale_search": "mse"}}, {"method": "gptq"}
# rung, scheme, what else `quantize` is told
RUNGS = (
    ("full precision", "FP32", {}),
    ("half precision", "BF16", {}),
    ("half precision", "FP16", {}),
    ("weight-only", "W8A16-G128", {}),
    *(("weight-only", scheme, how)
      for scheme in ("W4A16-G128", "W3A16-G64", "W2A16_ASYM-G32") for how in (MSE, GPTQ)),
    ("dynamic range", "W8A8-CHANNEL", {}),
    *(("dynamic range", "W4A8-G128", how) for how in (MSE, GPTQ)),
    *(("full integer", "W8A8-CHANNEL-STATIC", {"activation_range": found}) for found in ACTIVATION_RANGES),
)  # fmt: skip
COMPUTES_IN = {"BF16": "bfloat16", "FP16": "float16"}
CALIBRATION = {"dataset": "stdlib-train", "num_samples": 32, "seqlen": 512}
TOKENS, SEQLEN = 16_384, 512


def make(scheme: str, settings: dict, folder: Path) -> None:
    """The model on a rung; a run that was stopped has left some."""
    if folder.exists():
        return
    if scheme == "FP32":
        lowbit.load("reference", dtype="float32").save_pretrained(folder)
    elif scheme in COMPUTES_IN:
        lowbit.convert_dtype("reference", folder, scheme)
    else:
        lowbit.quantize("reference", folder, scheme=scheme, **settings, **CALIBRATION)


def main():
    stream = token_stream(load_tokenizer("reference"), "stdlib", TOKENS)
    reference = lowbit.load("reference", dtype="float32")
    rows = []
    for number, (rung, scheme, settings) in enumerate(RUNGS):
        folder = WORK / "ladder" / f"{number}-{scheme}"
        make(scheme, settings, folder)
        model = lowbit.load(folder, dtype=COMPUTES_IN.get(scheme, "float32"))
        quality = evaluate(model, stream, reference=reference, seqlen=SEQLEN)
        rows.append({
            "rung": rung, "scheme": scheme, "settings": settings,
            "bits_per_weight": max(summarize(folder)["parts"], key=itemgetter("parameters"))["bits_per_weight"],
            "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "memory_bytes": model_bytes(lowbit.load(folder)), **quality.to_dict(),
        })  # fmt: skip
        print(scheme, settings, f"{quality.perplexity:.3f} {quality.kl_mean:.5f}", flush=True)
    shutil.rmtree(WORK / "ladder")
    save("ladder", {"model": "reference", "dataset": "stdlib", "calibration": CALIBRATION, "rows": rows})


if __name__ == "__main__":
    main()
