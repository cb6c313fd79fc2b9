"""Tokens per second on each rung of the ladder: decoder layers in the shapes of Llama-3.2-1B, on this CPU.

    python scripts/benchmarks/ladder_speed.py

Random weights behind a small vocabulary: the output embedding, which every rung leaves alone, takes no part. Batch 1:
decoding after a short prompt, and reading one of 256 tokens. All rungs are in memory and take turns; the fastest of the
rounds counts, the one that least else ran beside.
"""

import statistics
from collections import defaultdict

import torch
from common import save

from lowbit.bench.bytes_moved import model_bytes
from lowbit.bench.loops import lowbit_loop, prompts
from lowbit.bench.random_model import dense_model, quantized_model
from lowbit.bench.shapes import config_of
from lowbit.numerics.scheme import Scheme

SHAPES, LAYERS, VOCABULARY = "llama-3.2-1b", 2, 1024
DENSE = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16}
QUANTIZED = ("W8A16-G128", "W4A16-G128", "W3A16-G64", "W2A16_ASYM-G32", "W8A8-CHANNEL", "W4A8-G128",
             "W8A8-CHANNEL-STATIC")  # fmt: skip
SHORT, NEW, LONG = 8, 13, 256
ROUNDS = 5


def models() -> dict:
    config = config_of(SHAPES, LAYERS)
    config.vocab_size = VOCABULARY
    made = {name: dense_model(config, dtype=dtype) for name, dtype in DENSE.items()}
    return made | {name: quantized_model(config, Scheme.parse(name), dtype=torch.bfloat16) for name in QUANTIZED}


def row(name: str, model, rates: dict) -> dict:
    speeds = {kind: {"fastest": max(rates[name, kind]), "median": statistics.median(rates[name, kind])}
              for kind in ("decode", "prefill")}  # fmt: skip
    return {"scheme": name, "memory_bytes": model_bytes(model), **speeds}


def main():
    sides = models()
    loops = {name: lowbit_loop(model) for name, model in sides.items()}
    rates = defaultdict(list)
    for run in loops.values():  # to warm up
        run(prompts(VOCABULARY, 1, SHORT, ROUNDS, "cpu"), 2)
    for number in range(ROUNDS):
        for name, run in loops.items():
            decoding = run(prompts(VOCABULARY, 1, SHORT, number, "cpu"), NEW)
            reading = run(prompts(VOCABULARY, 1, LONG, number, "cpu"), 2)
            rates[name, "decode"].append(decoding.decode_tokens_per_second)
            rates[name, "prefill"].append(reading.prefill_tokens_per_second)
            print(number, name, *(f"{rates[name, kind][-1]:.1f}" for kind in ("decode", "prefill")), flush=True)
        rows = [row(name, model, rates) for name, model in sides.items()]
        # after each, so that a run that is stopped leaves what it has
        save("ladder_speed", {"shapes": SHAPES, "layers": LAYERS, "new_tokens": NEW, "prefill_tokens": LONG,
                              "rounds": number + 1, "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
