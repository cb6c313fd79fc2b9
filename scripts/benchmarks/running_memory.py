"""What running takes, as `lowbit plan --context` foresees it, beside what a run really holds.

    python scripts/benchmarks/running_memory.py                     the embedded model
    python scripts/benchmarks/running_memory.py MODEL --loads 1024x2 --name NAME

The real figures are those of torch's allocator: the weights that are loaded, and the most that is allocated beside
them while prompts are read and tokens generated, twice, as the second prompt is read beside what the first has left.
"""

import argparse
import gc

import torch
from common import WORK, save
from torch.profiler import ProfilerActivity, profile

import lowbit
from lowbit.generation.loop import Decoder

NEW_TOKENS = 8


def weights_of(model) -> int:
    """Bytes of all storages that the modules of a model hold."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def peak_beside(model, context: int, batch: int, int8: bool = False) -> int:
    """The most bytes that are allocated at a time, beside the weights, while a model generates twice."""
    generator, decoder = torch.Generator().manual_seed(0), Decoder(model, int8_cache=int8)
    vocabulary = model.config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, (2, batch, context - NEW_TOKENS), generator=generator)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for prompt in prompts:
            decoder.generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=())
    now = peak = 0
    events = (each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]")
    for each in sorted(events, key=lambda event: event.start_ns()):
        now += each.nbytes()
        peak = max(peak, now)
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--loads", nargs="+", default=["512x1", "512x8"], help="tokens x sequences")
    parser.add_argument("--schemes", nargs="+", default=["W4A16-G64", "W3A16_ASYM-G64"])
    parser.add_argument("--name", default="running_memory", help="results/NAME.json")
    asked, rows = parser.parse_args(), []
    for scheme in asked.schemes:
        folder = WORK / "running-memory"
        lowbit.quantize(asked.model, folder, scheme=scheme, overwrite=True)
        model = lowbit.load(folder)
        for load in asked.loads:
            context, batch = map(int, load.split("x"))
            for cache in ("bf16", "int8"):
                ahead = lowbit.plan(asked.model, scheme=scheme, context=context, batch=batch, kv_cache=cache).memory
                weights, beside = weights_of(model), peak_beside(model, context, batch, cache == "int8")
                real = weights + beside
                rows.append({"scheme": scheme, **ahead, "real_weights": weights, "real_beside": beside, "real": real})
                print(rows[-1], f"{ahead['peak'] / real - 1:+.1%}", flush=True)
    save(asked.name, {"model": str(asked.model), "rows": rows})


if __name__ == "__main__":
    main()
