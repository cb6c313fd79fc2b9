"""The tables of docs/budget.md."""

from rendering import markdown, measured, result, source


def _rows(model: str, data: dict) -> list[list[str]]:
    rows = []
    budgets = (row for row in data["rows"] if row.get("bits"))
    for row in sorted(budgets, key=lambda each: (each["method"], each["bits"])):
        uniform = [
            other for other in data["rows"]
            if other.get("scheme") and other["method"] == row["method"] and other["bytes"] <= row["bytes"]
        ]  # fmt: skip
        best = min(uniform, key=lambda other: other["kl_same_text"])
        ratio = row["kl_same_text"] / best["kl_same_text"] - 1
        rows.append([
            model, row["method"], f"{row['bits_per_weight']:.2f}", f"{row['predicted_kl']:.4f}",
            f"{row['kl_same_text']:.4f}", f"{row['predicted_kl'] / row['kl_same_text'] - 1:+.0%}",
            f"{row['kl_other_text']:.4f}", f"{best['scheme']}, {best['bits_per_weight']:.2f}",
            f"{best['kl_same_text']:.4f}", f"{ratio:+.0%}", f"{row['kl_other_text'] / best['kl_other_text'] - 1:+.0%}",
        ])  # fmt: skip
    return rows


def budgets() -> str:
    embedded, rows = result("budgets"), []
    rows += _rows("embedded", embedded)
    if measured("budgets_smollm2"):
        rows += _rows("SmolLM2-135M", result("budgets_smollm2"))
    header = [
        "model", "method", "bits", "predicted KL", "real KL", "", "on other text", "best scheme for all of no more",
        "its KL", "", "other text",
    ]  # fmt: skip
    return markdown(header, rows) + source(embedded, "budgets")


def running_memory() -> str:
    data, rows = result("running_memory"), []
    for model, name in (("embedded", "running_memory"), ("SmolLM2-135M", "running_memory_smollm2")):
        for row in result(name)["rows"] if measured(name) else []:
            parts = [f"{row[part] / 1e6:.1f}" for part in ("weights", "cache", "working", "peak", "real")]
            load = f"{row['batch']} x {row['context']}"
            ratio = f"{row['peak'] / row['real'] - 1:+.1%}"
            rows.append([model, row["scheme"], row["kv_cache"], load, *parts, ratio])
    header = [
        "model", "scheme", "cache", "tokens", "weights, MB", "cache, MB", "working, MB", "foreseen, MB", "real, MB", "",
    ]  # fmt: skip
    return markdown(header, rows) + source(data, "running_memory")
