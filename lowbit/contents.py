"""What a checkpoint holds: parameters, bytes and schemes, from headers alone."""

from collections import defaultdict
from pathlib import Path

from lowbit.checkpoint import CheckpointReader
from lowbit.errors import InputError
from lowbit.formats import detect_format, get_format


def summarize(folder: Path) -> dict:
    """Parts of a checkpoint (each scheme, and what is not quantized) with parameters, bytes and bits per weight."""
    reader = CheckpointReader(folder)
    config = reader.config.get("quantization_config")
    format_name = detect_format(config) if config else None
    suffixes = get_format(format_name).SUFFIXES if config else ()
    modules, plain = defaultdict(dict), []
    for tensor in reader.tensors.values():
        base, suffix = _split(tensor.name, suffixes)
        if suffix:
            modules[base][suffix] = tensor
        else:
            plain.append(tensor)
    parts, layers = defaultdict(lambda: [0, 0, 0]), []
    for base, tensors in modules.items():
        scheme, shape = _measured(reader, config, format_name, base, tensors)
        parameters, stored = _product(shape), sum(t.nbytes for t in tensors.values())
        layers.append({"name": base, "scheme": scheme, "shape": list(shape), "bytes": stored})
        _add(parts[scheme], parameters, stored)
    for tensor in plain:
        _add(parts[str(tensor.dtype).removeprefix("torch.")], tensor.numel, tensor.nbytes)
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    return {
        "architecture": (reader.config.get("architectures") or [reader.config.get("model_type", "unknown")])[0],
        "format": format_name,
        "files": len(reader.files),
        "parameters": totals[1],
        "bytes": totals[2],
        "bits_per_weight": 8 * totals[2] / max(totals[1], 1),
        "parts": [
            {"name": name, "tensors": count, "parameters": parameters, "bytes": stored,
             "bits_per_weight": 8 * stored / max(parameters, 1)}
            for name, (count, parameters, stored) in sorted(parts.items())
        ],
        "layers": layers,
    }  # fmt: skip


def _add(part: list[int], parameters: int, stored: int) -> None:
    part[0] += 1
    part[1] += parameters
    part[2] += stored


def _product(shape) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _split(name: str, suffixes) -> tuple[str, str | None]:
    """`x.weight_scale` -> (x, weight_scale); a fused `x.gate_up_proj_scale` -> (x.gate_up_proj, weight_scale)."""
    for suffix in suffixes:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
        short = suffix.removeprefix("weight")
        if "experts." in name and name.endswith(f"proj{short}"):
            return name.removesuffix(short), suffix
    return name, None


def _measured(reader, config, format_name, base: str, tensors) -> tuple[str, tuple[int, ...]]:
    """(scheme name, shape of the dense weight) as the config says it, checked against the stored shapes."""
    scheme = get_format(format_name).schemes(config).lookup([base], "Linear")
    if scheme is None:
        raise InputError(
            f"{base} is stored quantized, but no config group targets it: the config does not belong to the weights"
        )
    if "weight_shape" not in tensors or "weight_packed" not in tensors:
        raise InputError(f"{base} lacks weight_packed or weight_shape: the checkpoint is incomplete")
    shape = reader.tensor(tensors["weight_shape"].name).view(-1, 2)[0].tolist()
    return scheme.name, (*tensors["weight_packed"].shape[:-2], *shape)
