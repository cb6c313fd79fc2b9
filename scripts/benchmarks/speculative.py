"""Speculative decoding of the embedded model in 8 bits: drafts by itself in 4 and 2 bits, and by looking up the prompt.

    python scripts/benchmarks/speculative.py

Greedy, batch 1, transformers' assisted generation, prompts from modules of the standard library that the model never
saw. The variants take turns on each prompt. A step is a forward pass of the 8-bit model; plain decoding accepts one
token in each.
"""

import shutil
import statistics
import time

import torch
from common import WORK, save

import lowbit
from lowbit.calibration.data import token_stream
from lowbit.generation.stream import load_tokenizer

TARGET, DRAFTS = "W8A16-G128", ("W4A16-G128", "W2A16_ASYM-G16")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 128, 48

NEVER = -1  # a token that no model has: every run makes as many tokens


def run(model, ids: torch.Tensor, options: dict) -> tuple[list[int], int, float]:
    """(new tokens, forward passes of the model, seconds), the prompt's first pass included."""
    steps = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    started = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                         eos_token_id=NEVER, pad_token_id=0, **options)  # fmt: skip
    seconds = time.perf_counter() - started
    hook.remove()
    return out[0, ids.shape[1] :].tolist(), len(steps), seconds


def main():
    work, models = WORK / "speculative", {}
    for scheme in (TARGET, *DRAFTS):
        lowbit.quantize("reference", work / scheme, scheme=scheme, overwrite=True)
        models[scheme] = lowbit.load(work / scheme)
    variants = {"plain": {}} | {f"draft {draft}": {"assistant_model": models[draft]} for draft in DRAFTS}
    variants["prompt lookup, 8 tokens"] = {"prompt_lookup_num_tokens": 8}
    stream = token_stream(load_tokenizer("reference"), "stdlib", PROMPTS * PROMPT_TOKENS)
    found = {name: [] for name in variants}
    for options in variants.values():  # warms up
        run(models[TARGET], stream[None, :32], options)
    for ids in stream[: PROMPTS * PROMPT_TOKENS].view(PROMPTS, 1, PROMPT_TOKENS):
        for name, options in variants.items():
            found[name].append(run(models[TARGET], ids, options))
            print(name, *found[name][-1][1:], flush=True)
    rows = []
    for name, runs in found.items():
        same = sum(tokens == plain for (tokens, *_), (plain, *_) in zip(runs, found["plain"], strict=True))
        rows.append({
            "variant": name,
            "tokens_per_step": sum(len(tokens) for tokens, *_ in runs) / sum(steps for _, steps, _ in runs),
            "tokens_per_second": statistics.median(len(tokens) / seconds for tokens, _, seconds in runs),
            "over_plain": statistics.median(
                plain[2] / mine[2] for mine, plain in zip(runs, found["plain"], strict=True)
            ),
            "prompts_with_the_same_tokens": same,
        })  # fmt: skip
    shutil.rmtree(work)
    save("speculative", {"target": TARGET, "prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS,
                         "new_tokens": NEW_TOKENS, "dtype": str(models[TARGET].dtype), "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
