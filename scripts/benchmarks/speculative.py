"""Speculative decoding of the embedded model in 8 bits: drafts by itself in 4 and 2 bits, and by looking up the prompt.

    python scripts/benchmarks/speculative.py [--prompts N] [--new-tokens N] [--rounds N]

Greedy, batch 1, transformers' assisted generation as `lowbit generate --assistant` and `--prompt-lookup` run it, beside
`model.generate` and lowbit's loop without drafts. Prompts are 128 tokens of modules of the standard library that the
model never saw: as they are ("code"), and 48 of them over and over ("repeated"). The variants take turns on each
prompt; seconds are of the whole call, the prompt included. A step is a pass of the 8-bit model; without drafts it gives
one token.
"""

import argparse
import shutil
import statistics
import time

import torch
from common import WORK, save

import lowbit
from lowbit.generation import Decoder, Draft
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream

TARGET, DRAFTS = "W8A16-G128", ("W4A16-G128", "W2A16_ASYM-G16")
LOOKUPS = (3, 8)
PLAIN = "model.generate, no draft"
PROMPT_TOKENS, REPEATED = 128, 48
NEVER = -1  # a token that no model has: every run makes as many tokens


class Generate:
    """`model.generate` without drafts, as a `Decoder`."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids: torch.Tensor, new: int) -> dict:
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                                      eos_token_id=NEVER, pad_token_id=0)  # fmt: skip
        return {"tokens": out[0, ids.shape[1] :].tolist(), "drafted": 0, "accepted": 0}


class Loop:
    """lowbit's `Decoder`, with drafts or without; the cache is empty at first, as that of `model.generate` is."""

    def __init__(self, model, draft: Draft | None = None):
        self.decoder = Decoder(model, draft=draft)

    def __call__(self, ids: torch.Tensor, new: int) -> dict:
        self.decoder.forget()
        result = self.decoder.generate(ids, max_new_tokens=new, eos_token_id=(), prefill_chunk=None)
        stats = result.stats
        return {"tokens": result.tokens[0].tolist(), "drafted": stats.drafted_tokens, "accepted": stats.accepted_tokens}


def measure(runs: dict, prompts: dict[str, list[torch.Tensor]], new: int, rounds: int) -> dict:
    """{(text, variant): [what a run gives, and its seconds]}, one for each round and prompt."""
    for run in runs.values():  # warms up
        run(prompts["code"][0], 8)
    found = {(text, name): [] for text in prompts for name in runs}
    for _ in range(rounds):
        for text, ids in ((text, ids) for text, batch in prompts.items() for ids in batch):
            for name, run in runs.items():
                started = time.perf_counter()
                made = run(ids, new)
                made["seconds"] = time.perf_counter() - started
                found[text, name].append(made)
                print(text, name, made["drafted"], made["accepted"], f"{made['seconds']:.2f}", flush=True)
    return found


def row(text: str, name: str, runs: list[dict], plain: list[dict]) -> dict:
    tokens = sum(len(run["tokens"]) for run in runs)
    drafted, accepted = (sum(run[key] for run in runs) for key in ("drafted", "accepted"))
    ratios = [before["seconds"] / run["seconds"] for run, before in zip(runs, plain, strict=True)]
    same = [run["tokens"] == before["tokens"] for run, before in zip(runs, plain, strict=True)]
    return {
        "text": text,
        "variant": name,
        "accepted_share": accepted / drafted if drafted else None,
        "tokens_per_step": tokens / (tokens - accepted),
        "tokens_per_second": statistics.median(len(run["tokens"]) / run["seconds"] for run in runs),
        "over_plain": statistics.median(ratios),
        "quartiles": [statistics.quantiles(ratios, n=4)[number] for number in (0, 2)],
        "same_tokens_share": statistics.mean(same),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="of each text")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    work, models = WORK / "speculative", {}
    for scheme in (TARGET, *DRAFTS):
        lowbit.quantize("reference", work / scheme, scheme=scheme, overwrite=True)
        models[scheme] = lowbit.load(work / scheme)
    target = models[TARGET]
    runs = {PLAIN: Generate(target), "lowbit's loop, no draft": Loop(target)}
    runs |= {f"{scheme} drafts": Loop(target, Draft(assistant=models[scheme])) for scheme in DRAFTS}
    runs |= {f"prompt lookup, {number} tokens": Loop(target, Draft(lookup=number)) for number in LOOKUPS}
    # what a token of a draft costs
    runs |= {f"{scheme} alone": Generate(models[scheme]) for scheme in DRAFTS}
    stream = token_stream(load_tokenizer("reference"), "stdlib", args.prompts * PROMPT_TOKENS)
    code = list(stream[: args.prompts * PROMPT_TOKENS].view(-1, 1, PROMPT_TOKENS))
    repeated = [ids[:, :REPEATED].repeat(1, 3)[:, :PROMPT_TOKENS] for ids in code]
    found = measure(runs, {"code": code, "repeated": repeated}, args.new_tokens, args.rounds)
    shutil.rmtree(work)
    rows = [row(text, name, made, found[text, PLAIN]) for (text, name), made in found.items()]
    save("speculative", {"target": TARGET, "prompts": args.prompts, "prompt_tokens": PROMPT_TOKENS,
                         "new_tokens": args.new_tokens, "rounds": args.rounds, "dtype": str(target.dtype),
                         "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
