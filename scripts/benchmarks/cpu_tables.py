"""The tables of CPUs."""

from rendering import markdown, measured, result, source


def cpu_quantize() -> str:
    data = result("cpu_quantize")
    rows = [["read and rewrite the file", f"{data['rewrite_seconds']:.1f}", "1.0", "", ""]]
    for name in ("W4A16", "W4A16_ASYM", "W8A16"):
        run = data[name]
        rows.append(
            [f"lowbit quantize, {name}", f"{run['seconds']:.1f}", f"{run['times_rewrite']:.1f}",
             f"{run['peak_bytes'] / 1e9:.2f}", f"{run['output_bytes'] / 1e9:.2f}"]
        )  # fmt: skip
    header = ["2.47 GB of bf16, Llama-3.2-1B shapes", "seconds", "times rewriting", "peak memory GB", "output GB"]
    return markdown(header, rows) + source(data, "cpu_quantize")


_SOURCES = {
    "fp8": "block FP8", "tensor": "FP8 by tensor", "channel": "FP8 by row", "block": "FP8 by block",
    "int8": "LLM.int8", "mxfp4 experts": "MXFP4 experts of gpt-oss",
}  # fmt: skip


def sources_speed() -> str:
    data = result("sources_speed")
    rows = []
    for row in data["rows"]:
        low, high = row["spread_processor"]
        rows.append(
            [_SOURCES.get(row["source"], row["source"]),
             f"{row['times_processor']:.2f} ({low:.2f} to {high:.2f})", f"{row['times_wall']:.2f}",
             f"{row['peak_bytes_source'] / 1e6:.0f} ({row['peak_bytes_bfloat16'] / 1e6:.0f})"]
        )  # fmt: skip
    header = [f"to {data['rows'][0]['scheme']}, round to nearest, from", "processor time, of bfloat16's",
              "seconds, of bfloat16's", "peak MB over the start (of bfloat16)"]  # fmt: skip
    return (
        markdown(header, rows)
        + f"\n\n{data['model']}; the median of {data['repeats']} rounds"
        + source(data, "sources_speed")
    )


def cpu_generation() -> str:
    """A table of rates, and one of what they make of the machine."""
    if not measured("cpu_generation"):
        return "Not yet measured: `python scripts/benchmarks/cpu_generation.py` measures it."
    data = result("cpu_generation")
    kinds = [
        kind
        for kind in data["rows"][0]
        if isinstance(data["rows"][0][kind], dict) and "spread" in data["rows"][0][kind]
    ]
    rows = [
        [row["side"], f"{row['weights_bytes'] / 1e9:.2f}", *(_rate(row.get(kind)) for kind in kinds), *_machine(row)]
        for row in data["rows"]
    ]
    titles = {"decode": "decode tokens/s, batch 1", "prefill": f"prefill tokens/s, {data['prefill_tokens']} tokens"}
    header = [f"{data['shapes']} shapes, {data['layers']} layers", "weights GB",
              *(titles.get(kind, f"{kind.replace('decode', 'batch')}, tokens/s") for kind in kinds),
              "decode GB/s (of reading)", "prefill Gop/s a core"]  # fmt: skip
    failed = "".join(f"\n\nNot measured: {side} ({reason})." for side, reason in data["failed"].items())
    where = f"\n\nInstructions: {data['instructions']}. Reading memory gives {data['read_gb_per_s']:.1f} GB/s here."
    return markdown(header, rows) + failed + where + source(data, "cpu_generation")


def _rate(found: dict | None) -> str:
    if found is None:
        return ""
    low, high = found["spread"]
    over = f", {found['over_baseline']:.2f}x" if "over_baseline" in found else ""
    return f"{found['tokens_per_second']:.1f} ({low:.1f} to {high:.1f}){over}"


def _machine(row: dict) -> list[str]:
    decode, prefill = row.get("decode", {}), row.get("prefill", {})
    read = (
        f"{decode['gb_per_s']:.1f} ({decode['share_of_reading']:.0%})".replace("%", " %")
        if "gb_per_s" in decode
        else ""
    )
    return [read, f"{prefill['gop_per_s_per_core']:.0f}" if "gop_per_s_per_core" in prefill else ""]


def cpu_products() -> str:
    return _products("cpu_products")


def cpu_products_amx() -> str:
    return _products("cpu_products_amx")


def _products(file: str) -> str:
    """For each shape and number of rows, what each variant reaches."""
    if not measured(file):
        return f"Not yet measured: `python scripts/benchmarks/cpu_products.py --save {file}` measures it."
    data = result(file)
    names = list(dict.fromkeys((row["variant"], row["level"]) for row in data["rows"]))
    rows = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in data["rows"]):
        for count in dict.fromkeys(row["rows"] for row in data["rows"]):
            found = {
                (row["variant"], row["level"]): row
                for row in data["rows"]
                if tuple(row["shape"]) == shape and row["rows"] == count
            }
            cells = [f"{found[name]['gop_per_s_per_core']:.0f} ({found[name]['gb_per_s']:.1f})" for name in names]
            rows.append(["x".join(map(str, shape)), str(count), *cells])
    header = [f"{data['scheme']}: Gop/s a core (GB/s of weights)", "rows", *(" ".join(name) for name in names)]
    busy = "\n\nOf processor time, the least of the rounds: the machine had other work." if data["busy"] else ""
    return markdown(header, rows) + busy + source(data, "cpu_products")


def int8_inputs() -> str:
    data = result("int8_inputs")
    rows = [
        [row["model"], row["scheme"], f"{row['kl_quantization']:.5f}", f"{row['kl_inputs']:.5f}",
         f"{100 * row['share']:.1f} %", f"{100 * row['top1_agreement']:.1f} %"]
        for row in data["rows"]
    ]  # fmt: skip
    header = ["", "scheme", "KL of quantization (nats)", "KL of int8 inputs", "share", "same next token"]
    return markdown(header, rows) + source(data, "int8_inputs")


def int8_head() -> str:
    if not measured("int8_head"):
        return "Not yet measured: `python scripts/benchmarks/int8_head.py` measures it."
    data = result("int8_head")
    rows = [
        [row["model"], row["scheme"], "x".join(map(str, row["shape"])), f"{row['kl']:.6f}", f"{row['kl_p99']:.5f}",
         f"{100 * row['top1_agreement']:.1f} %"]
        for row in data["rows"]
    ]  # fmt: skip
    header = ["output embedding in 8 bits", "scheme", "shape", "mean KL (nats)", "99th percentile", "same next token"]
    return markdown(header, rows) + source(data, "int8_head")


def cpu_experts() -> str:
    if not measured("cpu_experts"):
        return "Not yet measured: `python scripts/benchmarks/cpu_experts.py --save` measures it."
    data = result("cpu_experts")
    variants = list(dict.fromkeys(row["variant"] for row in data["rows"]))
    found = {(row["shapes"], row["tokens"], row["variant"]): row for row in data["rows"]}
    rows = []
    for shapes, tokens in dict.fromkeys((row["shapes"], row["tokens"]) for row in data["rows"]):
        of_case = [found[shapes, tokens, variant] for variant in variants]
        cells = [f"{row['ms']:.1f} ({row['gb_per_s']:.1f}, {row['gop_per_s_per_core']:.0f})" for row in of_case]
        rows.append([shapes, str(tokens), f"{of_case[0]['used']} of {of_case[0]['experts']}", *cells])
    header = [f"{data['scheme']}, {data['instructions']}", "tokens", "experts used",
              *(f"{variant}: ms (GB/s, Gop/s a core)" for variant in variants)]  # fmt: skip
    busy = "\n\nOf processor time, the least of the rounds: the machine had other work." if data["busy"] else ""
    return markdown(header, rows) + busy + source(data, "cpu_experts")


def taken_core() -> str:
    if not measured("taken_core"):
        return "Not yet measured: `python scripts/benchmarks/taken_core.py` measures it."
    data = result("taken_core")
    rows = []
    for row in data["rows"]:
        low, high = row["spread"]
        rows.append([row["case"], f"{row['tokens_per_second']:.1f} ({low:.1f} to {high:.1f})"])
    header = [f"{data['shapes']} shapes, {data['layers']} layers, {data['threads']} threads", "decode tokens/s"]
    return markdown(header, rows) + source(data, "taken_core")


def concurrency() -> str:
    data = result("concurrency")
    speeds = {(row["how"], row["requests"]): row["tokens_per_second"] for row in data["rates"]}
    requests = sorted({number for _, number in speeds})
    rows = []
    for how in dict.fromkeys(how for how, _ in speeds):
        alone = speeds[how, 1]
        shown = [f"{speeds[how, number]:.1f} ({speeds[how, number] / alone:.2f}x)" for number in requests[1:]]
        rows.append([how, f"{alone:.1f}", *shown])
    header = [f"tokens/s, {data['shapes']} shapes, {data['layers']} layers", *(f"{n} at once" for n in requests)]
    what = (
        f"\n\n{data['weights']}; {data['prompt_tokens']} prompt tokens and {data['new_tokens']} new ones each; "
        "in brackets: of one alone in the same way."
    )
    return markdown(header, rows) + what + source(data, "concurrency")


def finetune() -> str:
    """LoRA on packed weights, beside NF4 and the dense model."""
    data = result("finetune_nf4")
    rows = [
        [side, f"{run['weights_bytes'] / 1e6:.0f}", f"{run['peak_bytes'] / 1e6:.0f}",
         f"{run['tokens_per_second']:.0f} ({min(run['rates']):.0f} to {max(run['rates']):.0f})",
         f"{run['first_loss']:.2f} to {run['last_loss']:.2f}"]
        for side, run in data["sides"].items() if "missing" not in run
    ]  # fmt: skip
    header = [f"LoRA on {data['model']}", "weights MB", "peak MB", "tokens/s", "loss"]
    what = f"\n\n{data['steps']} steps of {data['batch']} x {data['length']} tokens, {data['rounds']} rounds"
    return markdown(header, rows) + what + source(data, "finetune_nf4")
