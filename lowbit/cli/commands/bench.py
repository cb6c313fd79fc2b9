"""lowbit bench"""

import json as json_module
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import (
    HeadChoice,
    JsonOption,
    ModelOption,
    check_known,
    checked_dtype,
    default_device_map,
    heavy_imports,
    size,
)
from lowbit.cli.ending import interrupted_once
from lowbit.cli.terminal import console, print_json, status, table
from lowbit.errors import LowbitError, OutputError, UsageError
from lowbit.numerics.scheme import Scheme
from lowbit.options import DeviceOptions, SourceOptions, changed, option

_PACKAGES = ("lowbit", "torch", "transformers", "triton", "bitsandbytes", "torchao", "gptqmodel")


class _Interrupted(LowbitError):
    exit_code = 130


@dataclass(frozen=True)
class SubjectOptions:
    """What is measured."""

    shapes: str | None = option(None, "Random weights in the shapes of a known model: llama-3.1-8b, ...")
    layers: int | None = option(None, "Of --shapes: so many layers, no more; nothing is scaled up.")
    scheme: str = option("W4A16-G128", "Of --shapes, or of a MODEL that is not quantized yet.")
    method: str = option("rtn", "How a MODEL that is not quantized yet is quantized.")
    source: str | None = option(None, "What a quantized MODEL was made from (default: dequantize it).")


@dataclass(frozen=True)
class RunsOptions:
    """What it is measured with, and against what."""

    batch: str = option("1,4,16,64", "Sequences at a time.")
    prompt_tokens: int = option(512, "Tokens of each prompt.", least=1)
    new_tokens: int = option(64, "Tokens that are generated for each.", least=2)
    rounds: int = option(3, "How often each side is measured.", least=1)
    against: str = option(
        "unquantized,bitsandbytes,torchao,gptqmodel",
        "What else is measured: unquantized, bitsandbytes, torchao, gptqmodel, or none.",
    )
    concurrency: str | None = option(
        None, "Measure `lowbit serve` instead, with so many requests at once, in each of its ways: 1,4,16."
    )


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, a GGUF file, a Hub id, or 'reference'; quantized or not.",
            show_default=False,
        ),
    ] = None,
    model_option: ModelOption = None,
    *,
    subject: SubjectOptions,
    runs: RunsOptions,
    device: DeviceOptions,
    head: HeadChoice,
    origin: SourceOptions,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON here too.", show_default=False)] = None,
    json: JsonOption = False,
):
    """Measure how fast a model runs here, beside the same model unquantized and quantized by other tools.

    Decoding, prefill, time to the first token, memory, and how much of the memory bandwidth of this machine a step
    uses. The sides take turns; each runs in lowbit's loop and in `model.generate`.
    """
    batches, head_scheme = _numbers("batch", runs.batch), head.scheme()
    concurrency = None if runs.concurrency is None else _numbers("concurrency", runs.concurrency)
    scheme = Scheme.parse(subject.scheme)
    checked_dtype(device.dtype)
    _check_what(model, model_option, subject, origin)
    check_known(method=subject.method)
    if out is not None and not out.absolute().parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {out.absolute().parent}")
    with heavy_imports():
        import torch

        from lowbit.bench.contestants import Checkpoint, Setting, Shapes
        from lowbit.bench.peers import parse_against
        from lowbit.bench.repeats import Bench
        from lowbit.hf.head import wanted_head

    wanted, place = parse_against(runs.against), _device(default_device_map(device.device_map))
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as work, interrupted_once():
        setting = Setting(
            Path(work), place, device.dtype, device.backend, wanted_head(head_scheme),
            origin.revision, origin.trust_remote_code, device.exact,
        )  # fmt: skip
        if subject.shapes is None:
            name = model if model is not None else model_option
            measured = Checkpoint(name, subject.source, scheme, subject.method, setting)
        else:
            measured = Shapes(subject.shapes, subject.layers, scheme, setting)
        if concurrency is not None:
            result = _served(measured, concurrency, runs, _facts(place), quiet=json)
            _hand_over(result, out, json, _show_rates)
            return
        first, others = measured.subject(), measured.others(*wanted)
        with status(quiet=json) as say:
            running = Bench(torch.device(place), batches, runs.prompt_tokens, runs.new_tokens, runs.rounds, on_run=say)
            try:
                running.compare(first, others)
                interrupted = False
            except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or `kill`
                interrupted = True
    result = {"facts": _facts(place), "model": measured.describes, **running.result()}
    _hand_over(result, out, json, _show)
    if interrupted:
        raise _Interrupted("interrupted: what is shown was measured before")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{name} is {text!r}; expected numbers from 1 on: 1,4,16,64")
    return numbers


def _hand_over(result: dict, out: Path | None, json: bool, show) -> None:
    from lowbit.guards.safe_files import write_whole

    if out is not None:
        write_whole(out, json_module.dumps(result, indent=2) + "\n")
    print_json(result) if json else show(result)


def _served(measured, requests: tuple[int, ...], runs: RunsOptions, facts: dict, quiet: bool) -> dict:
    """What `lowbit serve` makes of so many requests at once."""
    from lowbit.server.concurrency import measure

    side = measured.subject()
    with status(quiet=quiet) as say:
        say(f"loading {side.name}")
        model = side.load()
        model.generation_config.eos_token_id = None
        rates, left_out = measure(
            model, requests, runs.prompt_tokens, runs.new_tokens,
            lambda rate: say(f"{rate.how}, {rate.requests} at once: {rate.tokens_per_second:.1f} tokens/s"),
        )  # fmt: skip
    return {
        "facts": facts, "model": measured.describes, "weights": side.origin, "prompt_tokens": runs.prompt_tokens,
        "new_tokens": runs.new_tokens, "rates": [rate.as_dict() for rate in rates], "left_out": left_out,
    }  # fmt: skip


def _show_rates(result: dict) -> None:
    console.print(f"{result['model']} on {result['facts']['device']}, weights {result['weights']}")
    console.print(f"prompts of {result['prompt_tokens']} tokens, {result['new_tokens']} new ones", "")
    rates = table("requests at once", "tokens/s", "seconds", "of one")
    alone: dict[str, float] = {}
    for rate in result["rates"]:
        first = alone.setdefault(rate["how"], rate["tokens_per_second"])
        rates.add_row(
            f"{rate['requests']}, {rate['how']}", f"{rate['tokens_per_second']:.1f}", f"{rate['seconds']:.2f}",
            f"{rate['tokens_per_second'] / first:.2f}x",
        )  # fmt: skip
    console.print(rates)
    for how, reason in result["left_out"].items():
        console.print(f"not measured: {how}: {reason}")


def _device(device_map: str | None) -> str:
    import torch

    try:
        return str(torch.device(device_map or "cpu"))
    except RuntimeError:
        raise UsageError(f"device_map is {device_map!r}: expected one device, such as cpu, cuda or cuda:1") from None


def _check_what(model: str | None, model_option: str | None, subject: SubjectOptions, origin: SourceOptions) -> None:
    if sum(given is not None for given in (model, model_option, subject.shapes)) != 1:
        raise UsageError("expected one MODEL (a folder, a Hub id, or 'reference'), or --shapes NAME")
    if subject.shapes is None and subject.layers is not None:
        raise UsageError("--layers is for --shapes: a MODEL has those it has")
    if subject.shapes is not None and subject.source is not None:
        raise UsageError("--source is for a quantized MODEL, not for --shapes")
    if subject.shapes is not None and changed(origin):
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
        rounded = "" if found["inputs"] == "exact" else f" ({found['inputs']})"
        names.update(dict.fromkeys(found["kernels"].values() or [(found["backend"] or "dequantized") + rounded]))
    return ", ".join(names)
