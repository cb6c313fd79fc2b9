"""Train the reference model that lowbit embeds: a small Llama on the sources of the Python standard library.

    python scripts/train_reference_model.py --output lowbit/assets/reference --work build/reference

Seeded and resumable: every step draws its batch from (seed, step) alone, and the state is saved in --work, so a rerun
of the same command continues where it stopped. About an hour on 2 CPU cores, a few minutes on a GPU.
"""

import argparse
import json
import math
import platform
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowbit.text.stdlib import HELDOUT_MODULES, described_functions, sources

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ message['content'] | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY, CONTEXT = 2048, 512


def build_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer, split):
    """One stream of token ids: modules, and one described function in every few, each ended by END; shuffled by
    name."""
    documents = [text for _, text in sources(split)]
    documents += [f"{USER}{question}{END}{ASSISTANT}{answer}" for question, answer in described_functions(split)]
    random.Random(0).shuffle(documents)
    stream = []
    for start in range(0, len(documents), 256):
        for ids in tokenizer(documents[start : start + 256], verbose=False)["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
    return torch.tensor(stream, dtype=torch.int16)


def heldout_ids(tokenizer):
    stream = []
    for _, text in sources("heldout"):
        stream += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(stream)


def config():
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


def batch(stream, size, step, seed, device):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - CONTEXT - 1, (size,), generator=generator)
    return torch.stack([stream[s : s + CONTEXT + 1].long() for s in starts]).to(device)


def learning_rate(step, steps, peak):
    """Warm up for 2 %, hold, then fall linearly to zero over the last 40 %."""
    warm, fall = 0.02 * steps, 0.4 * steps
    return peak * min(1.0, (step + 1) / warm, (steps - step) / fall)


@torch.no_grad()
def perplexity(model, ids, device):
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1].to(device)
        logits = model(input_ids=window[None, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    model.train()
    return math.exp(total / count)


def bigram_perplexity(stream, ids):
    """Interpolated bigram model (weights 0.9 / 0.1 with an add-one unigram), the bar the card compares with."""
    stream = stream.tolist()
    unigram, bigram = Counter(stream), Counter(pairwise(stream))
    total = len(stream) + VOCABULARY
    loss = 0.0
    pairs = list(pairwise(ids.tolist()))
    for first, second in pairs:
        back_off = (unigram[second] + 1) / total
        loss -= math.log(0.9 * bigram[first, second] / max(unigram[first], 1) + 0.1 * back_off)
    return math.exp(loss / len(pairs))


def optimizer_for(model):
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def train(args, stream, heldout, device):
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config()).to(device)
    optimizer = optimizer_for(model)
    state_file, step = args.work / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"continuing at step {step}", flush=True)
    forward = torch.compile(model) if args.compile else model
    began = time.time()
    first = step
    running = None
    while step < args.steps:
        window = batch(stream, args.batch, step, args.seed, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        # bf16 autocast on a CPU without bf16 instructions is 15 times slower than fp32
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = forward(input_ids=window[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0:
            left = (time.time() - began) / (step - first) * (args.steps - step)
            print(f"step {step}/{args.steps}  loss {running:.3f}  eta {left / 60:.1f} min", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
            print(
                f"step {step}  held-out perplexity {perplexity(model, heldout[: 8 * CONTEXT], device):.2f}", flush=True
            )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("lowbit/assets/reference"))
    parser.add_argument("--work", type=Path, default=Path("build/reference"), help="state of a run in progress")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler on CPU)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    tokenizer_folder, stream_file = args.work / "tokenizer", args.work / "stream.pt"
    if not stream_file.exists():
        tokenizer = build_tokenizer(text for _, text in sources("train"))
        tokenizer.save_pretrained(tokenizer_folder)
        torch.save(encode(tokenizer, "train"), stream_file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    stream = torch.load(stream_file, weights_only=True)
    heldout = heldout_ids(tokenizer)
    print(f"{len(stream):,} training tokens, {len(heldout):,} held-out tokens on {device}", flush=True)

    model = train(args, stream, heldout, device)
    model = model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.generation_config.max_new_tokens = 128
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    model.float()  # the rounded weights, computed with at the speed of float32
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_in_corpus": len(stream),
        "training_tokens_seen": args.steps * args.batch * CONTEXT,
        "heldout_tokens": len(heldout),
        "heldout_modules": list(HELDOUT_MODULES),
        "heldout_perplexity": perplexity(model, heldout, device),
        "bigram_perplexity": bigram_perplexity(stream, heldout),
        "context": CONTEXT, "steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed,
        "python": platform.python_version(), "torch": torch.__version__, "device": device.type,
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
