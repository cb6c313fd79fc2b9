"""What a folder holds is answered alike by whatever reads it: which file, what is quantized, what may lie beside it."""

import shutil

import pytest
import torch
from folders import edit_config, edit_tensors, read_json, write_json
from models import save_tiny
from tiny import tiny_model_that_runs

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.extras import EXTRAS, judge
from lowbit.errors import InputError, LowbitError
from lowbit.folders.opened import summarize
from lowbit.layers.linear import LowbitLinear

pytestmark = pytest.mark.slow

UP, ATTENTION = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dense model, and it quantized in each format."""
    root = tmp_path_factory.mktemp("reader")
    save_tiny(root / "dense", dtype=torch.bfloat16)
    for format in ("compressed-tensors", "gptq", "awq"):
        lowbit.quantize(root / "dense", root / format, scheme="W4A16-G32", format=format)
    return root


@pytest.fixture
def copy(made, tmp_path):
    def make(name):
        shutil.copytree(made / name, tmp_path / name)
        (tmp_path / name / "lowbit_manifest.json").unlink(missing_ok=True)  # what is added shall not be a checksum
        return tmp_path / name

    return make


def failures(folder, *reference):
    return lowbit.verify(folder, *reference, run=False).failures


def zeroed_norm(folder, target, **options):
    model = lowbit.load(folder)
    model.model.norm.weight.data.zero_()
    model.save_pretrained(target, **options)
    return target


def test_a_single_file_counts_before_an_index(copy, tmp_path):
    """As in transformers. Saved twice, a folder holds two models."""
    folder = zeroed_norm(copy("dense"), tmp_path / "dense", max_shard_size="60KB")
    assert CheckpointReader(folder).tensor("model.norm.weight").any()
    assert lowbit.load(folder).model.norm.weight.any()
    lowbit.quantize(folder, tmp_path / "q", scheme="W4A16-G32")
    assert lowbit.load(tmp_path / "q").model.norm.weight.any()


def test_verify_names_weight_files_that_nobody_reads(copy):
    folder = copy("gptq")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}})
    assert any("index.json is in the folder" in failure for failure in failures(folder))


def test_the_file_that_the_config_names_counts_first(copy, tmp_path):
    folder = copy("dense")
    zeroed_norm(folder, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "named.safetensors")
    edit_config(folder, transformers_weights="named.safetensors")
    assert not CheckpointReader(folder).tensor("model.norm.weight").any()
    assert not lowbit.load(folder).model.norm.weight.any()
    lowbit.quantize(folder, tmp_path / "q", scheme="W4A16-G32")
    assert "transformers_weights" not in read_json(tmp_path / "q" / "config.json")
    assert not lowbit.load(tmp_path / "q").model.norm.weight.any()


@pytest.mark.parametrize("name", ["../x.safetensors", "x.bin", 5, "missing.safetensors"])
def test_a_named_file_that_cannot_be(copy, name):
    folder = copy("dense")
    edit_config(folder, transformers_weights=name)
    with pytest.raises(InputError):
        CheckpointReader(folder)


def test_an_adapter_in_the_folder_is_refused_by_all(copy, tmp_path):
    """transformers puts it on top of the model where PEFT is installed: no reader of weights sees it."""
    folder = copy("dense")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "somebody/else"})
    for read in (lowbit.load, lowbit.plan, lambda f: lowbit.quantize(f, tmp_path / "out"), summarize):
        with pytest.raises(InputError, match=r"adapter_config\.json"):
            read(folder)


@pytest.mark.parametrize(
    ("model_type", "ignore"),
    [
        ("llava", ["re:.*lm_head", "re:vision_tower.*", "re:multi_modal_projector.*"]),
        ("qwen2_vl", ["lm_head", "re:visual.*"]),
    ],
)
def test_configs_with_the_names_of_the_file(model_type, ignore, tmp_path):
    """As they were written before transformers 4.52; and where a config of today has them, in its language model."""
    model, _ = tiny_model_that_runs("AutoModelForImageTextToText", model_type)
    model.save_pretrained(tmp_path / "dense")
    folder = tmp_path / "q"
    lowbit.quantize(tmp_path / "dense", folder, scheme="W4A16-G16")
    expected = quantized_modules(lowbit.load(folder))
    config = read_json(folder / "config.json")
    config["quantization_config"]["ignore"] = ignore
    write_json(folder / "config.json", config)
    assert quantized_modules(lowbit.load(folder)) == expected and len(summarize(folder)["layers"]) == len(expected)
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    write_json(folder / "config.json", config)
    assert quantized_modules(lowbit.load(folder)) == expected and len(summarize(folder)["layers"]) == len(expected)
    assert len(lowbit.plan(folder, scheme="W4A16-G16").modules) == len(expected)
    lowbit.dequantize(folder, tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()


def quantized_modules(model):
    return [name for name, module in model.named_modules() if isinstance(module, LowbitLinear)]


def test_a_scheme_under_another_name_is_known_by_its_tensors(copy, tmp_path):
    lowbit.quantize(copy("dense"), tmp_path / "q", scheme="W4A16-G32", overrides=[("down_proj", "W8A16-G16")])
    config = read_json(tmp_path / "q" / "config.json")
    config["quantization_config"]["config_groups"]["group_1"]["targets"] = ["re:language_model.*down_proj"]
    write_json(tmp_path / "q" / "config.json", config)
    assert lowbit.load(tmp_path / "q").model.layers[0].mlp.down_proj.scheme.name == "W8A16-G16"
    assert {layer["scheme"] for layer in summarize(tmp_path / "q")["layers"]} == {"W4A16-G32", "W8A16-G16"}


def test_a_config_that_names_modules_of_the_model(tmp_path):
    """Its files have other names: only the model tells which is which, and whoever lists weights asks it too."""
    model, _ = tiny_model_that_runs("AutoModelForImageTextToText", "qwen2_vl")
    model.save_pretrained(tmp_path / "dense")
    folder = tmp_path / "q"
    lowbit.quantize(tmp_path / "dense", folder, scheme="W4A16-G16")
    config = read_json(folder / "config.json")
    (group,) = config["quantization_config"]["config_groups"].values()
    stored = [layer["name"] for layer in summarize(folder)["layers"]]
    group["targets"] = quantized_modules(lowbit.load(folder))
    assert set(stored).isdisjoint(group["targets"])
    write_json(folder / "config.json", config)
    assert [layer["name"] for layer in summarize(folder)["layers"]] == stored


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_old_folders_say_it_in_a_file_of_their_own(copy, format):
    folder = copy(format)
    config = read_json(folder / "config.json")
    del config["quantization_config"]
    old = {
        "gptq": ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        "awq": ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    }
    write_json(folder / old[format][0], old[format][1])
    write_json(folder / "config.json", config)
    assert quantized_modules(lowbit.load(folder)) and summarize(folder)["format"] == format


HARMLESS = {
    "zero biases": {f"{UP}.bias": torch.zeros(96)},
    "cache scales": {f"{ATTENTION}.{x}_scale": torch.ones(1) for x in "kv"},
    "older cache scales": {f"{ATTENTION}.{x}_proj.output_scale": torch.ones(1) for x in "kv"},
    "frequencies": {f"{ATTENTION}.rotary_emb.inv_freq": torch.ones(8)},
    "groups in order": {f"{UP}.weight_g_idx": torch.arange(64) // 32},
}
HARMFUL = {
    "bias": {f"{UP}.bias": torch.ones(96)},
    "act-order": {f"{UP}.weight_g_idx": torch.arange(64).flip(0) // 32},
    "an adapter": {f"{UP}.lora_A.weight": torch.zeros(4, 64)},
    "a scale of nobody": {f"{UP}.smooth_factor": torch.ones(64)},
}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("extra", HARMLESS)
def test_harmless_tensors_of_other_writers_are_ignored(extra, format, copy, tmp_path):
    folder = copy(format)
    edit_tensors(folder, lambda tensors: tensors.update(HARMLESS[extra]))
    lowbit.load(folder)
    assert not failures(folder)
    other = "gptq" if format == "compressed-tensors" else "compressed-tensors"
    for done in (
        lowbit.convert(folder, tmp_path / "converted", format=other),
        lowbit.dequantize(folder, tmp_path / "plain"),
    ):
        assert "left out: " in done.notes[0]
        assert HARMLESS[extra].keys().isdisjoint(CheckpointReader(done.output).tensors)
        lowbit.load(done.output)


@pytest.mark.parametrize("extra", HARMFUL)
def test_tensors_that_may_change_the_result_are_refused(extra, copy, tmp_path):
    folder, (name,) = copy("gptq"), HARMFUL[extra]
    edit_tensors(folder, lambda tensors: tensors.update(HARMFUL[extra]))
    for read in (
        lowbit.load,
        lambda f: lowbit.convert(f, tmp_path / "x", format="awq"),
        lambda f: lowbit.dequantize(f, tmp_path / "x"),
    ):
        with pytest.raises(InputError, match=name):
            read(folder)
    assert not (tmp_path / "x").exists()
    assert any(name in failure for failure in failures(folder))


def test_zero_points_of_a_symmetric_scheme(copy):
    folder = copy("compressed-tensors")
    edit_tensors(folder, lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(12, 2, dtype=torch.int32)}))
    lowbit.load(folder)
    edit_tensors(folder, lambda t: t[f"{UP}.weight_zero_point"].add_(1))
    with pytest.raises(InputError, match=f"{UP}.weight_zero_point"):
        lowbit.load(folder)


def test_the_table_says_what_each_kind_is():
    assert all(extra.meaning for extra in EXTRAS)
    assert judge(None, ["model.more.weight"]) == ({}, {"model.more.weight": "the model has no such parameter"})


def test_verify_takes_what_load_takes(tmp_path):
    """A head that stands for the tied embedding, and a weight of eight bits that nothing quantizes."""
    save_tiny(tmp_path / "dense", dtype=torch.bfloat16, tie_word_embeddings=True)

    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e4m3fn)

    edit_tensors(tmp_path / "dense", change)
    lowbit.quantize(tmp_path / "dense", tmp_path / "q", scheme="W4A16-G32")
    lowbit.load(tmp_path / "q")
    assert not lowbit.verify(tmp_path / "q", tmp_path / "dense", run=False, max_unquantized=1).failures


def test_verify_finds_nan_in_floats_of_eight_bits(tmp_path):
    save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    lowbit.quantize(tmp_path / "dense", tmp_path / "q", scheme="W4A16-G32", ignore=["up_proj"])
    nan = torch.full((1,), torch.nan).to(torch.float8_e4m3fn)
    edit_tensors(tmp_path / "q", lambda t: t.update({f"{UP}.weight": nan.expand(96, 64).contiguous()}))
    assert any(f"{UP}.weight holds NaN" in failure for failure in failures(tmp_path / "q"))


def test_a_layer_replaced_by_a_dense_one_is_saved_as_that(copy, tmp_path):
    model = lowbit.load(copy("compressed-tensors"))
    model.set_submodule(UP, torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "saved")
    assert UP in read_json(tmp_path / "saved" / "config.json")["quantization_config"]["ignore"]
    assert UP not in quantized_modules(lowbit.load(tmp_path / "saved"))
    for name in quantized_modules(model):
        layer = model.get_submodule(name)
        model.set_submodule(name, torch.nn.Linear(layer.in_features, layer.out_features, bias=False))
    model.save_pretrained(tmp_path / "dense again")
    assert "quantization_config" not in read_json(tmp_path / "dense again" / "config.json")
    lowbit.load(tmp_path / "dense again")


# --- keywords of lowbit.load ---


def test_keywords_of_from_pretrained_are_obeyed(made):
    dense = made / "dense"
    assert lowbit.load(dense, torch_dtype=torch.float32).dtype == torch.float32
    assert lowbit.load(dense, dtype="float16", torch_dtype=None).dtype == torch.float16
    model, info = lowbit.load(dense, output_loading_info=True, use_safetensors=True)
    assert not info["missing_keys"] and model.dtype == torch.bfloat16
    assert lowbit.load(dense, use_cache=False).config.use_cache is False
    on_the_fly = lowbit.load(dense, quantization_config=lowbit.hf.LowbitConfig(group_size=32))
    assert quantized_modules(on_the_fly)


@pytest.mark.parametrize(
    "keywords",
    [
        {"torch_dtype": "float32", "dtype": "float16"}, {"use_safetensors": False}, {"ignore_mismatched_sizes": True},
        {"variant": "fp16"}, {"subfolder": "x"}, {"gguf_file": "x"}, {"config": {}}, {"state_dict": {}},
        {"revision": "main"}, {"quantization_config": {"quant_method": "lowbit"}}, {"dtpye": "float16"},
    ],
    ids=lambda keywords: ", ".join(keywords),
)  # fmt: skip
def test_keywords_that_cannot_be_obeyed_are_refused_by_name(keywords, made):
    with pytest.raises(LowbitError, match=next(iter(keywords))):
        lowbit.load(made / "compressed-tensors", **keywords)
