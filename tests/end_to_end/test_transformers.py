"""What users of transformers do with a quantized model: save, dequantize, compile, move, train adapters on it."""

import copy

import pytest
import torch
from folders import read_json
from models import relative_error, save_tiny, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import InputError, UsageError
from lowbit.hf import LowbitConfig, enable_lora, loading_config
from lowbit.layers.linear import LowbitLinear


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "dense", dtype=torch.bfloat16, tie_word_embeddings=True)
    lowbit.quantize(root / "dense", root / "quantized", group_size=32)
    return root / "dense", root / "quantized"


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def test_from_pretrained_with_the_documented_config(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1], config=loading_config(folders[1]))
    assert torch.equal(logits(model), logits(lowbit.load(folders[1])))


def test_lowbit_load_of_a_dense_model(folders):
    dense = lowbit.load(folders[0])
    assert not any(isinstance(m, LowbitLinear) for m in dense.modules())
    assert dense.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_is_that_of_the_request(folders, dtype):
    model = lowbit.load(folders[1], dtype=dtype)
    assert logits(model).dtype == getattr(torch, dtype)
    assert relative_error(logits(model), logits(lowbit.load(folders[1], dtype="float32"))) < 0.01


def test_saving_writes_the_same_tensors_and_config(folders, tmp_path):
    lowbit.load(folders[1]).save_pretrained(tmp_path / "once")
    before, after = load_file(folders[1] / "model.safetensors"), load_file(tmp_path / "once" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "lowbit" not in (tmp_path / "once" / "config.json").read_text()


def test_saving_in_shards(folders, tmp_path):
    lowbit.load(folders[1]).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(lowbit.load(tmp_path)), logits(lowbit.load(folders[1])))


def test_ties_stay_tied(folders):
    model = lowbit.load(folders[1])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(folders[1] / "model.safetensors")


def test_dequantize_gives_a_dense_model_that_saves(folders, tmp_path):
    model = lowbit.load(folders[1], dtype="float32")
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(m, LowbitLinear) for m in dense.modules())
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits(again), expected) < 1e-6


def test_copies_and_moves_keep_the_weights(folders):
    model = lowbit.load(folders[1])
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(model.to("cpu")), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(folders, device_map):
    model = lowbit.load(folders[1], device_map=device_map)
    assert torch.equal(logits(model), logits(lowbit.load(folders[1])))


def test_offload_to_disk(folders, tmp_path, caplog):
    caplog.set_level("INFO", "lowbit")
    parts = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
             "model.norm": "cpu", "model.rotary_emb": "cpu"}  # fmt: skip
    model = lowbit.load(folders[1], dtype="float32", device_map=parts, offload_folder=tmp_path)
    assert "multiply on their own: parts of the model are offloaded" in caplog.text
    assert relative_error(logits(model), logits(lowbit.load(folders[1], dtype="float32"))) < 1e-6


def test_compile_has_no_graph_break(folders):
    model = lowbit.load(folders[1])
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(logits(compiled), expected) < 0.02


def test_lora_trains_on_top(folders):
    peft = pytest.importorskip("peft")
    config = enable_lora(peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    model = peft.get_peft_model(lowbit.load(folders[1]), config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.Adam(trainable.values(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        assert all(p.grad is not None for p in trainable.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1


def _with_adapter(folder, **options):
    peft = pytest.importorskip("peft")
    config = enable_lora(peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **options))
    model = peft.get_peft_model(lowbit.load(folder, dtype=torch.float32), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_lora_merges_and_unmerges(folders, options):
    model = _with_adapter(folders[1], **options)
    with torch.no_grad():
        adapted = model(token_ids()).logits
        with model.disable_adapter():
            plain = model(token_ids()).logits
        model.merge_adapter()
        merged = model(token_ids()).logits
        with model.disable_adapter():
            assert torch.equal(model(token_ids()).logits, plain)
        model.unmerge_adapter()
        assert torch.equal(model(token_ids()).logits, adapted)
    assert relative_error(merged, adapted) < 1e-5 and relative_error(adapted, plain) > 1e-2


def test_a_merged_model_is_saved_as_what_it_is(folders, tmp_path):
    model = _with_adapter(folders[1])
    with torch.no_grad():
        adapted = model(token_ids()).logits
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        loaded = lowbit.load(tmp_path, dtype=torch.float32)
        assert relative_error(loaded(token_ids()).logits, adapted) < 1e-5
    layer = loaded.model.layers[0].self_attn
    assert type(layer.q_proj) is torch.nn.Linear and isinstance(layer.k_proj, LowbitLinear)
    assert "model.layers.0.self_attn.q_proj" in read_json(tmp_path / "config.json")["quantization_config"]["ignore"]


def test_adapters_that_start_by_changing_the_weight_are_refused():
    peft = pytest.importorskip("peft")
    with pytest.raises(UsageError, match="init_lora_weights='pissa'"):
        enable_lora(peft.LoraConfig(init_lora_weights="pissa"))


def _change(folder, target, change):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


NAME = "model.layers.0.mlp.up_proj"
DAMAGES = {
    "missing": (lambda t: t.pop(f"{NAME}.weight_scale"), f"{NAME}.weight_scale"),
    "missing dense": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "extra": (lambda t: t.update({"model.layers.0.more.weight": torch.ones(3)}), "model.layers.0.more.weight"),
    "other shape": (lambda t: t.update({f"{NAME}.weight_packed": t[f"{NAME}.weight_packed"][:, :-1]}), NAME),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_loading_is_strict(folders, tmp_path, damage):
    change, named = DAMAGES[damage]

    def contiguous(tensors):
        change(tensors)
        tensors.update({name: tensor.contiguous() for name, tensor in tensors.items()})

    broken = _change(folders[1], tmp_path / "broken", contiguous)
    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        lowbit.load(broken)


def test_the_one_line_load_is_strict_too(folders, tmp_path):
    broken = _change(folders[1], tmp_path / "broken", lambda t: t.pop(f"{NAME}.weight_packed"))
    with pytest.raises(InputError, match="weight_packed is not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(broken, config=loading_config(broken))


def test_on_the_fly_names_damaged_weights(folders, tmp_path):
    def damage(tensors):
        tensors[f"{NAME}.weight"][3, 5] = float("nan")

    broken = _change(folders[0], tmp_path / "broken", damage)
    with pytest.raises(InputError, match=r"up_proj\.weight holds NaN"):
        AutoModelForCausalLM.from_pretrained(broken, quantization_config=LowbitConfig(4, 32))


def test_on_the_fly_options(folders):
    config = LowbitConfig(8, 32, sym=False, scale_search="mse", ignore=[r"model\.layers\.0\."], backend="reference")
    model = AutoModelForCausalLM.from_pretrained(folders[0], quantization_config=config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowbitLinear)}
    assert layers and all(name.startswith("model.layers.1.") for name in layers)
    assert {(m.scheme.bits, m.scheme.sym, m.backend) for m in layers.values()} == {(8, False, "reference")}


def test_on_the_fly_overrides(folders):
    config = LowbitConfig(4, 32, overrides={"down_proj": "W8A16-G32"})
    model = AutoModelForCausalLM.from_pretrained(folders[0], quantization_config=config)
    layers = {name: m.scheme.bits for name, m in model.named_modules() if isinstance(m, LowbitLinear)}
    assert layers and all(bits == (8 if "down_proj" in name else 4) for name, bits in layers.items())
    with pytest.raises(UsageError, match="override 'dwon_proj' names no linear layer"):
        AutoModelForCausalLM.from_pretrained(
            folders[0], quantization_config=LowbitConfig(4, 32, overrides=[("dwon_proj", "W8A16")])
        )


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(UsageError, match="7; allowed: 2, 3, 4, 5, 6, 8"):
        LowbitConfig(bits=7)
    with pytest.raises(UsageError, match="speed"):
        LowbitConfig(speed="high")


def test_models_without_linears_are_refused(tmp_path):
    save_tiny(tmp_path / "dense")
    with pytest.raises(InputError, match="nothing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=LowbitConfig(4, 32, ignore=[".*"]))
