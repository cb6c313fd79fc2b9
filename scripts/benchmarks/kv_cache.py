"""What the int8 cache of keys and values changes: KL divergence from the full cache, and memory, on held-out text.

    python scripts/benchmarks/kv_cache.py [MODEL]

Teacher-forced through the cache: each window goes in as a prompt and a rest, which attends to what comes back.
"""

import sys

import torch
from common import save
from transformers import StaticCache

import lowbit
from lowbit.generation.kv_int8 import Int8StaticCache
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream
from lowbit.transformers_api import cache_argument

WINDOWS, SEQLEN, PROMPT = 33, 512, 32
CACHES = {"full": StaticCache, "int8": Int8StaticCache}


def log_probs(model, window: torch.Tensor, cache) -> torch.Tensor:
    """[T, V] of window [1, T], of which the first PROMPT tokens go in first."""
    parts = window.split([PROMPT, window.shape[1] - PROMPT], dim=1)
    given = {cache_argument(model): cache, "use_cache": True}
    logits = [model(part, **given).logits[0] for part in parts]
    return torch.cat(logits).float().log_softmax(-1)


def cache_bytes(cache) -> int:
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


@torch.inference_mode()
def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "reference"
    stream = token_stream(load_tokenizer(name), "stdlib", WINDOWS * SEQLEN)
    rows = []
    for dtype in ("float32", "bfloat16"):
        model = lowbit.load(name, dtype=dtype)
        divergences, agreements, used = [], 0, {}
        for window in stream.view(WINDOWS, 1, SEQLEN):
            found = {}
            for kind, make in CACHES.items():
                cache = make(model.config, SEQLEN)
                found[kind] = log_probs(model, window, cache)
                used[kind] = cache_bytes(cache)
            full, int8 = found["full"], found["int8"]
            divergences.append((full.exp() * (full - int8)).sum(-1))
            agreements += int((full.argmax(-1) == int8.argmax(-1)).sum())
        kl = torch.cat(divergences)
        rows.append({
            "dtype": dtype, "tokens": len(kl), "kl_mean": float(kl.mean()), "kl_p99": float(kl.quantile(0.99)),
            "top1_agreement": agreements / len(kl), "full_bytes": used["full"], "int8_bytes": used["int8"],
        })  # fmt: skip
    heads = model.config.get_text_config()
    save("kv_cache", {"model": name, "dataset": "stdlib", "seqlen": SEQLEN, "prompt": PROMPT,
                      "head_dim": getattr(heads, "head_dim", heads.hidden_size // heads.num_attention_heads),
                      "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
