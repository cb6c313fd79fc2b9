"""lowbit convert"""

from typing import Annotated

import typer

from lowbit.cli.common import (
    JsonOption,
    ModelArgument,
    ModelOption,
    OutputOption,
    heavy_imports,
    one_model,
    one_output,
    size,
)
from lowbit.cli.ending import interrupted_once
from lowbit.cli.terminal import console, counted_progress, print_json
from lowbit.conversion.options import ExportOptions
from lowbit.errors import UsageError
from lowbit.formats import FORMATS as READ_AND_WRITTEN
from lowbit.options import OutputOptions, SourceOptions, keywords

# Those of lowbit.formats, and of lowbit.conversion.export, which takes a second to import
FORMATS = (*READ_AND_WRITTEN, "mlx", "gguf")


def convert(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    output_dir: OutputOption = None,
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq, awq, mlx, gguf.")] = "compressed-tensors",
    *,
    output: OutputOptions,
    export: ExportOptions,
    source: SourceOptions,
    json: JsonOption = False,
):
    """Write a quantized model in another format: the same numbers bit for bit, or a refusal that says why.

    Codes, scales and zeros are read back from what was written and compared before the folder appears.
    """
    name, target = one_model(model, model_option), one_output(output_dir, output.overwrite)
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is not known; allowed: {', '.join(FORMATS)}")
    with heavy_imports():
        from lowbit.conversion.formats import convert as run

    with interrupted_once(), counted_progress("converting", json) as on_start:
        done = run(name, target, format=format, **keywords(output, export, source), on_start=on_start)
    if json:
        print_json(done.to_dict())
        return
    console.print(f"{done.source_format} -> {done.format}: {size(done.source_bytes)} -> {size(done.output_bytes)}")
    console.print(f"{done.weights} quantized weights: every number is the same")
    for note in done.notes:
        console.print(note)
    console.print(f"written to {done.output}")
