"""lowbit tune"""

import re
from typing import Annotated

import typer

from lowbit.cli.common import JsonOption, RevisionOption
from lowbit.cli.terminal import console, notes, print_json, progress, table
from lowbit.errors import BackendError, UsageError

_SHAPES = re.compile(r"\d+x\d+(,\d+x\d+)*")
_DTYPES = ("bfloat16", "float16")


def tune(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_SHAPES",
            help="A quantized model (folder or Hub id), or OUTxIN shapes: 4096x4096,28672x4096.",
            show_default=False,
        ),
    ],
    rows: Annotated[str, typer.Option(help="Numbers of tokens at a time.")] = "1,2,4,8,16,32,64,128,256,512,1024,2048",
    scheme: Annotated[
        str | None,
        typer.Option(help="Of the shapes (default W4A16-G128); a model has its own.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and scales: bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Which GPU.")] = "cuda",
    revision: RevisionOption = None,
    json: JsonOption = False,
):
    """Find the fastest kernels for a model on this GPU.

    They are remembered in a file. Nothing needs this: without it a rule chooses. The results of each candidate are
    checked before its time counts.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
    counts = _counts(rows)
    import torch

    from lowbit.backends import get_backend, kernels_for

    triton = get_backend("triton")
    cases = []
    for weight_scheme, shape in _weights(what, scheme, revision):
        reason = kernels_for(weight_scheme).refuse(weight_scheme, device, getattr(torch, dtype), shape)
        if reason:
            raise BackendError(f"cannot tune {weight_scheme.name} {list(shape)} on {device}: {reason}")
        cases += [(weight_scheme, shape, count) for count in counts]
    found = []
    with progress("tuning", len(cases), quiet=json) as advance:
        for weight_scheme, shape, count in cases:
            result = kernels_for(weight_scheme).tune(weight_scheme, shape, getattr(torch, dtype), count, device)
            found.append(result)
            advance(1, f"{result['key']}: {result['kernel']}, {result['us']:.1f} us")
    if json:
        print_json({"table": triton.table_of(device), "entries": found})
        return
    shown = table("case", "kernel", "microseconds", "configuration")
    for result in found:
        config = " ".join(f"{name}={value}" for name, value in result["config"].items())
        shown.add_row(result["key"], result["kernel"], f"{result['us']:.1f}", config)
    console.print(shown)
    dropped = {f"{name}: {reason}" for result in found for name, reason in result["dropped"].items()}
    for line in sorted(dropped):
        notes.print(f"left out: {line}")
    console.print(f"written to {triton.table_of(device)}")


def _counts(rows: str) -> list[int]:
    try:
        counts = [int(part) for part in rows.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"rows is {rows!r}; expected numbers from 1 on: 1,16,512")
    return counts


def _weights(what: str, scheme: str | None, revision: str | None) -> list:
    """Distinct (Scheme, (out_features, in_features)): the shapes in `what`, or of a model's quantized layers."""
    from lowbit.folders.locate import resolve
    from lowbit.folders.opened import summarize
    from lowbit.numerics.scheme import Scheme

    if _SHAPES.fullmatch(what):
        if revision is not None:
            raise UsageError(f"--revision is of a model on the Hub, {what} are shapes: leave it out")
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in what.split(",")]
        if min(map(min, shapes)) < 1:
            raise UsageError(f"shapes are {what!r}; expected sizes from 1 on")
        parsed = Scheme.parse(scheme or "W4A16-G128")
        for shape in shapes:
            if not parsed.fits(shape[1]):
                raise UsageError(f"{parsed.name} does not fit {shape[1]} inputs: they are no multiple of the group")
        return [(parsed, shape) for shape in dict.fromkeys(shapes)]
    if scheme is not None:
        raise UsageError(f"--scheme is of shapes, {what} has schemes of its own: leave it out")
    layers = summarize(resolve(what, revision))["layers"]
    if not layers:
        raise UsageError(f"{what} has no quantized layers: give it a quantized model, or shapes such as 4096x4096")
    distinct = dict.fromkeys((layer["scheme"], tuple(layer["shape"][-2:])) for layer in layers)
    return [(Scheme.parse(name), shape) for name, shape in distinct]
