"""A scheme for each part of a model, chosen by budget, beside one scheme for all, on the same held-out text.

    python scripts/benchmarks/budgets.py                                               the embedded model
    python scripts/benchmarks/budgets.py --real DIR --calibration FILE --held-out FILE     another one, from local text

Each row of a budget says what the run predicted, and what it came to. Of the schemes for all, the best of at most the
same bits is what a budget is compared with.
"""

import argparse
import shutil
import time

from common import WORK, save

import lowbit
from lowbit.errors import InputError
from lowbit.eval import evaluate
from lowbit.eval.compare import starts_with_bos
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream

BITS = (2.5, 3.001, 3.5, 4.5)
UNIFORM = (
    "W2A16_ASYM-G128", "W2A16_ASYM-G64", "W2A16_ASYM-G32", "W3A16-G128", "W3A16_ASYM-G128", "W3A16-G64",
    "W3A16_ASYM-G64", "W3A16-G32", "W4A16-G128", "W4A16_ASYM-G128", "W4A16-G64", "W4A16_ASYM-G64",
)  # fmt: skip
TOKENS, SEQLEN = 16_384, 512


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="reference", help="a model folder")
    parser.add_argument("--calibration", default="stdlib-train", help="a data set or file to calibrate with")
    parser.add_argument("--held-out", default="stdlib", help="a data set or file to measure on")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--name", default="budgets", help="results/NAME.json")
    asked = parser.parse_args()
    tokenizer = load_tokenizer(asked.real)
    stream = token_stream(tokenizer, asked.held_out, TOKENS)
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    reference, rows = lowbit.load(asked.real, dtype="float32"), []
    data = {"dataset": asked.calibration, "num_samples": 32, "seqlen": SEQLEN}
    for method in asked.methods:
        for settings in (*({"bits": bits} for bits in BITS), *({"scheme": scheme} for scheme in UNIFORM)):
            folder, started = WORK / "budgets", time.perf_counter()
            shutil.rmtree(folder, ignore_errors=True)
            with_data = data if method == "gptq" or "bits" in settings else {}
            report = lowbit.quantize(asked.real, folder, method=method, **settings, **with_data)
            seconds = time.perf_counter() - started
            model = lowbit.load(folder, dtype="float32")
            quality = evaluate(model, stream, reference=reference, seqlen=SEQLEN, bos=bos)
            rows.append({
                "method": method, **settings, "bits_per_weight": report.bits_per_weight, "bytes": report.output_bytes,
                "predicted_kl": report.allocation and report.allocation["predicted_kl"], "seconds": seconds,
                **quality.to_dict(),
            })  # fmt: skip
            print(rows[-1], flush=True)
    shutil.rmtree(WORK / "budgets")
    save(asked.name, {"model": asked.real, "dataset": asked.held_out, "calibration": data, "rows": rows})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
