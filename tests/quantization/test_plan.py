"""What the config of a planned checkpoint names, for engines whose modules are not those of transformers."""

import pytest
from models import save_tiny, tiny_config

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import skeleton
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.plan import make_plan


def planned_config(folder, name, **options):
    save_tiny(folder, name)
    return make_plan(
        CheckpointReader(folder), skeleton(tiny_config(name)), Recipe(Scheme(4, 16), **options), "compressed-tensors"
    ).quantization_config


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("mixtral", "block_sparse_moe.gate"),
        ("mixtral", "mlp.gate"),
        ("qwen3_moe", "mlp.gate"),
        ("gpt_oss", "mlp.router"),
    ],
)
def test_routers_stay_dense_elsewhere(tmp_path, name, router):
    """They are parameters in transformers, and linears in vLLM and SGLang, which know them by their stored names."""
    ignored = planned_config(tmp_path / "model", name)["ignore"]
    assert {f"model.layers.{layer}.{router}" for layer in range(2)} <= set(ignored)
    assert not any("experts" in name or "embed" in name or "norm" in name for name in ignored)


def test_a_head_is_named(tmp_path):
    """vLLM and SGLang give a quantized head its scheme by name only: it is no `Linear` there."""
    groups = planned_config(tmp_path / "model", "llama", lm_head=Scheme(8, 32))["config_groups"]
    (group,) = [group for group in groups.values() if "lm_head" in group["targets"]]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (8, 32)
    groups = planned_config(tmp_path / "again", "llama")["config_groups"]
    assert not any("lm_head" in group["targets"] for group in groups.values())
