"""Ask vLLM's own code, without a GPU, which scheme it would give each module of a lowbit checkpoint.

    python scripts/interop/vllm_config.py FOLDER...

It needs the Python files of vLLM, which import without their compiled parts, and what they import:

    pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 --python-version 3.12 vllm==0.33.0
    unzip vllm-*.whl '*.py' -d vllm
    pip install --no-deps --target deps -r scripts/interop/vllm-requirements.txt
    PYTHONPATH=deps:vllm:. python scripts/interop/vllm_config.py FOLDER

A module is right if vLLM reads the bits, group size and symmetry that its stored tensors have, if those that are stored
dense are dense for vLLM too, and if nothing that vLLM merges gets two answers. Exit code 1 if one is wrong.
"""

import json
import sys
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import CheckpointNames, find_sites, skeleton
from lowbit.folders.locate import load_config
from lowbit.serving import fused_units


def layer(class_name: str):
    """vLLM looks at a layer's class name only."""
    return type(class_name, (torch.nn.Module,), {})()


def stored_scheme(tensors: dict, name: str) -> tuple | None:
    """(bits, length of a group, symmetric) of a stored module, from the shapes of its tensors; None: it is dense."""
    if f"{name}.weight_packed" not in tensors:
        return None
    _, columns = tensors[f"{name}.weight_shape"]
    words, groups = tensors[f"{name}.weight_packed"].shape[1], tensors[f"{name}.weight_scale"].shape[1]
    (bits,) = (bits for bits in (2, 3, 4, 5, 6, 8) if -(-columns * bits // 32) == words)
    return bits, columns // groups, f"{name}.weight_zero_point" not in tensors


def read(folder: Path) -> dict:
    """Tensor name -> meta tensor, or the two numbers of a weight_shape."""
    reader = CheckpointReader(folder)
    return {
        name: reader.tensor(name).tolist() if name.endswith("weight_shape") else torch.empty(info.shape, device="meta")
        for name, info in reader.tensors.items()
    }


def asked(quantization_config: dict, fused: dict[str, list[str]]):
    """ask(name, class name, in_features) -> what `stored_scheme` says, as vLLM reads it from the config."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = CompressedTensorsConfig.from_config(json.loads(json.dumps(quantization_config)))
    config.packed_modules_mapping = fused

    def ask(name: str, class_name: str, columns: int) -> tuple | None:
        if class_name == "RoutedExperts":
            config._add_fused_moe_to_target_scheme_map()
        chosen = config.get_scheme(layer(class_name), name)
        if chosen is None:
            return None
        return chosen.num_bits, chosen.group_size if chosen.group_size > 0 else columns, chosen.symmetric

    return ask


def described(scheme: tuple | None) -> str:
    return (
        "dense"
        if scheme is None
        else "{} bits in groups of {}, {}symmetric".format(*scheme[:2], "" if scheme[2] else "a")
    )


def wrong(folder: Path) -> list[str]:
    """Where vLLM would read `folder` otherwise than it is stored, one line each."""
    tensors, config = read(folder), load_config(folder)
    model = skeleton(config, dtype=torch.bfloat16)
    sites, names = find_sites(model), CheckpointNames(model)
    head = model.get_output_embeddings()
    modules = sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".weight", ".weight_packed"))})
    embeddings = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    units = [unit for unit in fused_units(model, sites) if all(name in modules for name in unit)]
    fused = {"+".join(n.rpartition(".")[2] for n in unit): [n.rpartition(".")[2] for n in unit] for unit in units}
    ask = asked(config.quantization_config, fused)
    found = []

    def check(name: str, class_name: str, parts: list[str]) -> None:
        expected = {stored_scheme(tensors, part) for part in parts}
        try:
            got = ask(name, class_name, tensors.get(f"{parts[0]}.weight_shape", (0, 0))[1])
        except (ValueError, NotImplementedError) as error:
            found.append(f"{name}: vLLM refuses it: {error}")
            return
        if expected != {got}:
            found.append(
                f"{name}: stored as {' and '.join(map(described, expected))}, vLLM takes it for {described(got)}"
            )

    for unit in units:
        check(f"{unit[0].rpartition('.')[0]}.{'+'.join(n.rpartition('.')[2] for n in unit)}", "QKVParallelLinear", unit)
    in_units = {name for unit in units for name in unit}
    for name in modules:
        weight = tensors.get(f"{name}.weight")
        if name in in_units or name in embeddings or (weight is not None and weight.ndim != 2):
            continue
        parameter, _ = names.locate(f"{name}.weight")
        if sites.get(parameter) is not None and sites[parameter].kind == "experts":
            check(name, "RoutedExperts", [name])
        else:
            is_head = head is not None and parameter == "lm_head.weight"
            check(name, "ParallelLMHead" if is_head else "ReplicatedLinear", [name])
    print(f"{folder}: {len(modules) - len(in_units) + len(units)} layers asked, {len(found)} wrong")
    return found


def main() -> int:
    problems = [problem for folder in sys.argv[1:] for problem in wrong(Path(folder))]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
