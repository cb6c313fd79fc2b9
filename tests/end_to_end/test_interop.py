"""The other side loads what lowbit writes, and lowbit loads what the other side writes."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from models import relative_error, save_tiny, tiny_model, token_ids
from safetensors.torch import load_file

import lowbit

pytestmark = pytest.mark.slow

CASES = list(itertools.product((2, 3, 4, 5, 6, 8), (32, -1), (True, False)))

# Plain transformers with the compressed-tensors package, and no lowbit in the process
_FOREIGN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
folders, ids = json.loads(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
out = {}
for name, (folder, sym) in folders.items():
    # transformers 5.23 refuses packed zero points unless it dequantizes while loading (its own checkpoints too)
    extra = {} if sym else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **extra)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    # dequantize=True keeps what it has consumed on the list of unexpected keys
    assert not info["unexpected_keys"] or not sym, info
    with torch.no_grad():
        out[name] = model(ids).logits
assert "lowbit" not in sys.modules
torch.save(out, sys.argv[3])
"""


@pytest.fixture(scope="module")
def foreign_logits(tmp_path_factory):
    """Checkpoints of every case, and the logits that plain transformers computes from them."""
    pytest.importorskip("compressed_tensors")
    root = tmp_path_factory.mktemp("interop")
    # 72 is no multiple of the group: those layers are in a config group of their own. Not with zero points: there, the
    # only way in is dequantize=True, which takes the first group's scheme for every layer
    sources = {True: save_tiny(root / "sym", intermediate_size=72), False: save_tiny(root / "asym")}
    folders = {}
    for bits, group, sym in CASES:
        name = f"w{bits}-g{group}-{'sym' if sym else 'asym'}"
        lowbit.quantize(sources[sym], root / name, scheme=lowbit.Scheme(bits, group, sym))
        folders[name] = (str(root / name), sym)
    torch.save(token_ids(), root / "ids.pt")
    command = [sys.executable, "-c", _FOREIGN, json.dumps(folders), root / "ids.pt", root / "out.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders, torch.load(root / "out.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"w{c[0]}-g{c[1]}-{'sym' if c[2] else 'asym'}")
def test_plain_transformers_agrees(case, foreign_logits):
    folders, expected = foreign_logits
    name = f"w{case[0]}-g{case[1]}-{'sym' if case[2] else 'asym'}"
    with torch.no_grad():
        actual = lowbit.load(folders[name][0])(token_ids()).logits
    assert relative_error(actual, expected[name]) < 1e-6


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, -1), (5, 32), (6, -1), (8, 32), (8, -1)])
def test_a_checkpoint_of_compressed_tensors_loads(bits, group, sym, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = {
        "num_bits": bits, "type": "int", "symmetric": sym, "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }  # fmt: skip
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    model = tiny_model(intermediate_size=128)
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            grouped = module.weight.detach().unflatten(1, (-1, module.in_features if group == -1 else group))
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
            if not sym:
                module.weight_zero_point.data.copy_(zero)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    with torch.no_grad():
        expected = model(token_ids()).logits
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("weight_packed") for name in tensors)

    loaded = lowbit.load(tmp_path)
    assert {m.scheme for m in loaded.modules() if hasattr(m, "scheme")} == {lowbit.Scheme(bits, group, sym)}
    with torch.no_grad():
        assert relative_error(loaded(token_ids()).logits, expected) < 1e-5
