"""lowbit dequantize"""

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
from lowbit.conversion.options import DenseOptions
from lowbit.options import OutputOptions, SourceOptions, keywords


def dequantize(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    output_dir: OutputOption = None,
    *,
    dense: DenseOptions,
    output: OutputOptions,
    source: SourceOptions,
    json: JsonOption = False,
):
    """Write a quantized model as a plain one, of the weights that its codes stand for: any tool reads it."""
    name, target = one_model(model, model_option), one_output(output_dir, output.overwrite)
    with heavy_imports():
        from lowbit.conversion.formats import dequantize as run

    with interrupted_once(), counted_progress("dequantizing", json) as on_start:
        done = run(name, target, **keywords(dense, output, source), on_start=on_start)
    if json:
        print_json(done.to_dict())
        return
    console.print(f"{done.weights} weights dequantized: {size(done.source_bytes)} -> {size(done.output_bytes)}")
    for note in done.notes:
        console.print(note)
    console.print(f"written to {done.output}")
