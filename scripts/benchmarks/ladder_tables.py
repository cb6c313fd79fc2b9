"""The tables of docs/ladder.md."""

from rendering import markdown, result, source


def ladder() -> str:
    data = result("ladder")
    rows = [
        [row["rung"], _how(row), f"{row['file_bytes'] / 1e6:.2f}", f"{row['memory_bytes'] / 1e6:.2f}",
         f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}",
         f"{row['kl_mean']:.5f}", f"{100 * row['top1_agreement']:.1f} %"]
        for row in data["rows"]
    ]  # fmt: skip
    header = ["", "embedded model", "file MB", "memory MB", "bits per weight", "perplexity", "mean KL (nats)",
              "top-1 agreement"]  # fmt: skip
    return markdown(header, rows) + source(data, "ladder")


def _how(row: dict) -> str:
    """The scheme, and what else it was made with."""
    settings = row["settings"]
    ranges = settings.get("activation_range")
    parts = [row["scheme"], settings.get("method"), *settings.get("options", {}).values(), ranges]
    return ", ".join(filter(None, parts))


def ladder_speed() -> str:
    data = result("ladder_speed")
    base = {kind: data["rows"][1][kind]["fastest"] for kind in ("decode", "prefill")}
    rows = []
    for row in data["rows"]:
        rates = [(row[kind]["fastest"], rate) for kind, rate in base.items()]
        cells = [cell for now, rate in rates for cell in (f"{now:.1f}", f"{now / rate:.2f}x")]
        rows.append([row["scheme"], f"{row['memory_bytes'] / 1e6:.0f}", *cells])
    header = [f"{data['layers']} layers, {data['shapes']} shapes", "weights MB", "decode tokens/s, batch 1", "of BF16",
              f"prefill tokens/s, {data['prefill_tokens']} tokens", "of BF16"]  # fmt: skip
    return markdown(header, rows) + source(data, "ladder_speed")


_COLUMNS = {
    "bf16_ms": "BF16", "fp32_ms": "FP32", "W8A8-CHANNEL_native_ms": "W8A8", "W4A8-G128_native_ms": "W4A8",
    "W8A8-CHANNEL_int8_cpu_ms": "W8A8, no C compiler", "W4A8-G128_int8_cpu_ms": "W4A8, no C compiler",
}  # fmt: skip


def int8_linear() -> str:
    data = result("int8_linear")
    rows = [[str(row["rows"]), *(f"{row[name]:.1f}" for name in _COLUMNS)] for row in data["rows"]]
    header = [f"rows, {' x '.join(map(str, data['shape']))}", *(f"{name}, ms" for name in _COLUMNS.values())]
    return markdown(header, rows) + source(data, "int8_linear")
