"""Let vLLM's own code, without a GPU, read the quantized input embedding of lowbit checkpoints, and look rows up in it.

    TRITON_INTERPRET=1 PYTHONPATH=deps:vllm:. python scripts/interop/vllm_embedding.py FOLDER...

What it needs is what `vllm_config.py` beside it needs, which says how to get it, and triton. vLLM asks for its version
where it looks for triton: unzip '*/METADATA' of its wheel too. For each folder:

- a `VocabParallelEmbedding` is built with the config of the folder, once without a name, as vLLM's Llama does, and once
  with the name that other models give it;
- the tensors of the folder go through vLLM's loader into its parameters, which refuses other shapes;
- its kernel, in triton's interpreter, looks every token up, and each row has to be the one of lowbit, bit for bit.

vLLM 0.33.0 reads symmetric tables of 2, 4 and 8 bits, in groups or by row. It refuses zero points, and takes codes of
3, 5 and 6 bits out of single words, where compressed-tensors lets them run on into the next: `lowbit.serving.rules`
says so, and so does `plan`.

A folder is written by, for example, `lowbit quantize MODEL --scheme W4A16-G128 --embeddings W8A16-G128 -o FOLDER`.
Exit code 1 if a table is read otherwise than it is stored, or not at all.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import find_sites, skeleton
from lowbit.folders.locate import load_config
from lowbit.folders.stored import StoredWeights
from lowbit.numerics.grid import dequantize


def pretend_a_driver() -> None:
    """vLLM uses triton only where the driver of a GPU is active, which its interpreter does without."""
    from triton.backends import backends

    for name in [name for name in backends if name != "nvidia"]:
        del backends[name]
    backends["nvidia"].driver.is_active = staticmethod(lambda: True)


@contextmanager
def single_process() -> Iterator[None]:
    """vLLM's parameters ask for their place among the processes, also where there is one."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29511")}
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, "env://", 0, "gloo")
        initialize_model_parallel(1, 1, backend="gloo")
        yield


def table_of(stored: StoredWeights, config) -> str:
    """The base name of the input embedding."""
    sites = find_sites(skeleton(config, tensors=stored.reader.tensors.values()))
    module = next(site.module for site in sites.values() if site.kind == "embedding")
    if module not in stored.weights:
        raise SystemExit(f"{module} of {stored.reader.folder} is not quantized: pass --embeddings W8A16-G128")
    return module


def read_by_vllm(reader: CheckpointReader, base: str, shape: tuple[int, int], prefix: str) -> torch.Tensor:
    """All rows of the table, as vLLM looks them up."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    said = CompressedTensorsConfig.from_config(json.loads(json.dumps(reader.quantization_config)))
    layer = VocabParallelEmbedding(*shape, params_dtype=torch.float32, quant_config=said, prefix=prefix)
    held = dict(layer.named_parameters())
    stored = {name.removeprefix(f"{base}."): name for name in reader.tensors if name.startswith(f"{base}.")}
    if held.keys() != stored.keys():
        raise ValueError(f"vLLM expects {sorted(held)}, the folder has {sorted(stored)}")
    for suffix, name in stored.items():
        parameter = held[suffix]
        tensor = reader.tensor(name)
        # triton's interpreter rounds to bfloat16 in another way than a GPU: float32 holds the products of all scales
        parameter.weight_loader(parameter, tensor.float() if tensor.is_floating_point() else tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.embedding(layer, torch.arange(shape[0]))


def problems(folder: Path) -> list[str]:
    """What is wrong with how vLLM reads the table, one line each."""
    reader = CheckpointReader(folder)
    stored = StoredWeights(reader)
    base = table_of(stored, load_config(folder))
    weight = stored.weights[base]
    ours, found = dequantize(stored.quantized(weight)[0], torch.float32), []
    for prefix in ("", base):
        where = f"{folder}: {base}, which vLLM calls {prefix or 'nothing'}"
        try:
            theirs = read_by_vllm(reader, base, weight.shape, prefix)
        except (ValueError, NotImplementedError, AssertionError, RuntimeError) as error:
            found.append(f"{where}: it does not read {weight.scheme.name}: {type(error).__name__}: {error}")
            continue
        different = int((theirs != ours).any(1).sum())
        if different:
            found.append(f"{where}: {different} of {len(ours)} rows of {weight.scheme.name} are other numbers")
    if not found:
        print(f"{folder}: all {len(ours)} rows of {base}, {weight.scheme.name}, are the same, with and without a name")
    return found


def main() -> int:
    pretend_a_driver()
    with single_process():
        found = [problem for folder in sys.argv[1:] for problem in problems(Path(folder))]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
