"""Tables of quality beside other tools, from what quality_peers.py measured."""

from statistics import mean

from rendering import RESULTS, markdown, result, source

_PEER_NAMES = {
    "lowbit": "lowbit",
    "gptqmodel": "GPTQModel",
    "llmcompressor": "llm-compressor",
    "autoround": "AutoRound",
}


def quality_peers() -> str:
    """The best variant of each tool for each scheme, and round to nearest to know the scale."""
    data = result("quality_peers")
    schemes = list(dict.fromkeys(row["scheme"] for row in data["rows"]))
    best = {}
    for row in data["rows"]:
        if "kl_mean" not in row:
            continue
        kind = (
            "round to nearest" if row["variant"].split("+")[1:2] in (["rtn"], ["optrtn"], ["neuqi"]) else "calibrated"
        )
        key = (kind, row["tool"], row["scheme"])
        if key not in best or row["kl_mean"] < best[key]["kl_mean"]:
            best[key] = row
    rows = []
    for kind, tool in dict.fromkeys(
        (kind, tool) for kind, tool, _ in sorted(best, key=lambda k: (k[0], k[1] != "lowbit"))
    ):
        version = _version(next(r for (k, t, _), r in best.items() if (k, t) == (kind, tool)))
        cells = [best.get((kind, tool, scheme)) for scheme in schemes]
        shown = [f"{c['kl_mean']:.5f} ({c['variant'].replace('+', ' ')})" if c else "" for c in cells]
        rows.append([f"{_PEER_NAMES[tool]} {version}, {kind}", *shown])
    return markdown(["mean KL (variant)", *schemes], rows) + source(data, "quality_peers")


def quality_real() -> str:
    """What was measured on the models of real_models.py: mean KL and perplexity, over the seeds."""
    tables = []
    for model in ("smollm2-135m", "gemma3-270m"):
        seeds = [result(file.stem) for file in sorted(RESULTS.glob(f"quality_{model}*.json"))]
        if seeds:
            tables.append(_of_seeds(seeds) + source(seeds[0], "quality_peers", f" --real FOLDER/{model}"))
    return "\n\n".join(tables)


def _of_seeds(seeds: list[dict]) -> str:
    """One table of the results of several seeds, which are samples of the same text."""
    cells: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in (row for seed in seeds for row in seed["rows"] if "kl_mean" in row):
        key = f"{_PEER_NAMES[row['tool']]} {_version(row)}", row["variant"].replace("+", " ")
        cells.setdefault(key, {}).setdefault(row["scheme"], []).append(row)
    schemes = sorted({scheme for found in cells.values() for scheme in found}, reverse=True)
    rows = [
        [f"{tool}, {variant}", *(_cell(found.get(scheme, [])) for scheme in schemes)]
        for (tool, variant), found in sorted(
            cells.items(), key=lambda item: (not item[0][0].startswith("lowbit"), item)
        )
    ]
    samples, seqlen = seeds[0]["calibration"]
    title = f"{seeds[0]['model']}, {samples} x {seqlen} tokens, {len(seeds)} seed(s): mean KL (perplexity)"
    return markdown([title, *schemes], rows)


def _cell(rows: list[dict]) -> str:
    if not rows:
        return ""
    return f"{mean(row['kl_mean'] for row in rows):.3f} ({mean(row['perplexity'] for row in rows):.1f})"


def _version(row: dict) -> str:
    return next(version for name, version in row["versions"].items() if name.replace("-", "") == row["tool"])
