"""lowbit merge"""

from typing import Annotated

import typer

from lowbit.cli.commands.quantize import typed_command
from lowbit.cli.common import (
    JsonOption,
    OutputOption,
    check_known,
    default_device_map,
    heavy_imports,
    one_output,
    size,
)
from lowbit.cli.ending import interrupted_once
from lowbit.cli.terminal import console, counted_progress, notes, print_json, table
from lowbit.options import (
    CalibrationOptions,
    ComparisonOptions,
    MergeOptions,
    OutputOptions,
    SourceOptions,
    keywords,
)


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, or 'reference'.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder or Hub id of a LoRA adapter of PEFT.")],
    output_dir: OutputOption = None,
    *,
    how: MergeOptions,
    calibration: CalibrationOptions,
    comparison: ComparisonOptions,
    output: OutputOptions,
    source: SourceOptions,
    json: JsonOption = False,
):
    """Merge a LoRA adapter into a model, dense or quantized, and measure what that costs.

    A dense model stays dense. Of a quantized one the weights that the adapter changes are rounded again in the scheme
    that they have, and all others keep every bit; --method quantizes all of it anew.
    """
    target = one_output(output_dir, output.overwrite)
    known = {"format": how.format, "method": how.method}
    check_known(**{name: value for name, value in known.items() if value is not None})
    with heavy_imports():
        from lowbit.merging.run import merge as run

    options = keywords(how, calibration, comparison, output, source)
    options["device_map"] = default_device_map(comparison.device_map)
    with interrupted_once(), counted_progress("merging", json) as on_start:
        done = run(model, adapter, target, **options, on_start=on_start, announce=notes.print, command=typed_command())
    if json:
        print_json(done.to_dict())
    else:
        _show(done)


def _show(done) -> None:
    console.print(f"{len(done.merged)} tensors merged: {size(done.source_bytes)} -> {size(done.output_bytes)}")
    if done.requantized:
        console.print(f"{done.requantized} weights quantized again by {done.method}, stored as {done.format}")
    if done.untied:
        console.print("the output embedding was tied to the input embedding and is a tensor of its own now")
    if done.quality:
        rows = table("", "merged", "adapter beside the model")
        found = done.quality
        rows.add_row("perplexity", f"{found['perplexity']:.3f}", f"{found['reference_perplexity']:.3f}")
        rows.add_row("mean KL divergence (nats)", f"{found['kl_mean']:.5f}", "0")
        rows.add_row("99th percentile KL", f"{found['kl_p99']:.5f}", "0")
        rows.add_row("top-1 agreement", f"{found['top1_agreement']:.2%}", "100%")
        console.print(rows)
        console.print(f"{found['tokens']:,} tokens of {found['dataset']} in windows of {found['seqlen']}")
    console.print(f"written to {done.output}")
