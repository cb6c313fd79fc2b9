"""lowbit verify"""

from typing import Annotated

import typer

from lowbit.cli.common import (
    JsonOption,
    ModelArgument,
    ModelOption,
    default_device_map,
    heavy_imports,
    one_model,
)
from lowbit.cli.ending import interrupted_once
from lowbit.cli.terminal import console, print_json, progress, table
from lowbit.errors import UsageError
from lowbit.options import SourceOptions, VerifyOptions, keywords

_WORDS = {True: "ok", False: "FAILED", None: "-"}


def verify(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    reference: Annotated[
        str | None, typer.Option(help="The model it was made from: every tensor is compared.", show_default=False)
    ] = None,
    *,
    checks: VerifyOptions,
    source: SourceOptions,
    json: JsonOption = False,
):
    """Check a quantized folder before it is published: files, tensors, codes, tokenizer, a few generated tokens.

    Exit code 1 if a check fails.
    """
    name = one_model(model, model_option)
    if checks.device_map is not None and not checks.run:
        raise UsageError("--device-map says where the model runs, and --no-run that it does not: pass one of them")
    with heavy_imports():
        from lowbit.eval import verify as run_checks

    options = {**keywords(checks, source), "device_map": default_device_map(checks.device_map)}
    with interrupted_once(), progress("verifying", 1, quiet=json) as advance:
        done = run_checks(name, reference, **options, on_tensor=lambda _, total: advance(1 / total))
    if json:
        print_json(done.to_dict())
    else:
        rows = table("check", "", "found")
        rows.columns[2].justify = "left"
        for check in done.checks:
            rows.add_row(check.name, _WORDS[check.ok], check.detail)
        console.print(rows)
        console.print(f"{name}: " + ("all checks passed" if done.ok else f"{len(done.failures)} check(s) failed"))
    if not done.ok:
        raise typer.Exit(1)
