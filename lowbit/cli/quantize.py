"""lowbit quantize"""

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
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
    console,
    interrupted_once,
    notes,
    one_model,
    one_output,
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
    output_dir: OutputOption = None,
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
    method: Annotated[
        str, typer.Option(help="rtn (round to nearest, no data), or gptq (error compensation, calibrated).")
    ] = "rtn",
    scale_search: Annotated[
        str | None, typer.Option(help="Of rtn: minmax or mse; of gptq: columns or minmax.", show_default=False)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for the method: gptq has order, scale_search, damping, drift, sweeps.", show_default=False
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="What gptq calibrates with: a name of `datasets` (org/name[:config[:split[:column]]]), a txt, jsonl "
            "or parquet file, token ids (.safetensors, .npy), or self: text that the model itself writes. "
            "Default: a public data set, or self where it cannot be reached.",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a sample.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    redo: Annotated[
        str | None,
        typer.Option(
            help="Regex of modules of an unfinished run: do their layers and all later ones again.", show_default=False
        ),
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output embedding too.")] = False,
    include_vision: Annotated[
        bool,
        typer.Option(
            "--include-vision", help="Of a model that sees or hears, quantize all of it, not its language model alone."
        ),
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="e.g. 8GB: walk layers again rather than hold more (default: half of what is free).",
            show_default=False,
        ),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="REGEX=SCHEME for the modules it matches; repeatable.", show_default=False)
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Regex of modules to leave alone; repeatable.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq or awq.")] = "compressed-tensors",
    max_shard_size: ShardSizeOption = "5GB",
    overwrite: OverwriteOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and report; write nothing.")] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Quantize a model into a folder that transformers and vLLM load.

    Reads and writes tensor by tensor, with gptq layer by layer: a model may be larger than memory. The folder appears
    whole or not at all; a gptq run that was stopped goes on where it was when the same command is given again.
    """
    from lowbit.pipeline import quantize as run

    model = one_model(model, model_option)
    target = Path("dry-run-output") if dry_run and output_dir is None else one_output(output_dir)
    if scheme is not None and bits is not None:
        raise UsageError("--scheme and --bits say the same thing: pass one of them")
    quiet_transformers()
    with interrupted_once(), ExitStack() as stack:

        def on_plan(plan):
            total = sum(step.source.nbytes for step in plan.steps)
            advance = stack.enter_context(progress("quantizing", total, quiet=json or dry_run))
            return lambda step, note: advance(step.source.nbytes, note or step.source.name)

        report = run(
            model,
            target,
            scheme=scheme or (f"W{bits}A16" if bits is not None else "W4A16"),
            group_size=group_size,
            sym=sym,
            method=method,
            options=_options(option, scale_search),
            overrides=[_override(text) for text in override or ()],
            ignore=ignore or (),
            lm_head=lm_head,
            include_vision=include_vision,
            dataset=dataset,
            num_samples=num_samples,
            seqlen=seqlen,
            seed=seed,
            redo=redo,
            max_memory=max_memory,
            format=format,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            dry_run=dry_run,
            revision=revision,
            trust_remote_code=trust_remote_code,
            command=typed_command(),
            on_plan=on_plan,
            announce=lambda line: notes.print(line, markup=False),
        )
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes: the first one speaks
    if json:
        print_json(report.to_dict())
    else:
        _show(report, dry_run, output_dir)


def typed_command() -> str:
    """What was typed, to be typed again."""
    processes = os.environ.get("WORLD_SIZE", "1")
    program = ["lowbit"] if processes == "1" else ["torchrun", "--nproc-per-node", processes, "-m", "lowbit"]
    return shlex.join([*program, *sys.argv[1:]])


def _options(texts: list[str] | None, scale_search: str | None) -> dict[str, str]:
    options = {} if scale_search is None else {"scale_search": scale_search}
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"option {text!r} is not understood; expected NAME=VALUE, e.g. damping=0.05")
        options[name.replace("-", "_")] = value
    return options


def _override(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator:
        raise UsageError(f"override {text!r} is not understood; expected REGEX=SCHEME, e.g. '.*down_proj=W8A16'")
    return pattern, scheme


def _show(report, dry_run: bool, output_dir: Path | None) -> None:
    rows = table("", "before", "after")
    rows.add_row("weights", size(report.source_bytes), size(report.output_bytes))
    rows.add_row("bits per quantized weight", "", f"{report.bits_per_weight:.2f}")
    console.print(rows)
    console.print(
        f"{report.quantized_tensors} weight tensors quantized, {report.quantized_share:.1%} of the bytes"
        + ("" if dry_run else f"; {_error(report)}; {report.seconds:.1f} s")
    )
    if report.calibration and not dry_run:
        _show_calibration(report)
    if report.fallbacks:
        console.print("other group size, because theirs does not divide in_features:")
        for name, scheme in report.fallbacks.items():
            console.print(f"  {name}: {scheme}")
    if report.left_alone:
        console.print("left alone:")
        for name, reason in report.left_alone.items():
            console.print(f"  {name}: {reason}")
    console.print("dry run: nothing was written" if dry_run else f"written to {output_dir}")


def _error(report) -> str:
    if report.calibration:
        return f"relative output error {report.mean_output_error:.4f}"
    return f"mean relative error {report.mean_error:.4f}"


def _show_calibration(report) -> None:
    used = report.calibration
    console.print(
        f"calibrated with {used['samples']} samples, {used['tokens']:,} tokens: {used['source']}; "
        f"peak memory {size(report.peak_memory)}"
    )
    worst = table("largest output errors", "scheme", "tokens", "error", "to the original", title=None)
    for layer in report.worst(5):
        worst.add_row(
            layer["name"].removesuffix(".weight"), layer["scheme"], f"{layer['tokens']:,}",
            f"{layer['output_error']:.4f}", f"{layer['output_error_to_original']:.4f}",
        )  # fmt: skip
    console.print(worst)
    for layer in report.layers:
        if layer.get("note"):
            expert = f" expert {layer['expert']}" if "expert" in layer else ""
            console.print(f"  {layer['name']}{expert}: {layer['note']}")
