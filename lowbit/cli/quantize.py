"""lowbit quantize"""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import (
    JsonOption,
    ModelArgument,
    ModelOption,
    RevisionOption,
    TrustOption,
    console,
    interrupted_once,
    one_model,
    print_json,
    progress,
    quiet_transformers,
    size,
    table,
)  # fmt: skip
from lowbit.errors import UsageError


def quantize(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    output_dir: Annotated[
        Path | None, typer.Option("-o", "--output-dir", help="Folder to write.", show_default=False)
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help="W4A16, W8A16-G64, W4A16_ASYM, ... (default W4A16).", show_default=False)
    ] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; instead of --scheme.", show_default=False)] = None,
    group_size: Annotated[
        int | None, typer.Option(help="16 ... 1024, or -1 per channel (default 128).", show_default=False)
    ] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="Symmetric grid, or a zero point per group.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="rtn (round to nearest).")] = "rtn",
    scale_search: Annotated[
        str, typer.Option(help="minmax, or mse: shrink the range where that lowers the error.")
    ] = "minmax",
    override: Annotated[
        list[str] | None, typer.Option(help="REGEX=SCHEME for the modules it matches; repeatable.", show_default=False)
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Regex of modules to leave alone; repeatable.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="compressed-tensors.")] = "compressed-tensors",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and report; write nothing.")] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Quantize a model into a folder that transformers and vLLM load.

    Reads and writes tensor by tensor, so a model may be larger than memory. The folder appears whole or not at all.
    """
    from lowbit.pipeline import quantize as run

    model = one_model(model, model_option)
    if output_dir is None and not dry_run:
        raise UsageError("no output folder: pass -o DIR")
    if scheme is not None and bits is not None:
        raise UsageError("--scheme and --bits say the same thing: pass one of them")
    quiet_transformers()
    with interrupted_once(), ExitStack() as stack:

        def on_plan(plan):
            total = sum(step.source.nbytes for step in plan.steps)
            advance = stack.enter_context(progress("quantizing", total, quiet=json or dry_run))
            return lambda step: advance(step.source.nbytes, step.source.name)

        report = run(
            model,
            output_dir or Path("dry-run-output"),
            scheme=scheme or (f"W{bits}A16" if bits is not None else "W4A16"),
            group_size=group_size,
            sym=sym,
            method=method,
            options={"scale_search": scale_search},
            overrides=[_override(text) for text in override or ()],
            ignore=ignore or (),
            format=format,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            dry_run=dry_run,
            revision=revision,
            trust_remote_code=trust_remote_code,
            on_plan=on_plan,
        )
    if json:
        print_json(report.to_dict())
    else:
        _show(report, dry_run)


def _override(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator:
        raise UsageError(f"override {text!r} is not understood; expected REGEX=SCHEME, e.g. '.*down_proj=W8A16'")
    return pattern, scheme


def _show(report, dry_run: bool) -> None:
    rows = table("", "before", "after")
    rows.add_row("weights", size(report.source_bytes), size(report.output_bytes))
    rows.add_row("bits per quantized weight", "", f"{report.bits_per_weight:.2f}")
    console.print(rows)
    console.print(
        f"{report.quantized_tensors} weight tensors quantized, {report.quantized_share:.1%} of the bytes"
        + ("" if dry_run else f"; mean relative error {report.mean_error:.4f}; {report.seconds:.1f} s")
    )
    if report.fallbacks:
        console.print("other group size, because theirs does not divide in_features:")
        for name, scheme in report.fallbacks.items():
            console.print(f"  {name}: {scheme}")
    if report.left_alone:
        console.print("left alone:")
        for name, reason in report.left_alone.items():
            console.print(f"  {name}: {reason}")
    console.print("dry run: nothing was written" if dry_run else f"written to {report.output}")
