"""Generation speed on the CPU: a W4A16 model through lowbit's layers against the bf16 model, both in transformers.

    python scripts/benchmarks/cpu_decode.py

Random checkpoint with the shapes of Llama-3.2-1B. Decode: greedy `generate` at batch 1 after a short prompt, time per
new token. Prefill: one forward pass over 512 tokens. The two sides alternate, so that both see the same machine.
"""

import statistics
import time

import torch
from common import WORK, llama_1b, save

import lowbit

PROMPT, NEW, PREFILL, ROUNDS = 16, 24, 512, 2


@torch.inference_mode()
def decode(model) -> float:
    """Seconds per token of greedy decoding, prompt excluded."""
    ids = torch.randint(1, 1000, (1, PROMPT))

    def run(count):
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count,
                       do_sample=False, pad_token_id=0)  # fmt: skip
        return time.perf_counter() - started

    return (run(NEW + 1) - run(1)) / NEW


@torch.inference_mode()
def prefill(model) -> float:
    ids = torch.randint(1, 1000, (1, PREFILL))
    started = time.perf_counter()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - started


def main():
    source = llama_1b()
    quantized = WORK / "llama-3.2-1b-w4a16"
    if not quantized.exists():
        lowbit.quantize(source, quantized)
    models = {"bf16": lowbit.load(source), "W4A16": lowbit.load(quantized)}
    seconds = {(kind, name): [] for kind in ("decode", "prefill") for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            seconds["decode", name].append(decode(model))
            seconds["prefill", name].append(prefill(model))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    result = {
        "model": "Llama-3.2-1B shapes, random",
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "prefill_tokens": PREFILL,
    }
    for name in models:
        result[name] = {
            "decode_tokens_per_second": 1 / median["decode", name],
            "prefill_tokens_per_second": PREFILL / median["prefill", name],
        }
    result["decode_speedup"] = median["decode", "bf16"] / median["decode", "W4A16"]
    result["prefill_speedup"] = median["prefill", "bf16"] / median["prefill", "W4A16"]
    save("cpu_decode", result)


if __name__ == "__main__":
    main()
