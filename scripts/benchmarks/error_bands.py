"""How the relative error of the linears becomes KL divergence: what the bands of `lowbit report` are derived from.

    python scripts/benchmarks/error_bands.py [--real DIR]

Quantizes the embedded model, and with --real the models that ../shared/models/make_real.py wrote to DIR, from 2 to 8
bits, with and without data, and measures each result on held-out text. Of each run the JSON has every error that a
report knows, as root mean square over the weights, beside the divergence.
"""

import argparse
import itertools
import shutil
from pathlib import Path

from common import WORK, save

import lowbit
from lowbit.calibration.data import token_stream
from lowbit.eval import evaluate
from lowbit.generation.stream import load_tokenizer

SCHEMES = ("W4A16_ASYM-G128", "W3A16-G128", "W2A16_ASYM-G32", "W8A16-G128")
METHODS = ("rtn", "gptq")
SAMPLES, CALIBRATION_SEQLEN, TOKENS, SEQLEN = 16, 256, 4_096, 512
# Of an entry of a report with data -> what it is judged by
ERRORS = {
    "error": lambda entry: entry["error"],
    "output_error": lambda entry: entry["output_error"],
    "output_error_to_original": lambda entry: entry["output_error_to_original"],
    "rounding_error": lambda entry: list(entry["objective"].values())[-1] ** 0.5,
}


def root_mean_square(values) -> float:
    values = list(values)
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def errors(layers: list[dict], method: str) -> dict[str, float]:
    kinds = ERRORS if method == "gptq" else {"error": ERRORS["error"]}
    return {name: root_mean_square(error(layer) for layer in layers) for name, error in kinds.items()}


def rows_of(name: str, model: str | Path, calibration: str, held_out: str):
    stream = token_stream(load_tokenizer(model), held_out, TOKENS)
    reference = lowbit.load(model, dtype="float32")
    for scheme, method in itertools.product(SCHEMES, METHODS):
        folder = WORK / "error_bands" / f"{name}-{scheme}-{method}"
        data = {"dataset": calibration, "num_samples": SAMPLES, "seqlen": CALIBRATION_SEQLEN}
        report = lowbit.quantize(
            model, folder, scheme=scheme, method=method, overwrite=True, **(data if method == "gptq" else {})
        )
        dense = lowbit.load(folder, dtype="float32").dequantize()
        quality = evaluate(dense, stream, reference=reference, seqlen=SEQLEN)
        row = {"model": name, "method": method, "scheme": scheme, **errors(report.layers, method), **quality.to_dict()}
        print({key: value for key, value in row.items() if not isinstance(value, dict | list)}, flush=True)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, metavar="DIR", help="what make_real.py wrote")
    real = parser.parse_args().real
    models = {"reference": ("reference", "stdlib-train", "stdlib")}
    if real is not None:
        texts = [str(real / name) for name in ("calibration.txt", "held_out.txt")]
        models |= {folder.name: (folder, *texts) for folder in sorted(real.iterdir()) if folder.is_dir()}
    rows = []
    for name, where in models.items():
        for row in rows_of(name, *where):
            rows.append(row)
            # after each, so that a run that is stopped leaves what it has
            save("error_bands", {"samples": SAMPLES, "seqlen": CALIBRATION_SEQLEN, "rows": rows})
    shutil.rmtree(WORK / "error_bands")


if __name__ == "__main__":
    main()
