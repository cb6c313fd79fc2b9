"""Quantizing what is quantized already, against quantizing the same model in bfloat16: processor time, in one process.

    python scripts/benchmarks/sources_speed.py [--prepare] [--repeats 3] [--scheme W4A16-G128] [KIND ...]

A layer of random weights of the shapes of Llama-3.2-1B, stored in each way (and experts of gpt-oss); with --prepare
they are only made, which takes minutes. One thread quantizes; in each round every source has its turn, and bfloat16
before each of them. Counted is the time that the processor spends, in the system too, and the median of rounds is
shown. The issue asks for twice that of bfloat16 at most.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from common import ROOT, WORK, save

import lowbit

sys.path.insert(0, str(ROOT / "tests"))

GGUF = (
    "Q4_0", "Q8_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S",
    "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip
# Of `encoded_models`
FLOATS = ("fp8", "tensor", "channel", "block", "mxfp8", "mxfp4", "nvfp4", "modelopt nvfp4", "nf4", "int8")
# Name -> (scheme, format): not on the grid that is asked for
INTEGERS = {
    "compressed-tensors W4_ASYM": ("W4A16_ASYM-G128", "compressed-tensors"),
    "compressed-tensors W8": ("W8A16-G128", "compressed-tensors"),
    "compressed-tensors W3_ASYM": ("W3A16_ASYM-G64", "compressed-tensors"),
    "gptq W4_ASYM": ("W4A16_ASYM-G128", "gptq"),
    "awq W4_ASYM": ("W4A16_ASYM-G128", "awq"),
}
EXPERTS = "mxfp4 experts"
FOLDER = WORK / "sources"
SIZES = {"vocab_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip


def dense(kind: str) -> Path:
    """The model in bfloat16 that a kind is compared with, made once."""
    from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = FOLDER / ("experts" if kind == EXPERTS else "dense")
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        if kind == EXPERTS:
            experts = {"num_local_experts": 8, "num_experts_per_tok": 4}
            model = GptOssForCausalLM(GptOssConfig(hidden_size=1024, intermediate_size=1024, **experts, **SIZES))
        else:
            model = LlamaForCausalLM(LlamaConfig(hidden_size=2048, intermediate_size=8192, **SIZES))
        model.bfloat16().save_pretrained(folder)
    return folder


def stored_as(kind: str) -> Path:
    """The same model in another way, made once: a GGUF file, or a folder."""
    folder = dense(kind)
    target = FOLDER / (f"{kind}.gguf" if kind in GGUF else kind.replace(" ", "-"))
    if target.exists():
        return target
    print(f"storing the model as {kind}", file=sys.stderr)
    if kind in GGUF:
        from gguf_files import write_gguf
        from transformers import AutoModelForCausalLM

        write_gguf(
            target, "llama", lambda name: kind, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        )
    elif kind in INTEGERS:
        scheme, format_name = INTEGERS[kind]
        lowbit.quantize(folder, target, scheme=scheme, format=format_name)
    else:
        from encoded_models import ENCODERS, in_mxfp4_of_gpt_oss, rewritten

        if kind == EXPERTS:
            in_mxfp4_of_gpt_oss(folder, target)
        else:
            rewritten(folder, target, *ENCODERS[kind])
    return target


def peak_over(resident: int) -> int:
    """Bytes: the most that the process held since `reset_peak`, over what it held then."""
    return _status("VmHWM") - resident


def reset_peak() -> int:
    """Bytes that the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(source: Path, scheme: str) -> dict:
    output, resident = FOLDER / "made", reset_peak()
    before, started = time.process_time(), time.perf_counter()
    report = lowbit.quantize(source, output, scheme=scheme, overwrite=True)
    spent, seconds = time.process_time() - before, time.perf_counter() - started
    return {"processor": spent, "wall": seconds, "peak_bytes": peak_over(resident), "converted": report.converted}


def compared(kind: str, scheme: str, pairs: list[tuple[dict, dict]]) -> dict:
    made = {"source": kind, "scheme": scheme, "converted": pairs[0][1]["converted"]}
    for what in ("processor", "wall"):
        ratios = [source[what] / base[what] for base, source in pairs]
        made |= {f"times_{what}": statistics.median(ratios), f"spread_{what}": [min(ratios), max(ratios)]}
    for what in ("processor", "wall", "peak_bytes"):
        for side, name in enumerate(("bfloat16", "source")):
            made[f"{what}_{name}"] = statistics.median(pair[side][what] for pair in pairs)
    return made


def main() -> None:
    kinds = (*GGUF, *FLOATS, *INTEGERS, EXPERTS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kinds)}; default: all")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scheme", default="W4A16-G128")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources = {kind: (dense(kind), stored_as(kind)) for kind in options.kinds or kinds}
    for _, source in sources.values():  # opened once: a GGUF file gets its folder
        lowbit.quantize(source, FOLDER / "made", scheme=options.scheme, dry_run=True)
    if options.prepare:
        return
    measure(next(iter(sources.values()))[0], options.scheme)
    pairs = {kind: [] for kind in sources}
    for _ in range(options.repeats):
        for kind, (base, source) in sources.items():
            pairs[kind].append((measure(base, options.scheme), measure(source, options.scheme)))
    shutil.rmtree(FOLDER / "made")
    rows = [compared(kind, options.scheme, found) for kind, found in pairs.items()]
    for row in rows:
        print(f"{row['source']:28} {row['times_processor']:.2f} times the processor time of bfloat16", file=sys.stderr)
    weights = "61 million weights in the shapes of Llama-3.2-1B"
    save("sources_speed", {"model": weights, "repeats": options.repeats, "rows": rows})


if __name__ == "__main__":
    main()
