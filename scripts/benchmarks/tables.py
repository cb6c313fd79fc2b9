"""Render the tables of the documents below from results/*.json: between `<!-- NAME -->` and `<!-- /NAME -->`.

    python scripts/benchmarks/tables.py [--check]

--check changes nothing and fails if a file is not what the results say.
"""

import json
import re
import sys

from budget_tables import budgets, running_memory
from cpu_tables import (
    concurrency,
    cpu_experts,
    cpu_generation,
    cpu_products,
    cpu_products_amx,
    cpu_quantize,
    finetune,
    int8_head,
    int8_inputs,
    sources_speed,
    taken_core,
)
from kernel_tables import kernel_counts, kernel_execution, kernel_mutations
from ladder_tables import int8_linear, ladder, ladder_speed
from prediction_tables import gpu_predictions, issue_budget
from quality_tables import quality_peers, quality_real
from rendering import ROOT, markdown, measured, result, source

DOCUMENTS = (
    "README.md",
    "triton_kernels/README.md",
    "model_cards/reference.md",
    "docs/architectures.md",
    "docs/benchmarks.md",
    "docs/budget.md",
    "docs/cpu.md",
    "docs/kv_cache.md",
    "docs/ladder.md",
    "docs/results.md",
    "docs/service.md",
    "docs/sources.md",
    "docs/transformers.md",
)


def summary() -> str:
    """What a newcomer wants to know: how much smaller, and how much worse."""
    data = result("ladder")
    wanted = {"BF16": None, "W8A16-G128": None, "W4A16-G128": "gptq", "W3A16-G64": "gptq", "W2A16_ASYM-G32": "gptq"}
    rows = [
        [row["scheme"] + (", calibrated" if wanted[row["scheme"]] else ""), f"{row['file_bytes'] / 1e6:.2f}",
         f"{row['perplexity']:.2f}", f"{row['kl_mean']:.5f}", f"{100 * row['top1_agreement']:.1f} %"]
        for row in data["rows"]
        if row["scheme"] in wanted and row["settings"].get("method") == wanted[row["scheme"]]
    ]  # fmt: skip
    header = ["embedded model", "file MB", "perplexity", "mean KL (nats)", "same next token"]
    return markdown(header, rows) + source(data, "ladder")


def quality() -> str:
    data = result("quality")
    first = data["rows"][0]
    rows = [
        [
            "bf16 (the original)",
            f"{data['source_bytes'] / 1e6:.2f}",
            "16",
            f"{first['reference_perplexity']:.2f}",
            "0",
            "100 %",
        ]
    ]
    best = {}
    for row in data["rows"]:
        if row["scheme"] not in best or row["kl_mean"] < best[row["scheme"]]["kl_mean"]:
            best[row["scheme"]] = row
    for row in best.values():
        rows.append(
            [f"{row['scheme']}, {row['scale_search']}", f"{row['bytes'] / 1e6:.2f}", f"{row['bits_per_weight']:.2f}",
             f"{row['perplexity']:.2f}", f"{row['kl_mean']:.4f}", f"{row['top1_agreement']:.1%}".replace("%", " %")]
        )  # fmt: skip
    header = [
        "scheme, scale search",
        "MB",
        "bits per quantized weight",
        "perplexity",
        "mean KL (nats)",
        "top-1 agreement",
    ]
    return markdown(header, rows) + source(data, "quality")


def kv_cache() -> str:
    data = result("kv_cache")
    rows = [
        [row["dtype"], f"{row['kl_mean']:.6f}", f"{row['kl_p99']:.5f}", f"{100 * row['top1_agreement']:.2f} %",
         f"{row['int8_bytes'] / row['full_bytes']:.2f}"]
        for row in data["rows"]
    ]  # fmt: skip
    header = ["embedded model", "mean KL (nats)", "99th percentile", "top-1 agreement", "bytes, of the full cache's"]
    return markdown(header, rows) + source(data, "kv_cache")


def speculative() -> str:
    if not measured("speculative"):
        return "Not yet measured. `python scripts/benchmarks/speculative.py` measures it."
    data = result("speculative")
    rows = []
    for row in data["rows"]:
        low, high = row["quartiles"]
        accepted = "" if row["accepted_share"] is None else f"{100 * row['accepted_share']:.0f} %"
        rows.append(
            [f"{row['text']}: {row['variant']}", f"{row['tokens_per_second']:.0f}",
             f"{row['over_plain']:.2f}x ({low:.2f} to {high:.2f})", accepted, f"{row['tokens_per_step']:.2f}",
             f"{100 * row['same_tokens_share']:.0f} %"]
        )  # fmt: skip
    header = [f"embedded model, {data['target']}", "tokens/s", "over model.generate (quartiles)", "accepted",
              "tokens per step", "prompts with the same tokens"]  # fmt: skip
    return markdown(header, rows) + source(data, "speculative")


def gptq_speed() -> str:
    data = result("gptq_speed")
    version = data["llmcompressor"]["versions"]["llmcompressor"]
    names = {
        "llmcompressor": f"llm-compressor {version}",
        "lowbit": "lowbit, the same work (`drift=0 scale_search=minmax sweeps=0`)",
        "lowbit_default": "lowbit as it is by default",
    }
    rows = [
        [name, f"{data[side]['seconds']:,.0f}", f"{data[side]['peak_bytes'] / 1e9:.2f}",
         f"{data[side]['output_bytes'] / 1e9:.2f}"]
        for side, name in names.items() if side in data
    ]  # fmt: skip
    header = ["GPTQ W4 g128, Llama-3.2-1B shapes, 16 x 512 tokens", "seconds", "peak memory GB", "output GB"]
    return markdown(header, rows) + source(data, "gptq_speed")


_CLIENTS = {
    "gptqmodel": "GPTQModel, and transformers with optimum: each way, GPTQ and AWQ, 2 to 8 bits, act-order",
    "llmcompressor": "llm-compressor writes compressed-tensors",
    "autoround": "AutoRound writes GPTQ, AWQ and compressed-tensors",
}


def interop() -> str:
    data = result("interop")
    rows = []
    for name, what in _CLIENTS.items():
        outcomes = list(data["results"][name].values())
        rows.append([what, str(len(outcomes)), str(outcomes.count("passed")), str(outcomes.count("skipped"))])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    header = ["", "cases", "same logits", "a client's own kernel is wrong"]
    return markdown(header, rows) + f"\n\n{data['date']}, {versions}; `python scripts/interop/record.py PYTHON`"


def reference_training() -> str:
    facts = json.loads((ROOT / "lowbit" / "assets" / "reference" / "training.json").read_text())
    rows = [
        ["parameters", f"{facts['parameters']:,}"],
        ["held-out perplexity (per token)", f"{facts['heldout_perplexity']:.2f}"],
        ["a bigram model on the same tokens", f"{facts['bigram_perplexity']:.2f}"],
        ["held-out tokens", f"{facts['heldout_tokens']:,}"],
        [
            "training tokens seen (corpus)",
            f"{facts['training_tokens_seen']:,} ({facts['training_tokens_in_corpus']:,})",
        ],
        ["steps x batch x context", f"{facts['steps']} x {facts['batch']} x {facts['context']}"],
        [
            "optimizer",
            f"AdamW, peak lr {facts['lr']}, warm-up 2 %, linear decay over the last 40 %, seed {facts['seed']}",
        ],
        ["trained with", f"Python {facts['python']}, torch {facts['torch']}, {facts['device']}"],
    ]
    return markdown(["", ""], [[name, value] for name, value in rows])


def gpu_check() -> str:
    """Of each case what lowbit runs, in microseconds, and how many times faster that is than others."""
    if not measured("gpu_check"):
        return "Not yet measured: no GPU has run the kernels. `bash scripts/gpu_check.sh` measures them."
    data = result("gpu_check")
    cells = {}
    for entry in data["timings"]:
        mine = next(iter(entry["lowbit"].values())).get("us")
        others = {name: peer["us"] for name, peer in entry["peers"].items() if "us" in peer}
        dense = others.pop("cublas", None)
        ratios = [f"{us / mine:.2f}x" if mine and us else "-" for us in (dense, min(others.values(), default=None))]
        cells[entry["shape"], entry["rows"]] = f"{mine:.1f} ({', '.join(ratios)})" if mine else "failed"
    columns = sorted({rows for _, rows in cells})
    rows = [[name, *(cells.get((name, m), "") for m in columns)] for name in dict.fromkeys(name for name, _ in cells)]
    facts, wrong = data["facts"], sum(bool(case["wrong"]) for case in data["correctness"])
    copies, multiplies = (data["ceilings"][name] / 1e12 for name in ("copy_bytes_per_s", "bf16_flops"))
    header = ["us (over bf16 in cuBLAS, over the best other peer)", *map(_rows, columns)]
    return markdown(header, rows) + (
        f"\n\n{facts['date'][:10]}, {facts['device']} (copies {copies:.2f} TB/s, multiplies {multiplies:.0f} TFLOP/s), "
        f"torch {facts['torch']}, triton {facts['triton']}; {len(data['correctness'])} cases compared with float64, "
        f"{wrong} wrong; `bash scripts/gpu_check.sh`"
    )


def gpu_end_to_end() -> str:
    """Decoding of whole models in CUDA graphs, and how much of the bandwidth it takes."""
    if not measured("gpu_check"):
        return "Not yet measured: no GPU has run a whole model. `bash scripts/gpu_check.sh` measures it."
    data = result("gpu_check")
    facts, whole = data["facts"], data["end_to_end"]
    if "reason" in whole:
        return f"Not measured: {whole['reason']}."
    sides = list(dict.fromkeys(row["side"] for row in whole["rows"]))
    found = {(row["side"], row["batch"]): row for row in whole["rows"]}

    def cell(row: dict | None) -> str:
        if row is None:
            return "-"
        return f"{row['decode_tokens_per_second']:.0f} ({row['bandwidth_share']:.0%})".replace("%", " %")

    rows = []
    for batch in dict.fromkeys(batch for _, batch in found):
        cells = [found.get((side, batch)) for side in sides]
        faster = next((f"{row['slower']:.2f}x" for row in cells if row and row["slower"]), "-")
        rows.append([str(batch), *map(cell, cells), faster])
    header = [f"batch, {whole['shapes']} shapes", *(f"{side} tokens/s (of bandwidth)" for side in sides), "speed-up"]
    return markdown(header, rows) + (
        f"\n\n{facts['date'][:10]}, {facts['device']}, torch {facts['torch']}, triton {facts['triton']}; "
        f"{whole['prompt_tokens']} prompt tokens, {whole['new_tokens']} new ones; `bash scripts/gpu_check.sh`"
    )


def _rows(number: int) -> str:
    return f"{number} row{'s' * (number > 1)}"


_TASKS = {
    "AutoModelForCausalLM": "text",
    "AutoModelForSeq2SeqLM": "encoder-decoder",
    "AutoModelForImageTextToText": "images and text",
}


def architectures() -> str:
    data = result("architectures")
    rows = []
    for task, name in _TASKS.items():
        status = [row["status"] for row in data["rows"] if row["task"] == task]
        rows.append([f"{name} (`{task}`)", str(len(status)), str(len(status) - status.count("not built")),
                     str(status.count("ok"))])  # fmt: skip
    rows.append(["all", str(data["model_types"]), str(data["built"]), str(data["ok"])])
    rows.append(["distinct architectures", "", str(data["architectures"]), str(data["architectures_ok"])])
    return markdown(["", "model types", "built small", "whole round"], rows) + source(data, "architectures")


def architecture_names() -> str:
    data = result("architectures")
    names = sorted({row["architecture"] for row in data["rows"] if row["status"] == "ok"}, key=str.lower)
    others = [
        [f"{row['model_type']} (`{row['task']}`)", row["status"], row["reason"].replace("|", "\\|")]
        for row in data["rows"] if row["status"] != "ok"
    ]  # fmt: skip
    return f"{', '.join(names)}.\n\n{markdown(['model type', '', 'reason'], others)}" + source(data, "architectures")


TABLES = {
    f.__name__: f
    for f in (
        budgets, running_memory, summary, architectures, architecture_names, quality, quality_peers, quality_real,
        gptq_speed,
        cpu_quantize,
        gpu_check, gpu_end_to_end, cpu_generation, cpu_products, cpu_products_amx, cpu_experts, int8_inputs, int8_head,
        taken_core, concurrency, finetune, sources_speed, kv_cache, speculative, ladder, ladder_speed, int8_linear,
        gpu_predictions, issue_budget, interop, kernel_counts, kernel_execution, kernel_mutations, reference_training,
    )
}  # fmt: skip


def rendered(text: str) -> str:
    def replace(match):
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", replace, text, flags=re.DOTALL)


def main():
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = rendered(text)
        if new != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"stale tables in {', '.join(stale)}: run python scripts/benchmarks/tables.py")


if __name__ == "__main__":
    main()
