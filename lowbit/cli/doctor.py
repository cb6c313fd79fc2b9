"""lowbit doctor"""

import platform
from importlib.metadata import PackageNotFoundError, version

from lowbit.cli.common import JsonOption, console, print_json, table

_PACKAGES = (
    "lowbit", "torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "triton", "datasets",
    "compressed-tensors", "peft",
)  # fmt: skip


def doctor(json: JsonOption = False):
    """Show versions, devices, and which backends run here and why others do not."""
    findings = examine()
    if json:
        print_json(findings)
        return
    versions = table("package", "version")
    for name, found in findings["packages"].items():
        versions.add_row(name, found or "not installed")
    console.print(versions)
    devices = table("device", "")
    for name, text in findings["devices"].items():
        devices.add_row(name, text)
    console.print()
    console.print(devices)
    backends = table("backend", "")
    for name, reason in findings["backends"].items():
        backends.add_row(name, reason or "runs here")
    console.print()
    console.print(backends)


def examine() -> dict:
    """packages: name -> version or None. devices: name -> description. backends: name -> reason why not, or None."""
    import torch

    from lowbit.backends import BACKENDS, get_backend

    devices = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, sm_{facts.major}{facts.minor}"
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": devices,
        "backends": {name: get_backend(name).available() for name in BACKENDS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
