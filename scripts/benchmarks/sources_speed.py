"""Quantizing what is quantized already, against quantizing the same model in bfloat16: processor time.

    python scripts/benchmarks/sources_speed.py [--layers 4] [--scheme W4A16-G32 ...] [KIND ...]

A random model of the shapes of Llama-3.2-1B in fewer layers and a small vocabulary, stored in each way. Source and
bfloat16 alternate in processes of their own, one thread each; what counts is the time that the processor spends on one
of them beyond start-up, the median of `--repeats`. The issue asks for twice that of bfloat16 at most.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import ROOT, WORK, save

sys.path.insert(0, str(ROOT / "tests"))

GGUF = ("Q4_0", "Q8_0", "Q4_1", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
OTHERS = ("fp8", "channel", "mxfp4", "nvfp4", "int8", "nf4")


def dense(layers: int) -> Path:
    """The model in bfloat16, made once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = WORK / f"sources-{layers}" / "bfloat16"
    if not (folder / "model.safetensors").is_file():
        config = LlamaConfig(
            vocab_size=1024, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def stored_as(kind: str, folder: Path) -> Path:
    """The same model in another way: a GGUF file, or a folder."""
    if kind in GGUF:
        from gguf_files import write_gguf
        from transformers import AutoModelForCausalLM

        path = folder.with_name(f"{kind}.gguf")
        if not path.is_file():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            write_gguf(path, "llama", lambda name: kind, model=model)
        return path
    from encoded_models import ENCODERS, rewritten

    target = folder.with_name(kind)
    if not target.is_dir():
        rewritten(folder, target, *ENCODERS[kind])
    return target


def measure_once(source: str, output: str, scheme: str) -> None:
    """In a process of its own: print the processor's seconds as JSON."""
    import lowbit

    torch.set_num_threads(1)
    lowbit.quantize(source, output, scheme=scheme, dry_run=True)  # start-up is not what is measured
    before, started = os.times(), time.perf_counter()
    report = lowbit.quantize(source, output, scheme=scheme, overwrite=True)
    after, seconds = os.times(), time.perf_counter() - started
    spent = after.user - before.user, after.system - before.system
    print(json.dumps({"user": spent[0], "system": spent[1], "wall": seconds, "peak_bytes": report.peak_memory,
                      "output_bytes": report.output_bytes, "converted": report.converted}))  # fmt: skip


def measured(source: Path, scheme: str) -> dict:
    output = WORK / "sources-made"
    command = [sys.executable, __file__, "--once", str(source), str(output), scheme]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1])


def compared(kind: str, scheme: str, folder: Path, repeats: int) -> dict:
    source = stored_as(kind, folder)
    measured(source, scheme)  # the folder of a GGUF file is made
    pairs = [(measured(folder, scheme), measured(source, scheme)) for _ in range(repeats)]

    def median(of: int, what: str) -> float:
        return statistics.median(pair[of][what] for pair in pairs)

    times = statistics.median(b["user"] / a["user"] for a, b in pairs)
    last = pairs[-1][1]
    made = {"source": kind, "scheme": scheme, "times_bfloat16": times, "converted": last["converted"]}
    for what in ("user", "system", "wall", "peak_bytes"):
        made |= {f"{what}_bfloat16": median(0, what), f"{what}_source": median(1, what)}
    print(f"{kind:8} {scheme:12} {times:.2f} times the processor time of bfloat16", file=sys.stderr)
    return made


def main() -> None:
    if sys.argv[1:2] == ["--once"]:
        measure_once(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join((*GGUF, *OTHERS))}; default: all")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scheme", nargs="*", default=["W4A16-G32", "W4A16-G128"])
    options = parser.parse_args()
    folder = dense(options.layers)
    kinds = options.kinds or (*GGUF, *OTHERS)
    rows = [compared(kind, scheme, folder, options.repeats) for kind in kinds for scheme in options.scheme]
    shapes = f"Llama-3.2-1B shapes, {options.layers} layers, random"
    save("sources_speed", {"model": shapes, "repeats": options.repeats, "rows": rows})


if __name__ == "__main__":
    main()
