"""From results/*.json to tables in Markdown."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(data: dict, script: str, arguments: str = "") -> str:
    facts = data["facts"]
    return (
        f"\n\n{facts['date'][:10]}, {facts['cpu']}, torch {facts['torch']}, transformers {facts['transformers']}; "
        f"`python scripts/benchmarks/{script}.py{arguments}`"
    )
