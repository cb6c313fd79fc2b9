"""lowbit doctor"""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from lowbit.cli.common import JsonOption, RevisionOption, TrustOption, default_device_map, heavy_imports
from lowbit.cli.terminal import console, print_json, table
from lowbit.errors import UsageError

_PACKAGES = (
    "lowbit", "torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "triton", "datasets",
    "compressed-tensors", "peft",
)  # fmt: skip
# Tokens at a time: decoding, a small batch, reading a prompt
_ROWS = (1, 16, 512)
_FEW_TOKENS = 8


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Show the kernels for this quantized model too.", show_default=False),
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Show versions, devices, which backends run here, and why others do not; and each GPU's tables of tuned kernels.

    With MODEL, also which kernel runs each of its shapes of layers, for 1, 16 and 512 rows, and why.
    """
    if model is None and (revision is not None or trust_remote_code):
        raise UsageError("--revision and --trust-remote-code are of a MODEL: name one, or leave them out")
    findings = examine(model, revision, trust_remote_code)
    if json:
        print_json(findings)
        return
    versions = table("package", "version")
    for name, found in findings["packages"].items():
        versions.add_row(name, found or "not installed")
    devices = table("device", "")
    for name, text in findings["devices"].items():
        devices.add_row(name, text)
    backends = table("backend", "")
    for name, reason in findings["backends"].items():
        backends.add_row(name, reason or "runs here")
    for shown in (versions, devices, backends):
        console.print(shown)
        console.print()
    if instructions := findings["instructions"]:
        others = ", ".join(instructions["available"])
        console.print(f"the kernels in C run with: {instructions['used']} (of {others})")
        bits = ", ".join(map(str, instructions["rounded_bits"]))
        rounded = f"rounded to 8 bits for weights of {bits} bits, but with --exact" if bits else "exact"
        console.print(f"inputs of products of many rows are: {rounded}")
    path, why = findings["generation"]["path"], findings["generation"]["why"]
    console.print(f"the embedded model generates in: {path}" + (f" ({why})" if why else ""))
    if findings["tables"]:
        _show_tables(findings["tables"])
        _show_compiler(findings["compiler"])
    else:
        console.print("no kernels are chosen here: " + (findings["backends"]["triton"] or "there is no GPU"))
    if findings.get("kernels"):
        _show_kernels(findings["kernels"])


def _show_tables(tables: dict[str, dict]) -> None:
    shown = table("tuned kernels", "entries", "file")
    for device, files in tables.items():
        for origin, found in files.items():
            shown.add_row(f"{device} {origin}", str(found["entries"]), found["path"])
    console.print(shown)
    if not any(found["entries"] for files in tables.values() for found in files.values()):
        console.print("no entries: a rule chooses; `lowbit tune MODEL` measures")


def _show_compiler(limits: dict[str, str | None]) -> None:
    for gpu, limit in limits.items():
        if limit is not None:
            console.print(f"{gpu}: {limit}")


def _show_kernels(kernels: list[dict]) -> None:
    shown = table("layer", "device", "rows", "kernel", "why", "configuration")
    for found in kernels:
        layer = f"{found['scheme']} {'x'.join(map(str, found['shape']))}"
        config = " ".join(f"{name}={value}" for name, value in found["config"].items())
        rows = [str(found["rows"]), found["kernel"]] if found["kernel"] else ["any", "none"]
        shown.add_row(layer, found["device"], *rows, found["reason"], config)
    console.print()
    console.print(shown)


def examine(model: str | None = None, revision: str | None = None, trust_remote_code: bool = False) -> dict:
    """packages: name -> version or None. devices: name -> description. backends: name -> reason why not, or None.
    instructions: see `backends.native.instructions`. generation: see `generation_of_the_embedded_model`. tables: GPU ->
    origin -> {"path", "entries"}. compiler: GPU -> what kernels go without because this triton would compile it wrong,
    or None. kernels: see `kernels_of`, only with a model."""
    import torch

    from lowbit.backends import BACKENDS, get_backend

    devices = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}"
    backends = {name: get_backend(name).available() for name in BACKENDS}
    gpus = [name for name in devices if name != "cpu" and backends["triton"] is None]
    findings = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": devices,
        "backends": backends,
        "instructions": get_backend("native").instructions(),
        "generation": generation_of_the_embedded_model(),
        "tables": {gpu: get_backend("triton").tables(gpu) for gpu in gpus},
        "compiler": {gpu: get_backend("triton").compiler_limit(gpu) for gpu in gpus},
    }
    return findings if model is None else findings | {"kernels": kernels_of(model, gpus, revision, trust_remote_code)}


def generation_of_the_embedded_model() -> dict:
    """{"path", "why"}: what ran the steps of a few tokens, and why it was not what is fastest on this device."""
    with heavy_imports():
        from lowbit.folders.locate import REFERENCE
        from lowbit.generation import open_session

    session = open_session(REFERENCE, device_map=default_device_map(None))
    stats = session.generate(session.encode("import os"), max_new_tokens=_FEW_TOKENS).stats
    return {"path": stats.path, "why": stats.why}


def kernels_of(
    model: str, devices: list[str], revision: str | None = None, trust_remote_code: bool = False
) -> list[dict]:
    """{"scheme", "shape", "device", "rows", "kernel", "config", "reason"} for each distinct layer of a quantized model,
    device and number of rows. shape: [out_features, in_features], of fused experts [experts, ...], whose rows are those
    of all experts together. Where no kernel runs a layer, kernel and rows are None and the reason says why.
    """
    from lowbit.backends import kernels_for

    found = []
    layers, dtype = _layers(model, revision, trust_remote_code)
    for scheme, shape in layers:
        for device in devices:
            case = {"scheme": scheme.name, "shape": list(shape), "device": device}
            kernels = kernels_for(scheme)
            if reason := kernels.refuse(scheme, device, dtype, shape):
                found.append({**case, "rows": None, "kernel": None, "config": {}, "reason": reason})
                continue
            found += [{**case, "rows": rows, **kernels.explain(scheme, shape, dtype, rows, device)} for rows in _ROWS]
    return found


def _layers(model: str, revision: str | None, trust_remote_code: bool) -> tuple[list, "torch.dtype"]:  # noqa: F821 - imported where it is used
    """Distinct (Scheme, shape) of the quantized layers as they are once loaded, and the dtype they run in."""
    with heavy_imports():
        from lowbit.checkpoint import CheckpointReader
        from lowbit.checkpoint.decoded import decoded
        from lowbit.discovery import CheckpointNames, skeleton
        from lowbit.folders.locate import load_config, resolve
        from lowbit.hf.foreign import StoredModel

    folder = resolve(model, revision)
    config = load_config(folder, trust_remote_code)
    reader = CheckpointReader(folder)
    if reader.quantization_config is None:
        raise UsageError(f"{model} is not quantized: kernels are chosen for quantized layers")
    if decoded(reader) is not reader:
        raise UsageError(f"{model} is stored in {reader.method}, which is decoded when it is loaded: quantize it first")
    built = skeleton(config, trust_remote_code)
    layers = {}
    for found in StoredModel(built, CheckpointNames(built), folder).sites.values():
        shape = (found.site.out_features, found.site.in_features)
        layers[found.scheme, (found.site.experts, *shape) if found.site.kind == "experts" else shape] = None
    return list(layers), built.dtype


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
