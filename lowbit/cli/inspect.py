"""lowbit inspect"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import JsonOption, ModelArgument, ModelOption, console, one_model, print_json, size, table


def inspect(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    layers: Annotated[bool, typer.Option("--layers", help="One row for each quantized module.")] = False,
    json: JsonOption = False,
):
    """Show what is quantized and how, from headers alone."""
    from lowbit.sources import resolve

    summary = summarize(resolve(one_model(model, model_option)))
    if json:
        print_json(summary)
        return
    console.print(f"{summary['architecture']}, {summary['parameters']:,} parameters, {summary['files']} weight file(s)")
    console.print(f"quantization: {summary['format'] or 'none'}")
    parts = table("part", "tensors", "parameters", "bytes", "bits per weight")
    for part in summary["parts"]:
        parts.add_row(
            part["name"],
            str(part["tensors"]),
            f"{part['parameters']:,}",
            size(part["bytes"]),
            f"{part['bits_per_weight']:.2f}",
        )
    parts.add_row(
        "total", "", f"{summary['parameters']:,}", size(summary["bytes"]), f"{summary['bits_per_weight']:.2f}"
    )
    console.print(parts)
    if layers:
        rows = table("module", "scheme", "shape", "bytes")
        for layer in summary["layers"]:
            rows.add_row(layer["name"], layer["scheme"], str(layer["shape"]), size(layer["bytes"]))
        console.print(rows)


def summarize(folder: Path) -> dict:
    """Parts of a checkpoint (each scheme, and what is not quantized) with parameters, bytes and bits per weight."""
    from lowbit.checkpoint import CheckpointReader
    from lowbit.stored import StoredWeights

    reader = CheckpointReader(folder)
    stored = StoredWeights(reader)
    parts, layers = defaultdict(lambda: [0, 0, 0]), []
    for base, weight in stored.weights.items():
        shape = (weight.experts, *weight.shape) if weight.experts else weight.shape
        scheme = weight.scheme.name + (", act-order" if weight.act_order else "")
        layers.append({"name": base, "scheme": scheme, "shape": list(shape), "bytes": weight.nbytes})
        _add(parts[scheme], math.prod(shape), weight.nbytes)
    for tensor in stored.plain:
        _add(parts[str(tensor.dtype).removeprefix("torch.")], tensor.numel, tensor.nbytes)
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    return {
        "architecture": (reader.config.get("architectures") or [reader.config.get("model_type", "unknown")])[0],
        "format": stored.format,
        "files": len(reader.files),
        "parameters": totals[1],
        "bytes": totals[2],
        "bits_per_weight": 8 * totals[2] / max(totals[1], 1),
        "parts": [
            {"name": name, "tensors": count, "parameters": parameters, "bytes": stored,
             "bits_per_weight": 8 * stored / max(parameters, 1)}
            for name, (count, parameters, stored) in sorted(parts.items())
        ],
        "layers": layers,
    }  # fmt: skip


def _add(part: list[int], parameters: int, stored: int) -> None:
    part[0] += 1
    part[1] += parameters
    part[2] += stored
