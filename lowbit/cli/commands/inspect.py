"""lowbit inspect"""

from collections import Counter
from typing import Annotated

import typer

from lowbit.cli.common import JsonOption, ModelArgument, ModelOption, RevisionOption, one_model, size
from lowbit.cli.terminal import console, print_json, table


def inspect(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    revision: RevisionOption = None,
    layers: Annotated[bool, typer.Option("--layers", help="One row for each quantized module.")] = False,
    json: JsonOption = False,
):
    """Show what is quantized and how, from headers alone."""
    name = one_model(model, model_option)
    from lowbit.folders.locate import resolve
    from lowbit.folders.opened import summarize

    summary = summarize(resolve(name, revision))
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
    schemes = Counter(layer["scheme"] for layer in summary["layers"])
    if len(schemes) > 1:
        console.print("schemes: " + ", ".join(f"{count} x {scheme}" for scheme, count in schemes.most_common()))
    if layers:
        rows = table("module", "scheme", "shape", "bytes")
        for layer in (*summary["layers"], *summary["encoded"]):
            rows.add_row(layer["name"], layer["scheme"], str(layer["shape"]), size(layer["bytes"]))
        console.print(rows)
