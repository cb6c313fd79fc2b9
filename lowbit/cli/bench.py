"""lowbit bench"""

import json as json_module
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import (
    BackendOption,
    DeviceMapOption,
    DtypeOption,
    HeadFlags,
    JsonOption,
    ModelOption,
    RevisionOption,
    TrustOption,
    check_known,
    checked_dtype,
    default_device_map,
    quiet_transformers,
    size,
)
from lowbit.cli.ending import interrupted_once
from lowbit.cli.terminal import console, print_json, status, table
from lowbit.errors import LowbitError, OutputError, UsageError
from lowbit.numerics.scheme import Scheme

_PACKAGES = ("lowbit", "torch", "transformers", "triton", "bitsandbytes", "torchao", "gptqmodel")


class _Interrupted(LowbitError):
    exit_code = 130


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A folder, a Hub id, or 'reference'; quantized or not.", show_default=False
        ),
    ] = None,
    model_option: ModelOption = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Random weights in the shapes of a known model: llama-3.1-8b, ...", show_default=False),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Of --shapes: so many layers, no more; nothing is scaled up.", show_default=False)
    ] = None,
    scheme: Annotated[str, typer.Option(help="Of --shapes, or of a MODEL that is not quantized yet.")] = "W4A16-G128",
    method: Annotated[str, typer.Option(help="How a MODEL that is not quantized yet is quantized.")] = "rtn",
    source: Annotated[
        str | None,
        typer.Option(help="What a quantized MODEL was made from (default: dequantize it).", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences at a time.")] = "1,4,16,64",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are generated for each.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is measured.")] = 3,
    against: Annotated[
        str, typer.Option(help="What else is measured: unquantized, bitsandbytes, torchao, gptqmodel, or none.")
    ] = "unquantized,bitsandbytes,torchao,gptqmodel",
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    backend: BackendOption = None,
    *,
    head: HeadFlags,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON here too.", show_default=False)] = None,
    json: JsonOption = False,
):
    """Measure how fast a model runs here, beside the same model unquantized and quantized by other tools.

    Decoding, prefill, time to the first token, memory, and how much of the memory bandwidth of this machine a step
    uses. The sides take turns; each runs in lowbit's loop and in `model.generate`.
    """
    batches, head_scheme = _batches(batch), head.scheme()
    parsed, dtype = Scheme.parse(scheme), checked_dtype(dtype)
    _check_what(model, model_option, shapes, layers, source, revision, trust_remote_code)
    check_known(method=method)
    if out is not None and not out.absolute().parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {out.absolute().parent}")
    import torch

    from lowbit.bench.contestants import Checkpoint, Setting, Shapes
    from lowbit.bench.peers import parse_against
    from lowbit.bench.repeats import Bench
    from lowbit.guards.safe_files import write_whole

    wanted, device = parse_against(against), _device(default_device_map(device_map))
    quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as work, interrupted_once():
        setting = Setting(
            Path(work), device, dtype, backend, head_scheme and Scheme.parse(head_scheme), revision, trust_remote_code
        )
        if shapes is None:
            measured = Checkpoint(model if model is not None else model_option, source, parsed, method, setting)
        else:
            measured = Shapes(shapes, layers, parsed, setting)
        subject, others = measured.subject(), measured.others(*wanted)
        with status(quiet=json) as say:
            running = Bench(torch.device(device), batches, prompt_tokens, new_tokens, rounds, on_run=say)
            try:
                running.compare(subject, others)
                interrupted = False
            except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or `kill`
                interrupted = True
    result = {"facts": _facts(device), "model": measured.describes, **running.result()}
    if out is not None:
        write_whole(out, json_module.dumps(result, indent=2) + "\n")
    print_json(result) if json else _show(result)
    if interrupted:
        raise _Interrupted("interrupted: what is shown was measured before")


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise UsageError(f"batch is {text!r}; expected numbers from 1 on: 1,4,16,64")
    return batches


def _device(device_map: str | None) -> str:
    import torch

    try:
        return str(torch.device(device_map or "cpu"))
    except RuntimeError:
        raise UsageError(f"device_map is {device_map!r}: expected one device, such as cpu, cuda or cuda:1") from None


def _check_what(model, model_option, shapes, layers, source, revision, trust_remote_code) -> None:
    if sum(given is not None for given in (model, model_option, shapes)) != 1:
        raise UsageError("expected one MODEL (a folder, a Hub id, or 'reference'), or --shapes NAME")
    if shapes is None and layers is not None:
        raise UsageError("--layers is for --shapes: a MODEL has those it has")
    if shapes is not None and source is not None:
        raise UsageError("--source is for a quantized MODEL, not for --shapes")
    if shapes is not None and (revision is not None or trust_remote_code):
        raise UsageError("--revision and --trust-remote-code are for a MODEL, not for --shapes")


def _facts(device: str) -> dict:
    import torch

    from lowbit.system.machine import cpu

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "device": name, "python": platform.python_version(), **versions}


def _show(result: dict) -> None:
    from lowbit.bench.peers import PEERS

    facts = result["facts"]
    console.print(f"{result['model']} on {facts['device']}, which moves {result['bytes_per_second'] / 1e9:.1f} GB/s")
    console.print(f"prompts of {result['prompt_tokens']} tokens, {result['new_tokens']} new ones", "")
    sides = table("side", "weights from", "load s", "weights", "peak", "kernels")
    for name, side in result["sides"].items():
        peak = size(side["peak_bytes"]) if side["peak_bytes"] else "-"
        sides.add_row(name, side["origin"], f"{side['load_seconds']:.1f}", size(side["weights_bytes"]), peak,
                      _kernel_names(side["kernels"]) or ("its own" if name in PEERS else "dense"))  # fmt: skip
    console.print(sides)
    for batch in dict.fromkeys(row["batch"] for row in result["rows"]):
        console.print()
        console.print(_rows_of(batch, [row for row in result["rows"] if row["batch"] == batch]))
    for left in result["left_out"]:
        where = [f"batch {left['batch']}" if left["batch"] else None, f"loop {left['loop']}" if left["loop"] else None]
        console.print(f"not measured: {', '.join(filter(None, (left['side'], *where)))}: {left['reason']}")


def _rows_of(batch: int, rows: list[dict]):
    shown = table("side, loop", "tokens/s", "spread", "bandwidth", "first token", "prefill/s", "lowbit is",
                  title=f"batch {batch}")  # fmt: skip
    for row in rows:
        low, high = row["spread"]
        shown.add_row(
            f"{row['side']}, {row['loop']}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{(high - low) / row['decode_tokens_per_second']:.0%}",
            f"{row['bandwidth_share']:.0%}",
            f"{row['first_token_seconds'] * 1e3:.0f} ms",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['slower']:.2f}x" if row["slower"] else "",
        )
    return shown


def _kernel_names(kernels: list[dict]) -> str:
    names = {}
    for found in kernels:
        names.update(dict.fromkeys(found["kernels"].values() or [found["backend"] or "dequantized"]))
    return ", ".join(names)
