"""How the relative errors of linears become KL divergence: what the bands of `lowbit report` are derived from.

    python scripts/benchmarks/error_bands.py [--real DIR]

Quantizes the embedded model, and with --real the models that ../shared/models/make_real.py wrote to DIR, to 4, 3 and 2
bits, with and without data, and measures each result on held-out text. Of each run the JSON has the errors that a
report knows, as root mean square over the weights, beside the divergence; and of the runs with data to 4 bits what the
divergence was after following the first three pieces of advice of the report's page.
"""

import argparse
import itertools
import shlex
import shutil
from pathlib import Path

from common import WORK, save

import lowbit
from lowbit.eval.compare import evaluate, starts_with_bos
from lowbit.generation.stream import load_tokenizer
from lowbit.report_page.advice import advice_by_kind
from lowbit.report_page.facts import Facts
from lowbit.text.datasets import token_stream

SCHEMES = ("W4A16_ASYM-G128", "W3A16-G128", "W2A16_ASYM-G32")
METHODS = ("rtn", "gptq")
SAMPLES, CALIBRATION_SEQLEN, TOKENS, SEQLEN = 16, 256, 2_048, 512
ERRORS = ("error", "output_error", "output_error_to_original", "rounding_error")
FOLLOWED = 3


def root_mean_square(values) -> float:
    values = list(values)
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def first_advice(report: dict) -> dict[str, str]:
    """Overrides: what the page of a report says is to be tried first."""
    return dict(shlex.split(step.options)[1].rsplit("=", 1) for step in advice_by_kind(Facts(report))[:FOLLOWED])


class Measured:
    """A model, and what quantizing it does to held-out text."""

    def __init__(self, name: str, model: str | Path, calibration: str, held_out: str):
        tokenizer = load_tokenizer(model)
        self.name, self.model = name, model
        self.data = {"dataset": calibration, "num_samples": SAMPLES, "seqlen": CALIBRATION_SEQLEN}
        self.stream = token_stream(tokenizer, held_out, TOKENS)
        self.bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
        self.reference = lowbit.load(model, dtype="float32")

    def row(self, scheme: str, method: str, **options) -> tuple[dict, dict]:
        folder = WORK / "error_bands" / self.name
        data = self.data if method == "gptq" else {}
        report = lowbit.quantize(self.model, folder, scheme=scheme, method=method, overwrite=True, **data, **options)
        dense = lowbit.load(folder, dtype="float32").dequantize()
        quality = evaluate(dense, self.stream, reference=self.reference, seqlen=SEQLEN, bos=self.bos)
        errors = {
            key: root_mean_square(layer[key] for layer in report.layers) for key in ERRORS if key in report.layers[0]
        }
        row = {"model": self.name, "modules": len(report.layers), "method": method, "scheme": scheme, **errors}
        return {**row, **quality.to_dict()}, report.to_dict()

    def rows(self):
        for scheme, method in itertools.product(SCHEMES, METHODS):
            row, report = self.row(scheme, method)
            if (scheme, method) == (SCHEMES[0], "gptq"):
                row["advice"] = first_advice(report)
                row["kl_mean_followed"] = self.row(scheme, method, overrides=row["advice"])[0]["kl_mean"]
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
        for row in Measured(name, *where).rows():
            rows.append(row)
            slopes = {key: row["kl_mean"] / row[key] ** 2 / row["modules"] for key in ERRORS if key in row}
            print(name, row["scheme"], row["method"], f"KL {row['kl_mean']:.4f}", slopes, flush=True)
            # after each, so that a run that is stopped leaves what it has
            save("error_bands", {"samples": SAMPLES, "seqlen": CALIBRATION_SEQLEN, "rows": rows})
    shutil.rmtree(WORK / "error_bands")


if __name__ == "__main__":
    main()
