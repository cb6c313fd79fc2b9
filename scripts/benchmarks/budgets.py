"""A scheme for each part of a model, chosen by budget, beside one scheme for all, on the same text.

    python scripts/benchmarks/budgets.py                                               the embedded model
    python scripts/benchmarks/budgets.py --real DIR --calibration FILE --held-out FILE     another one, from local text

Each row of a budget says what the run predicted, and what its result came to: on tokens of the calibration text that
the run has not seen, which is what the prediction is about, and on held-out text of another kind. Of the schemes for
all, the best of at most the same bytes is what a budget is compared with. Rows are saved as they are made; --keep goes
on with those that a file has.
"""

import argparse
import json
import shutil
import time

import torch
from common import RESULTS, WORK, save

import lowbit
from lowbit.errors import InputError
from lowbit.folders.locate import resolve
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream
from lowbit.text.samples import calibration_samples

BITS = (3.5, 2.5, 3.001, 4.5)
UNIFORM = (
    "W3A16_ASYM-G64", "W2A16_ASYM-G64", "W2A16_ASYM-G32", "W4A16_ASYM-G64", "W3A16-G32", "W4A16-G64", "W3A16-G64",
    "W2A16_ASYM-G128", "W3A16-G128", "W3A16_ASYM-G128", "W4A16-G128", "W4A16_ASYM-G128",
)  # fmt: skip
SEQLEN = 512


class Text:
    """Windows of a text, and what the reference says of them."""

    def __init__(self, windows: torch.Tensor, reference):
        self.windows = windows
        self._expected = [self._log_probs(reference, ids) for ids in windows]

    @staticmethod
    @torch.inference_mode()
    def _log_probs(model, ids: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1)

    def divergence(self, model) -> float:
        """Mean KL(reference || model) in nats per token."""
        pairs = zip(self.windows, self._expected, strict=True)
        each = [(p.exp() * (p - self._log_probs(model, ids))).sum(-1).double() for ids, p in pairs]
        return float(torch.cat(each).mean())


def unseen(model: str, dataset: str, used: int, count: int, vocabulary: int) -> torch.Tensor:
    """Windows of a calibration text that runs with `used` samples do not calibrate with."""
    asked = {"seqlen": SEQLEN, "vocabulary": vocabulary, "context": None}
    draws = [(0, used), (0, 2 * min(used, 16)), (0, 3 * min(used, 16)), (1, 4 * count)]
    *seen, drawn = (
        calibration_samples(dataset, resolve(model), seed=seed, num_samples=number, **asked).input_ids
        for seed, number in draws
    )
    return drawn[~(drawn[:, None] == torch.cat(seen)[None]).all(-1).any(1)][:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="reference", help="a model folder")
    parser.add_argument("--calibration", default="stdlib-train", help="a data set or file to calibrate with")
    parser.add_argument("--held-out", default="stdlib", help="a data set or file to measure on")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--samples", type=int, default=32, help="samples to calibrate with")
    parser.add_argument("--windows", type=int, default=24, help="windows of each text to measure on")
    parser.add_argument("--uniform", type=int, default=len(UNIFORM), help="how many schemes for all to try")
    parser.add_argument("--name", default="budgets", help="results/NAME.json")
    parser.add_argument("--keep", action="store_true", help="keep the rows that results/NAME.json has")
    asked = parser.parse_args()
    reference = lowbit.load(asked.real, dtype="float32")
    held_out = token_stream(load_tokenizer(asked.real), asked.held_out, asked.windows * SEQLEN)
    same = Text(
        unseen(asked.real, asked.calibration, asked.samples, asked.windows, reference.config.vocab_size), reference
    )
    other = Text(held_out[: len(held_out) // SEQLEN * SEQLEN].view(-1, SEQLEN), reference)
    data = {"dataset": asked.calibration, "num_samples": asked.samples, "seqlen": SEQLEN}
    rows = json.loads((RESULTS / f"{asked.name}.json").read_text())["rows"] if asked.keep else []
    facts = {
        "model": asked.real, "held_out": asked.held_out, "calibration": data,
        "tokens": {"same_text": same.windows.numel(), "other_text": other.windows.numel()},
    }  # fmt: skip
    for method in asked.methods:
        for settings in (
            *({"bits": bits} for bits in BITS),
            *({"scheme": scheme} for scheme in UNIFORM[: asked.uniform]),
        ):
            if any({"method": method, **settings}.items() <= row.items() for row in rows):
                continue
            folder, started = WORK / asked.name, time.perf_counter()
            shutil.rmtree(folder, ignore_errors=True)
            with_data = data if method == "gptq" or "bits" in settings else {}
            report = lowbit.quantize(asked.real, folder, method=method, **settings, **with_data)
            seconds = time.perf_counter() - started
            model = lowbit.load(folder, dtype="float32")
            rows.append({
                "method": method, **settings, "bits_per_weight": report.bits_per_weight, "bytes": report.output_bytes,
                "predicted_kl": report.allocation and report.allocation["predicted_kl"],
                "kl_same_text": same.divergence(model), "kl_other_text": other.divergence(model), "seconds": seconds,
            })  # fmt: skip
            save(asked.name, {**facts, "rows": rows})
    shutil.rmtree(WORK / asked.name, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
