"""What loading holds in memory: layers are laid out one by one, and what that took is given back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import save_random_llama
from models import save_tiny
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.backends import torch_cpu
from lowbit.errors import InputError
from lowbit.hf import loading_config
from lowbit.layers.linear import LowbitLinear

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "dense", dtype=torch.bfloat16)
    lowbit.quantize(root / "dense", root / "quantized", group_size=32)
    return root / "quantized"


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq"])
def test_layers_are_laid_out_one_by_one(quantized, tmp_path, monkeypatch, method):
    """When a layer's turn comes, the layers before it have let go of their packed tensors."""
    folder = quantized
    if method == "gptq":
        folder = tmp_path / method
        lowbit.convert(quantized, folder, format=method)
    built, turns, prepare = [], [], LowbitLinear.prepare
    constructor = LowbitLinear.__init__

    def recorded(layer, *args, **kwargs):
        constructor(layer, *args, **kwargs)
        built.append(layer)

    def watched(layer, workspace):
        turns.append([one.backend is None for one in built])
        assert all(bool(list(one.parameters())) == packed for one, packed in zip(built, turns[-1], strict=True))
        return prepare(layer, workspace)

    monkeypatch.setattr(LowbitLinear, "__init__", recorded)
    monkeypatch.setattr(LowbitLinear, "prepare", watched)
    AutoModelForCausalLM.from_pretrained(folder, config=loading_config(folder, fuse=False))
    assert [sum(packed) for packed in turns] == list(range(len(built), 0, -1))


def test_a_backend_that_fails_in_the_middle_is_one_line(quantized, monkeypatch):
    prepare, calls = torch_cpu.prepare, []

    def failing(qweight):
        calls.append(qweight)
        if len(calls) == 5:
            raise RuntimeError("not enough memory: you tried to allocate 1 byte\nC++ frames")
        return prepare(qweight)

    monkeypatch.setattr(torch_cpu, "prepare", failing)
    with pytest.raises(InputError, match=r"cannot load .*: not enough memory: you tried to allocate 1 byte$"):
        lowbit.load(quantized, backend="torch_cpu")
    assert len(calls) == 5


_MEASURE = """
import json, sys, threading, time
from pathlib import Path
import lowbit, lowbit.hf.modules, lowbit.layers.linear
from lowbit.system.memory import return_freed

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

lowbit.load("reference")  # imports, and what is made once in a process
lowbit.hf.modules._UNPACKED_BETWEEN_RETURNS = 1
return_freed()
before, loaded = anonymous(), threading.Event()
samples = [before]

def sample():
    while not loaded.wait(0.002):
        samples.append(anonymous())

sampler = threading.Thread(target=sample, daemon=True)
sampler.start()
model = lowbit.load(sys.argv[1], backend="torch_cpu", fuse=False)
loaded.set()
sampler.join()
prepared = [module for module in model.modules() if isinstance(module, lowbit.layers.linear.LowbitLinear)]
print(json.dumps({
    "held": anonymous() - before,
    "peak": max(samples) - before,
    "buffers": sum(b.nbytes for module in prepared for b in module.buffers()),
    "largest": max(module.in_features * module.out_features for module in prepared),
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only glibc keeps freed memory for long")
def test_memory_is_the_model_and_one_layer(tmp_path):
    save_random_llama(tmp_path / "dense", hidden=1024, intermediate=4096, layers=6)
    lowbit.quantize(tmp_path / "dense", tmp_path / "quantized")
    path = os.pathsep.join([str(ROOT), str(ROOT / "triton_kernels")])
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "quantized")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    memory = json.loads(run.stdout.splitlines()[-1])
    # held: the buffers; at the peak also one layer's codes: a byte each, four more in the operator that packs them
    assert 0.8 * memory["buffers"] < memory["held"] < 1.3 * memory["buffers"]
    assert memory["peak"] < 1.3 * memory["buffers"] + 8 * memory["largest"]
