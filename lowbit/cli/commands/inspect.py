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
    """Show what is quantized and how, from headers alone; and what was chosen for a budget, where one was named."""
    name = one_model(model, model_option)
    from lowbit.folders.locate import resolve
    from lowbit.folders.opened import summarize

    folder = resolve(name, revision)
    summary = summarize(folder)
    allocation = _allocation(folder)
    summary["allocation"] = allocation and allocation.to_dict()
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
    if allocation:
        _show_allocation(allocation)
    if layers:
        rows = table("module", "scheme", "shape", "bytes")
        for layer in (*summary["layers"], *summary["encoded"]):
            rows.add_row(layer["name"], layer["scheme"], str(layer["shape"]), size(layer["bytes"]))
        console.print(rows)


def _allocation(folder):
    """What the report of a folder says of a budget, None where it says nothing, or is no report."""
    from lowbit.checkpoint.report_file import load_report
    from lowbit.errors import InputError
    from lowbit.folders.allocation import Allocation

    try:
        found = load_report(folder).get("allocation")
    except InputError:
        return None
    return Allocation(found) if isinstance(found, dict) and found else None


def _show_allocation(allocation) -> None:
    """Print what each kind of part got for a budget, and the best that other budgets would have got."""
    chosen = table("part", "schemes", "bytes", "KL", title=f"chosen for {allocation.budget}")
    chosen.columns[1].justify = "left"
    for part, schemes, nbytes, kl in allocation.kinds:
        chosen.add_row(part, schemes, size(int(nbytes)), f"{kl:.4f}")
    console.print(chosen)
    if allocation.kl is not None:
        best = allocation.best_uniform
        beside = f"; one scheme for all that is no larger: {best.scheme} with {best.kl:.4f}" if best else ""
        console.print(f"expected mean KL {allocation.kl:.4f} nats per token{beside}")
    points = ", ".join(f"{point.bits:.2f} bits {point.kl:.4f}" for point in allocation.frontier)
    if points:
        console.print(f"the best of other budgets: {points}")
