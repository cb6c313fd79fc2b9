"""What is found in modules, by what they are and compute."""

import pytest
import torch
from models import tiny_config
from tiny import tiny_config as shrunk
from torch import nn

from lowbit.discovery import choose, decoder_layers, find_sites, model_class, skeleton
from lowbit.errors import InputError, UsageError
from lowbit.numerics.scheme import Recipe, Scheme

LINEAR = nn.functional.linear


class SameLinear(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return LINEAR(x, 2 * self.weight, self.bias)


class RoutingLinear(nn.Linear):
    def forward(self, x):
        return LINEAR(x, self.weight, self.bias).topk(1)


class AsksForMore(nn.Linear):
    def forward(self, x, mask):
        return LINEAR(x, self.weight, self.bias) * mask


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(
    "kind, found",
    [(nn.Linear, True), (SameLinear, True), (ScaledLinear, False), (RoutingLinear, False), (AsksForMore, False)],
)
def test_a_linear_is_what_computes_one(kind, found, bias):
    with torch.device("meta"):
        model = nn.Sequential(kind(48, 33, bias=bias))
    sites = find_sites(model)
    assert list(sites) == (["0.weight"] if found else [])
    assert not found or (sites["0.weight"].out_features, sites["0.weight"].in_features) == (33, 48)


class Experts(nn.Module):
    """Experts as some families write them, without a mark of transformers."""

    def __init__(self, first, last, count_name="num_experts"):
        super().__init__()
        setattr(self, count_name, first[0])
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(first)), nn.Parameter(torch.zeros(last))


@pytest.mark.parametrize(
    "first, last, matrices, transposed",
    [
        ((5, 80, 32), (5, 32, 40), [(80, 32), (32, 40)], False),
        ((5, 32, 80), (5, 40, 32), [(80, 32), (32, 40)], True),
        ((5, 40, 32), (5, 32, 40), [(40, 32), (32, 40)], False),  # both ways fit: as torch does it
    ],
)
def test_the_layout_of_experts_shows_in_their_shapes(first, last, matrices, transposed):
    sites = find_sites(Experts(first, last, "n_routed_experts"))
    assert [(site.out_features, site.in_features) for site in sites.values()] == matrices
    assert all(site.transposed is transposed and site.experts == 5 and not site.routed for site in sites.values())


def test_a_mark_of_transformers_counts_more_than_shapes():
    module = Experts((5, 80, 32), (5, 32, 40))
    module.is_transposed = True
    assert all(site.transposed and site.routed for site in find_sites(module).values())


def test_3d_parameters_that_nothing_counts_are_no_experts():
    class Heads(Experts):
        pass

    assert not find_sites(Heads((5, 80, 32), (5, 32, 40), "num_heads"))


def model_of(model_type, **changes):
    with torch.device("meta"):
        config = shrunk(model_type, **changes)
        return model_class(config).from_config(config)


def left_alone(model) -> dict[str, str]:
    return {name: reason for name, (_, reason) in choose(model, Recipe())[1].items()}


def test_routers_are_left_alone_however_experts_are_kept():
    # with as many outputs as a linear needs to be worth it; their routers are linears in a module of their own
    fused = left_alone(model_of("jetmoe", num_local_experts=32))
    listed = left_alone(model_of("switch_transformers", num_experts=32))
    assert {name.split(".", 3)[3] for name, why in fused.items() if why == "router"} >= {"mlp.router.layer.weight"}
    assert [name for name in listed if name.endswith("mlp.router.classifier.weight")]
    assert {why for name, why in (fused | listed).items() if "router" in name} == {"router"}


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    model = model_of("qwen3_next", num_experts=32, shared_expert_intermediate_size=32)
    chosen, _ = choose(model, Recipe())
    assert [name for name in chosen if name.endswith("shared_expert.gate_proj.weight")]


@pytest.mark.parametrize(
    "model_type, name",
    [("llama", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM"), ("llava", "AutoModelForImageTextToText")],
)
def test_the_class_of_a_config_that_names_none(model_type, name):
    assert model_class(shrunk(model_type)).__name__ == name


def test_the_class_that_a_config_names():
    assert model_class(tiny_config("llama", architectures=["MistralForCausalLM"])).__name__ == "MistralForCausalLM"


def test_decoder_layers_are_those_of_the_language_model():
    # the vision tower is the larger one
    model = model_of("llava", layers=2)
    wide = shrunk("llava")
    wide.vision_config.intermediate_size = 4096
    with torch.device("meta"):
        model = model_class(wide).from_config(wide)
    assert decoder_layers(model)[0] == "model.language_model.layers"


def test_calibration_needs_a_decoder_alone():
    with pytest.raises(InputError, match=r"T5ForConditionalGeneration has an encoder and a decoder.*--method rtn"):
        decoder_layers(skeleton(shrunk("t5")))


W8 = Scheme(8, 16)


def schemes(**options):
    chosen, _ = choose(skeleton(tiny_config("llama")), Recipe(Scheme(4, 16), **options))
    return {site.module: scheme.bits for site, scheme in chosen.values()}


def test_bare_names_protect_and_override_what_they_name():
    assert not any("down_proj" in name for name in schemes(ignore=["down_proj"]))
    assert {name for name, bits in schemes(overrides=[("o_proj", W8)]).items() if bits == 8} == {
        f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)
    }
    assert all(".1." in name for name in schemes(ignore=["layers.0"]))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.norm"])
def test_ignoring_a_router_or_the_head_is_no_error(name):
    assert schemes(ignore=[name]) == schemes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["downproj"]}, "ignore: 'downproj' names no module of the model; the nearest names are down_proj"),
        ({"ignore": ["model.layer.0.mlp"]}, r"nearest names are .*model\.layers\.0\.mlp"),
        ({"ignore": ["re:.*attention_block"]}, "names no module"),
        ({"ignore": ["layers.7"]}, "names no module"),
        ({"overrides": [("gate", W8)]}, "override 'gate' names no linear layer of the model; .*gate_proj"),
        ({"overrides": [("embed_tokens", W8)]}, "names no linear layer"),
        ({"overrides": [("lm_head", W8)]}, r"lm_head is left alone \(output embedding\)"),
        ({"overrides": [("mlp", W8), (".*up_proj", W8)]}, "'.*up_proj' changes nothing: 'mlp' before it"),
        ({"overrides": [("mlp", W8)], "ignore": ["mlp"]}, r"is left alone \(ignored by 'mlp'\)"),
    ],
)
def test_patterns_that_change_nothing_are_errors(options, message):
    with pytest.raises(UsageError, match=message):
        schemes(**options)


def test_an_override_of_an_expert_by_the_name_it_has_unfused():
    chosen, _ = choose(skeleton(tiny_config("mixtral")), Recipe(Scheme(4, 16), overrides=[("up_proj", W8)]))
    assert {site.module.rpartition(".")[2] for site, scheme in chosen.values() if scheme.bits == 8} == {"gate_up_proj"}
