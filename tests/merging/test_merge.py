"""`lowbit merge` against PEFT: what is merged gives what the adapter gave beside the model."""

import json

import pytest
import torch
from models import relative_error, save_tiny, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.folders.quantized import QuantizedFolder
from lowbit.merging.source import MergedTensor, merged_source
from lowbit.numerics.grid import dequantize, quantize_nearest

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(base, folder, **config):
    """An adapter that changes its model, saved by PEFT; returns the folder."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**config))
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=rng) * 0.1
                parameter.copy_(parameter * 1.1 if "magnitude" in name else parameter + step)
    model.save_pretrained(folder)
    return folder


def with_adapter(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


@torch.inference_mode()
def logits(model):
    return model(input_ids=token_ids()).logits


_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_DENSE = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 4},
                           "alpha_pattern": {r"layers\.1\..*": 3}}),
    "dora": ("qwen2", {"target_modules": ["k_proj", "up_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "bias of the adapter": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}),
    "experts as one": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}),
    "tied head": ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
    "tied embeddings": ("qwen3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tokens": ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
}  # fmt: skip


@pytest.fixture(params=_DENSE)
def dense(request, tmp_path):
    """(base, adapter)"""
    name, config = _DENSE[request.param]
    base = save_tiny(tmp_path / "base", name)
    return base, save_adapter(base, tmp_path / "adapter", **config)


def test_plain_transformers_load_a_merged_dense_model(dense, tmp_path, request):
    base, adapter = dense
    done = lowbit.merge(base, adapter, tmp_path / "out", compare=False)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert done.untied == ("tied" in request.node.callspec.id)
    assert relative_error(logits(model), logits(with_adapter(base, adapter))) < 2e-6
    assert relative_error(logits(model), logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-3
    before, after = CheckpointReader(base), CheckpointReader(tmp_path / "out")
    for name in before.tensors.keys() - set(done.merged):
        assert torch.equal(before.tensor(name), after.tensor(name)), name


def test_the_arithmetic_is_that_of_peft(tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)
    lowbit.merge(base, adapter, tmp_path / "out", compare=False)
    expected = with_adapter(base, adapter).merge_and_unload().state_dict()  # in float32
    made = CheckpointReader(tmp_path / "out")
    for name in made.tensors:
        assert torch.equal(made.tensor(name), expected[name].bfloat16()), name


_QUANTIZED = {
    "compressed-tensors": ("llama", {"scheme": "W4A16-G32"}),
    "gptq": ("llama", {"scheme": "W4A16-G32", "format": "gptq"}),
    "awq": ("llama", {"scheme": "W4A16_ASYM-G32", "format": "awq"}),
    "channels": ("qwen2", {"scheme": "W8A8"}),
    "transposed": ("gpt2", {"scheme": "W8A16-G32"}),
    "experts": ("qwen3_moe", {"scheme": "W4A16-G32"}),
    "experts as one": ("gpt_oss", {"scheme": "W8A16-G32"}),
}
_TARGETS = {
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "qwen2": {"target_modules": ["q_proj"], "use_dora": True},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "qwen3_moe": {"target_modules": ["q_proj"], "target_parameters": _EXPERTS},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": _EXPERTS},
}


@pytest.mark.parametrize("name", _QUANTIZED)
def test_changed_weights_stay_in_their_scheme_and_others_keep_every_bit(name, tmp_path):
    kind, options = _QUANTIZED[name]
    original, base = save_tiny(tmp_path / "original", kind), tmp_path / "base"
    lowbit.quantize(original, base, **options)
    adapter = save_adapter(original, tmp_path / "adapter", **_TARGETS[kind])
    done = lowbit.merge(base, adapter, tmp_path / "out", heldout_tokens=64)
    assert done.requantized and done.quality["kl_mean"] < 0.2
    before, after = QuantizedFolder(base), QuantizedFolder(tmp_path / "out")
    source = merged_source(base, adapter)
    changed = {
        info.origin.weight.base: info for info in source.reader.tensors.values() if isinstance(info, MergedTensor)
    }
    assert len(changed) == done.requantized < len(before.stored.weights)
    for base_name, weight in after.stored.weights.items():
        old = before.stored.weights[base_name]
        assert weight.scheme == old.scheme
        same = [torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
                for a, b in zip(after.stored.quantized(weight), before.stored.quantized(old), strict=True)]  # fmt: skip
        assert all(same) == (base_name not in changed)
    assert lowbit.verify(tmp_path / "out").ok


def test_merged_weights_are_rounded_to_nearest(tmp_path):
    original = save_tiny(tmp_path / "original")
    lowbit.quantize(original, tmp_path / "base", scheme="W4A16-G32")
    adapter = save_adapter(original, tmp_path / "adapter", target_modules=["q_proj"])
    lowbit.merge(tmp_path / "base", adapter, tmp_path / "out", compare=False)
    lowbit.dequantize(tmp_path / "base", tmp_path / "dense")
    name = "model.layers.1.self_attn.q_proj"
    exact = with_adapter(tmp_path / "dense", adapter).merge_and_unload().get_submodule(name).weight.detach()
    folder = QuantizedFolder(tmp_path / "out")
    (made,) = folder.stored.quantized(folder.stored.weights[name])
    expected = quantize_nearest(exact, made.scheme)
    assert torch.equal(made.codes, expected.codes) and torch.equal(made.scales, expected.scales)
    assert relative_error(dequantize(made), exact) > 0.01


def test_groups_in_act_order_and_static_grids_of_inputs_stay(tmp_path):
    """What a method has measured is not rounding's to change."""
    original = save_tiny(tmp_path / "original")
    data = {"dataset": torch.randint(3, 128, (4, 32)), "num_samples": 4, "seqlen": 32}
    lowbit.quantize(original, tmp_path / "static", scheme="W8A8-STATIC", **data)
    lowbit.quantize(original, tmp_path / "plain", scheme="W4A16-G32", format="gptq")
    _scatter(tmp_path / "plain")
    adapter = save_adapter(original, tmp_path / "adapter", target_modules=["q_proj"])
    for kind in ("static", "plain"):
        lowbit.merge(tmp_path / kind, adapter, tmp_path / f"{kind} out", heldout_tokens=64)
        before, after = QuantizedFolder(tmp_path / kind), QuantizedFolder(tmp_path / f"{kind} out")
        name = "model.layers.0.self_attn.q_proj"
        (old,), (new,) = (folder.stored.quantized(folder.stored.weights[name]) for folder in (before, after))
        if kind == "static":
            assert torch.equal(old.input_scale, new.input_scale) and not torch.equal(old.codes, new.codes)
        else:
            assert torch.equal(old.g_idx, new.g_idx) and not torch.equal(old.g_idx, torch.arange(64) // 32)
        lora = with_adapter(original, adapter).get_submodule("base_model.model." + name)
        wanted = dequantize(old, torch.float32) + lora.get_delta_weight("default")
        assert relative_error(dequantize(new, torch.float32), wanted) < (0.01 if kind == "static" else 0.15)


def _scatter(folder):
    """Put the inputs of a GPTQ folder into groups in another order, as act-order does."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("g_idx")]:
        order = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(4))
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("asked", [{"method": "rtn"}, {"method": "gptq"}, {"scheme": "W8A16-G32"}])
def test_quantized_anew(asked, tmp_path):
    original = save_tiny(tmp_path / "original")
    lowbit.quantize(
        original, tmp_path / "base", scheme="W4A16-G32", overrides={"down_proj": "W8A16-G32"}, ignore=["k_proj"]
    )
    adapter = save_adapter(original, tmp_path / "adapter", target_modules=["q_proj"])
    data = (
        {"dataset": torch.randint(3, 128, (4, 32)), "num_samples": 4, "seqlen": 32} if "gptq" in asked.values() else {}
    )
    done = lowbit.merge(tmp_path / "base", adapter, tmp_path / "out", **asked, **data, heldout_tokens=64)
    weights = QuantizedFolder(tmp_path / "out").stored.weights
    assert done.requantized == len(weights) and done.quality["kl_mean"] < 0.2
    names = {base.rpartition(".")[2]: weight.scheme.name for base, weight in weights.items()}
    if "scheme" in asked:
        assert set(names.values()) == {"W8A16-G32"} and "k_proj" in names
    else:
        assert names["down_proj"] == "W8A16-G32" and names["q_proj"] == "W4A16-G32" and "k_proj" not in names
    assert json.loads((tmp_path / "out" / "lowbit_report.json").read_text())["adapter"] == str(adapter)


def test_a_dense_model_is_quantized_where_it_is_asked_for(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    lowbit.merge(base, adapter, tmp_path / "out", scheme="W8A16-G32", format="gptq", heldout_tokens=64)
    lowbit.merge(base, adapter, tmp_path / "dense", compare=False)
    assert lowbit.verify(tmp_path / "out", tmp_path / "dense").ok


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(base, adapter) that no test changes."""
    folder = tmp_path_factory.mktemp("pair")
    base = save_tiny(folder / "base")
    return base, save_adapter(base, folder / "adapter", target_modules=["q_proj"], r=4)


def damaged(adapter, folder, config=(), change=lambda tensors: None):
    """A copy of an adapter with other fields in its config, and `change` done to its tensors."""
    folder.mkdir()
    fields = json.loads((adapter / _CONFIG).read_text())
    (folder / _CONFIG).write_text(json.dumps(fields | dict(config)))
    tensors = load_file(adapter / _WEIGHTS)
    change(tensors)
    save_file(tensors, folder / _WEIGHTS)
    return folder


_FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _unknown(tensors):
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)


@pytest.mark.parametrize(
    "config, change, said",
    [
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3'; expected LORA"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 1], [0, 2]]}, None, "layer_replication: such an adapter makes a model with more"),
        ({"from_the_future": 3}, None, "'from_the_future', which the installed PEFT does not know"),
        ({"r": "many"}, None, "r is 'many'; expected a whole number"),
        ({"target_modules": "(a+)+$("}, None, "is not a regular expression"),
        ({"target_modules": ["q_prog"]}, None, "does not fit the model: Target modules"),
        ({"r": 8}, None, "q_proj.lora_A.default.weight has shape [4, 64], expected [8, 64]"),
        ({}, lambda tensors: tensors.pop(_FIRST), "lora_A.default.weight is not in"),
        ({}, _unknown, "layers.7.self_attn.q_proj.lora_A"),
        ({}, lambda tensors: tensors[_FIRST].fill_(torch.nan), f"{_FIRST} in {_WEIGHTS} holds"),
    ],
)
def test_adapters_that_cannot_be_merged(config, change, said, pair, tmp_path):
    base, adapter = pair
    folder = damaged(adapter, tmp_path / "adapter", config, change or (lambda tensors: None))
    with pytest.raises(InputError) as error:
        lowbit.merge(base, folder, tmp_path / "out")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*out*"))


def test_the_adapter_of_another_model(pair, tmp_path):
    other = save_tiny(tmp_path / "other", "qwen2", hidden_size=32)
    with pytest.raises(InputError, match=r"lora_A.default.weight has shape \[4, 64\], expected \[4, 32\]"):
        lowbit.merge(other, pair[1], tmp_path / "out")


def test_pickles_are_not_opened(pair, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / _CONFIG).write_bytes((pair[1] / _CONFIG).read_bytes())
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"no pickle")
    with pytest.raises(InputError, match="as a pickle"):
        lowbit.merge(pair[0], tmp_path / "adapter", tmp_path / "out")


def test_a_model_is_no_adapter(pair, tmp_path):
    with pytest.raises(InputError, match="holds no adapter of PEFT"):
        lowbit.merge(pair[0], pair[0], tmp_path / "out")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"format": "gptq"}, "format is of"),
        ({"dataset": "a.txt"}, "dataset is of"),
        ({"scheme": "BF16"}, "is a dtype"),
        ({"method": "awq"}, "'awq' is not known"),
    ],
)
def test_options_that_change_nothing(options, said, pair, tmp_path):
    with pytest.raises(UsageError, match=said):
        lowbit.merge(*pair, tmp_path / "out", **options)


def test_the_output_exists(pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        lowbit.merge(*pair, tmp_path / "out", compare=False)
    with pytest.raises(OutputError, match="overlap"):
        lowbit.merge(*pair, pair[1] / "out", compare=False)
