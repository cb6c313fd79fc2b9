"""Tensors that no module of the model has: layers that predict further tokens (MTP, NextN), and whatever else."""

import pytest
import torch
from folders import edit_config, edit_tensors, read_json, stored_tensors
from models import save_tiny, token_ids
from tiny import tiny_config
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.cli.commands.plan import show_unclaimed
from lowbit.errors import InputError, UsageError

# Names of what such a layer has, beside linears that are called as those of other layers -> their shapes
_OWN = {"eh_proj.weight": (64, 128), "enorm.weight": (64,), "hnorm.weight": (64,)}


def with_further_layer(folder, prefix: str, like: str):
    """Add a layer `prefix` with the tensors of the layer `like` of the model, and some of its own."""
    rng = torch.Generator().manual_seed(3)

    def add(tensors):
        for name in [name for name in tensors if name.startswith(f"{like}.")]:
            tensors[prefix + name.removeprefix(like)] = tensors[name] + 0.01
        tensors.update({f"{prefix}.{name}": torch.randn(shape, generator=rng) for name, shape in _OWN.items()})

    edit_tensors(folder, add)
    return folder


def deepseek(tmp_path):
    """As DeepSeek-V3 has it: one layer more than the model, which the config counts."""
    torch.manual_seed(0)
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1, first_k_dense_replace=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", num_nextn_predict_layers=1)
    last = config.num_hidden_layers
    return with_further_layer(tmp_path / "source", f"model.layers.{last}", f"model.layers.{last - 1}")


def qwen(tmp_path):
    """As Qwen3-Next has it, passed over by transformers by its name."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("qwen3_next", layers=4)).save_pretrained(tmp_path / "source")
    layers = {name.split(".")[2] for name in stored_tensors(tmp_path / "source") if "self_attn.q_proj" in name}
    return with_further_layer(tmp_path / "source", "mtp.layers.0", f"model.layers.{min(layers)}")


MODELS = {"deepseek": deepseek, "qwen": qwen}
_IS_FURTHER = {
    "deepseek": lambda name: name.startswith("model.layers.2."),
    "qwen": lambda name: name.startswith("mtp."),
}


@pytest.fixture(params=MODELS)
def source(request, tmp_path):
    """(folder, whether a tensor of that name is of the layer that predicts further tokens)"""
    return MODELS[request.param](tmp_path), _IS_FURTHER[request.param]


def logits(model):
    with torch.inference_mode():
        return model(token_ids()).logits


def test_they_are_copied_counted_and_named(source, tmp_path, capsys):
    folder, is_further = source
    further = {name: tensor for name, tensor in stored_tensors(folder).items() if is_further(name)}
    assert further
    report = lowbit.quantize(folder, tmp_path / "out", scheme="W8A16-G16")
    assert report.unclaimed == dict.fromkeys(sorted(further), "copied")
    assert report.unclaimed == lowbit.plan(folder, scheme="W8A16-G16").unclaimed
    made = stored_tensors(tmp_path / "out")
    assert all(torch.equal(made[name], tensor) for name, tensor in further.items())
    assert lowbit.verify(tmp_path / "out", reference=folder).ok
    show_unclaimed(report.unclaimed)
    assert f"{len(further)} tensors that no module of the model has: {len(further)} copied" in capsys.readouterr().out


def test_everything_loads_what_is_written(source, tmp_path):
    folder, _ = source
    lowbit.quantize(folder, tmp_path / "copied", scheme="W8A16-G16")
    lowbit.quantize(folder, tmp_path / "dropped", scheme="W8A16-G16", unclaimed="drop")
    lowbit.quantize(folder, tmp_path / "quantized", scheme="W8A16-G16", unclaimed="quantize")
    wanted = logits(lowbit.load(tmp_path / "dropped"))
    for name in ("copied", "quantized"):
        assert torch.equal(logits(lowbit.load(tmp_path / name)), wanted)
        assert lowbit.verify(tmp_path / name, reference=folder).ok
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "copied", output_loading_info=True)
    assert not info["missing_keys"] and ("mtp" not in str(folder) or not info["unexpected_keys"])
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-3, atol=1e-3)


def test_their_linears_are_quantized_on_request(source, tmp_path):
    folder, is_further = source
    report = lowbit.quantize(folder, tmp_path / "out", scheme="W4A16-G16", unclaimed="quantize")
    quantized = [name for name, what in report.unclaimed.items() if what == "quantized: W4A16-G16"]
    assert quantized and all(name.rpartition("layers.")[2].partition(".")[2] not in _OWN for name in quantized)
    made = stored_tensors(tmp_path / "out")
    assert all(f"{name}_packed" in made and name not in made for name in quantized)
    assert any(is_further(name) and name.endswith("eh_proj.weight") for name in made)
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    assert not {name.removesuffix(".weight") for name in quantized} & {*ignored}
    assert any(is_further(name) and name.endswith("eh_proj") for name in ignored)
    lowbit.dequantize(tmp_path / "out", tmp_path / "plain")
    assert stored_tensors(tmp_path / "plain").keys() == stored_tensors(folder).keys()
    lowbit.convert(tmp_path / "out", tmp_path / "gptq", format="gptq")
    lowbit.quantize(tmp_path / "out", tmp_path / "again", scheme="W4A16-G16", unclaimed="quantize")
    again = stored_tensors(tmp_path / "again")
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_a_calibrated_run_quantizes_them_without_data(tmp_path):
    folder = deepseek(tmp_path)
    ids = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    lowbit.quantize(folder, tmp_path / "out", scheme="W8A16-G16", method="gptq", dataset=ids, unclaimed="quantize")
    assert lowbit.verify(tmp_path / "out").ok
    assert any(
        name.startswith("model.layers.2.") and name.endswith("_packed") for name in stored_tensors(tmp_path / "out")
    )


def with_tensors_of_nobody(folder):
    edit_tensors(folder, lambda tensors: tensors.update(NOBODYS))
    return folder


# A matrix beside the model, a buffer in a layer, and what the format would take for a part of a quantized weight
NOBODYS = {
    "adapter.weight": torch.ones(64, 64),
    "model.layers.0.counts": torch.arange(4),
    "model.extra.weight_scale": torch.ones(4, 2),
}
_LEFT_OUT = "model.extra.weight_scale"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_tensors_of_nobody_are_copied_counted_and_named(method, tmp_path, caplog):
    folder = with_tensors_of_nobody(save_tiny(tmp_path / "source"))
    ids = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    data = {"dataset": ids} if method == "gptq" else {}
    report = lowbit.quantize(folder, tmp_path / "out", scheme="W8A16-G32", method=method, **data)
    copied = [name for name in NOBODYS if name != _LEFT_OUT]
    left = "left out: compressed-tensors takes it for a part of a weight"
    assert report.unclaimed == dict.fromkeys(copied, "copied") | {_LEFT_OUT: left}
    assert report.unclaimed == lowbit.plan(folder, scheme="W8A16-G32").unclaimed
    assert (
        "adapter.weight of" in caplog.text
        and "(and 2 more such tensors) is unknown to the model: copied" in caplog.text
    )
    made = stored_tensors(tmp_path / "out")
    assert all(torch.equal(made[name], NOBODYS[name]) for name in copied) and _LEFT_OUT not in made
    assert lowbit.verify(tmp_path / "out", reference=folder).ok
    plain = tmp_path / "plain"
    lowbit.dequantize(tmp_path / "out", plain)
    assert not set(copied) & stored_tensors(plain).keys()
    wanted = logits(lowbit.load(plain))
    torch.testing.assert_close(logits(lowbit.load(tmp_path / "out")), wanted, rtol=1e-4, atol=1e-4)
    # transformers alone loads it, and says what it does not use
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == set(copied)
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-3, atol=1e-3)


def test_tensors_of_nobody_stay_through_another_run_or_are_dropped(tmp_path):
    folder = with_tensors_of_nobody(save_tiny(tmp_path / "source"))
    lowbit.quantize(folder, tmp_path / "out", scheme="W8A16-G32")
    again = lowbit.quantize(tmp_path / "out", tmp_path / "again", scheme="W4A16-G32")
    assert again.unclaimed == dict.fromkeys(sorted(NOBODYS.keys() - {_LEFT_OUT}), "copied")
    lowbit.load(tmp_path / "again")
    dropped = lowbit.quantize(folder, tmp_path / "dropped", scheme="W8A16-G32", unclaimed="drop")
    assert dropped.unclaimed == dict.fromkeys(sorted(NOBODYS), "dropped")
    assert not NOBODYS.keys() & stored_tensors(tmp_path / "dropped").keys()


def test_what_no_report_names_is_refused(tmp_path):
    folder = with_tensors_of_nobody(save_tiny(tmp_path / "source"))
    with pytest.raises(InputError, match=r"is unknown to the model .*\(and 2 more such tensors\)"):
        lowbit.load(folder)
    lowbit.quantize(folder, tmp_path / "out", scheme="W8A16-G32")
    (tmp_path / "out" / "lowbit_report.json").unlink()
    with pytest.raises(InputError, match=r"is unknown to the model .*\(and 1 more such tensors\)"):
        lowbit.load(tmp_path / "out")


def test_unknown_choices(tmp_path):
    with pytest.raises(UsageError, match="unclaimed"):
        lowbit.quantize("reference", tmp_path / "out", unclaimed="keep")
