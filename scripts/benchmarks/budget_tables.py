"""The tables of docs/budget.md."""

from rendering import markdown, result, source


def budgets() -> str:
    data = result("budgets")
    rows = []
    for row in (row for row in data["rows"] if row.get("bits")):
        uniform = [
            other for other in data["rows"]
            if other.get("scheme") and other["method"] == row["method"] and other["bytes"] <= row["bytes"]
        ]  # fmt: skip
        best = min(uniform, key=lambda other: other["kl_mean"])
        rows.append([
            row["method"], f"{row['bits_per_weight']:.2f}", f"{row['predicted_kl']:.4f}", f"{row['kl_mean']:.4f}",
            f"{best['scheme']}, {best['bits_per_weight']:.2f}", f"{best['kl_mean']:.4f}",
            f"{row['kl_mean'] / best['kl_mean'] - 1:+.0%}",
        ])  # fmt: skip
    header = ["method", "bits", "predicted KL", "real KL", "best scheme for all of no more bytes", "its KL", ""]
    return markdown(header, rows) + source(data, "budgets")
