"""What is allocated, what it may be stored as, and what that takes up."""

import pytest
import torch
from models import save_tiny

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import skeleton
from lowbit.errors import UsageError
from lowbit.folders.locate import load_config
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.allocation.engines import ENGINES, check_engine
from lowbit.quantization.allocation.units import CANDIDATES, find_units, most_gpus
from lowbit.quantization.opened import opened
from lowbit.quantization.plan import make_plan


def units_of(folder, recipe=None, format="compressed-tensors", schemes=CANDIDATES, engine=None, gpus=1):
    config = load_config(folder)
    start = opened(CheckpointReader(folder), config, recipe or Recipe())
    runnable = skeleton(config, False, dtype=torch.bfloat16)
    return find_units(start, runnable, format, schemes, engine, gpus)


def names(units):
    return {tuple(module.rpartition("layers.0.")[2] for module in unit.modules) for unit in units if ".0." in unit.name}


@pytest.mark.parametrize(
    "architecture, expected",
    [
        ("llama", {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                   ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)}),
        ("mixtral", {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                     ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}),
    ],
)  # fmt: skip
def test_units_are_what_engines_make_one_matrix_of(tmp_path, architecture, expected):
    found = units_of(save_tiny(tmp_path / "model", architecture))
    assert {tuple(sorted(unit)) for unit in names(found)} == {tuple(sorted(unit)) for unit in expected}


def test_bytes_are_those_of_the_files(tmp_path):
    """Zero points, scales and shapes, experts by experts."""
    folder = save_tiny(tmp_path / "model", "mixtral")
    config, reader = load_config(folder), CheckpointReader(folder)
    built = skeleton(config, False, tensors=reader.tensors.values())
    units = units_of(folder)
    for scheme in (Scheme(2, 32, False), Scheme(4, 32)):
        plan = make_plan(reader, built, Recipe(scheme), "compressed-tensors")
        stored = sum(info.nbytes for step in plan.quantized for info in step.outputs)
        assert sum(unit.bytes[scheme] for unit in units) == stored
        assert sum(unit.weights for unit in units) == sum(step.source.numel for step in plan.quantized)


def test_a_group_that_does_not_fit_is_no_option(tmp_path):
    """in_features 64 and 96: groups of 128 fit neither, groups of 64 the first."""
    for unit in units_of(save_tiny(tmp_path / "model")):
        wide = any("down_proj" in module for module in unit.modules)
        assert {scheme.group_size for scheme in unit.bytes} == ({32} if wide else {32, 64})


def test_what_the_user_has_said_is_not_allocated(tmp_path):
    recipe = Recipe(overrides=(("down_proj", Scheme(8, 32)),), ignore=("layers.1",))
    found = units_of(save_tiny(tmp_path / "model"), recipe)
    modules = [module for unit in found for module in unit.modules]
    assert modules and not any("down_proj" in module or ".1." in module for module in modules)


def test_the_head_is_a_unit_where_it_is_asked_for(tmp_path):
    folder = save_tiny(tmp_path / "model")
    assert not any("lm_head" in unit.modules for unit in units_of(folder))
    assert any(unit.modules == ("lm_head",) for unit in units_of(folder, Recipe(lm_head=Scheme(8, 32))))


def test_a_head_that_may_stay_dense_is_as_large_as_it_is_stored(tmp_path):
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=False)
    config, reader = load_config(folder), CheckpointReader(folder)
    start = opened(reader, config, Recipe())
    units = find_units(
        start, skeleton(config, False, dtype=torch.bfloat16), "compressed-tensors", CANDIDATES, open_head=True
    )
    (head,) = (unit for unit in units if None in unit.bytes)
    assert head.modules == ("lm_head",) and head.bytes[None] == reader.tensors["lm_head.weight"].nbytes
    assert head.bytes[Scheme(8, 32)] < head.bytes[None]


def test_an_engine_has_its_schemes_only(tmp_path):
    folder = save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64,
                       num_key_value_heads=4)  # fmt: skip
    by_engine = {engine: {scheme for unit in units_of(folder, engine=engine) for scheme in unit.bytes}
                 for engine in (None, "vllm", "sglang", "transformers", "mlx", "llama.cpp")}  # fmt: skip
    assert {scheme.bits for scheme in by_engine["sglang"]} == {4, 8}
    assert all(scheme.sym for scheme in by_engine["transformers"])
    assert by_engine[None] == by_engine["vllm"]
    assert {scheme.group_size for scheme in by_engine["mlx"]} == {32, 64, 128}
    assert by_engine["mlx"] >= {Scheme(5, 32), Scheme(6, 128)}
    assert by_engine["llama.cpp"] == {Scheme(4, 32), Scheme(5, 32), Scheme(8, 32)}


def test_tensor_parallelism_is_kept(tmp_path):
    """Zero points of 3 bits fill whole words only where each rank has a multiple of 32 outputs."""
    folder = save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    config = load_config(folder)
    assert most_gpus(config) == 4
    packed = Scheme(3, 32, False)

    def options(gpus):
        (unit,) = (unit for unit in units_of(folder, gpus=gpus) if "layers.0.self_attn.q_proj" in unit.modules[0])
        return unit.bytes

    assert packed in options(1) and packed in options(4)
    narrow = save_tiny(tmp_path / "narrow")  # 64 outputs of q, 32 of k and v
    units = {gpus: units_of(narrow, gpus=gpus) for gpus in (1, 4)}
    assert any(packed in unit.bytes for unit in units[1])
    (qkv,) = (unit for unit in units[4] if "layers.0.self_attn.q_proj" in unit.modules[0])
    assert packed not in qkv.bytes and Scheme(4, 32) in qkv.bytes


def test_formats_have_their_schemes_only(tmp_path):
    found = units_of(save_tiny(tmp_path / "model"), format="awq")
    assert {scheme.bits for unit in found for scheme in unit.bytes} == {4}


def test_wrong_engines():
    with pytest.raises(UsageError, match="engine 'tgi' is not known; allowed: lowbit, transformers, vllm"):
        check_engine("tgi", "gptq")
    with pytest.raises(UsageError, match="transformers reads no awq files"):
        check_engine("transformers", "awq")
    for engine in ENGINES:
        check_engine(engine, "compressed-tensors") if engine != "gptqmodel" else check_engine(engine, "gptq")
