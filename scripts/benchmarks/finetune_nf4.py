"""Memory and tokens/s of training a LoRA adapter on packed weights, beside bitsandbytes' NF4 and the dense model.

    python scripts/benchmarks/finetune_nf4.py [MODEL] [--steps 12] [--rounds 2] [--batch 4] [--length 128] [--out FILE]

MODEL is a dense folder, by default the embedded model. Each side runs in a process of its own, in turns, with the same
adapter (rank 16 on all linears), text, gradient checkpointing and bfloat16 autocast. bitsandbytes may lie in any folder
of PYTHONPATH (`pip download --no-deps bitsandbytes`, unpacked); where it is missing, its side says so.

The result is one JSON object, in FILE too: "facts" (device, versions, date), the arguments, and "sides", each with
`weights_bytes` (all parameters and buffers of the model that is trained, adapter excluded), `peak_bytes` (the most that
the process held during training beyond what it held before the model was loaded; on CUDA what the allocator held),
`tokens_per_second` (the median over rounds of the steps after the first), `first_loss` and `last_loss`; or "missing".
Times are worth something on an otherwise idle machine only; memory and losses are anywhere.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import common

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
SIDES = ("lowbit W4A16-G64", "bitsandbytes NF4", "dense")  # groups as large as NF4's blocks
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(side: str, folder: Path, device: str):
    """The model of a side, frozen, and the LoRA config for it."""
    import torch
    from peft import LoraConfig

    import lowbit
    from lowbit.hf import enable_lora

    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    if side == "dense":
        return lowbit.load(folder, dtype="bfloat16", device_map=device), config
    if side == "bitsandbytes NF4":
        import bitsandbytes  # noqa: F401  an ImportError here is told as such
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, dtype=torch.bfloat16, device_map=device
        )
        return model, config
    packed = lowbit.LowbitConfig(bits=4, group_size=64)
    model = lowbit.load(folder, quantization_config=packed, dtype="bfloat16", device_map=device)
    return model, enable_lora(config)


def held_bytes() -> int:
    """What this process holds now, by the kernel's account."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Peak:
    """The most that this process has held since it was made: the kernel keeps it, and is told to start anew."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def train(side: str, chosen: argparse.Namespace) -> dict:
    """Trains one side in this process."""
    import torch
    from finetune import blocks, stdlib
    from peft import get_peft_model
    from transformers import AutoTokenizer

    import lowbit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = lowbit.resolve(chosen.model)
    data = blocks(AutoTokenizer.from_pretrained(folder), stdlib(8), chosen.length)
    ids = torch.stack([piece["input_ids"] for piece in data]).to(device)
    torch.manual_seed(0)
    gc.collect()
    before, peak = held_bytes(), Peak()
    model, config = load(side, folder, device)
    tensors = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    weights = sum(t.untyped_storage().nbytes() for t in tensors.values())
    del tensors
    model = get_peft_model(model, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, seconds = [], []
    for step in range(chosen.steps):
        batch = ids[torch.arange(step * chosen.batch, (step + 1) * chosen.batch) % len(ids)]
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    most = torch.cuda.max_memory_allocated() if device == "cuda" else peak.bytes() - before
    return {
        "weights_bytes": weights, "peak_bytes": most,
        "tokens_per_second": chosen.batch * chosen.length / statistics.median(seconds[1:]),
        "first_loss": losses[0], "last_loss": statistics.mean(losses[-3:]),
    }  # fmt: skip


def run(side: str, arguments: list[str]) -> dict:
    done = subprocess.run([sys.executable, __file__, *arguments, "--side", side], capture_output=True, text=True)
    if done.returncode:
        return {"missing": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def facts() -> dict:
    """Those of every result, and the versions of what trains."""
    found = common.facts()
    for package in ("peft", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    for name, default in {"steps": 12, "rounds": 2, "batch": 4, "length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    if chosen.steps < 2:
        parser.error("--steps: 2 or more, the first one is not timed")
    if chosen.side:
        print(json.dumps(train(chosen.side, chosen)))
        return
    arguments = [chosen.model, *(f"--{n}={getattr(chosen, n)}" for n in ("steps", "batch", "length"))]
    rounds = [{side: run(side, arguments) for side in SIDES} for _ in range(chosen.rounds)]
    sides = {}
    for side in SIDES:
        results = [each[side] for each in rounds]
        sides[side] = results[0]
        if "missing" not in results[0]:
            rates = [each["tokens_per_second"] for each in results]
            sides[side] |= {
                "tokens_per_second": round(statistics.median(rates), 1), "rates": [round(rate, 1) for rate in rates],
                "peak_bytes": max(each["peak_bytes"] for each in results),
            }  # fmt: skip
    given = {name: getattr(chosen, name) for name in ("steps", "rounds", "batch", "length")}
    given["model"] = Path(chosen.model).name
    text = json.dumps({"facts": facts(), **given, "sides": sides}, indent=2)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
