"""lowbit dequantize"""

from typing import Annotated

import typer

from lowbit.cli.common import (
    JsonOption,
    ModelArgument,
    ModelOption,
    OutputOption,
    OverwriteOption,
    RevisionOption,
    ShardSizeOption,
    TrustOption,
    one_model,
    one_output,
    quiet_transformers,
    size,
)
from lowbit.cli.ending import interrupted_once
from lowbit.cli.terminal import console, counted_progress, print_json


def dequantize(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    output_dir: OutputOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32 for all of it (default: as stored).", show_default=False),
    ] = None,
    max_shard_size: ShardSizeOption = "5GB",
    overwrite: OverwriteOption = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Write a quantized model as a plain one, of the weights that its codes stand for: any tool reads it."""
    name, target = one_model(model, model_option), one_output(output_dir, overwrite)
    from lowbit.conversion.formats import dequantize as run

    quiet_transformers()
    with interrupted_once(), counted_progress("dequantizing", json) as on_start:
        done = run(
            name,
            target,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            on_start=on_start,
        )
    if json:
        print_json(done.to_dict())
        return
    console.print(f"{done.weights} weights dequantized: {size(done.source_bytes)} -> {size(done.output_bytes)}")
    for note in done.notes:
        console.print(note)
    console.print(f"written to {done.output}")
