"""What can be scaled where: found on layers of many kinds, and nothing is found where something else would change."""

import pytest
import torch
from models import relative_error, tiny_model, token_ids
from torch import nn
from torch.nn import functional

from lowbit.calibration.folds import find_folds, planned_edits
from lowbit.discovery import decoder_layers, find_sites

_ATTENTION = {
    "input_layernorm.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "self_attn.v_proj.weight": ["self_attn.o_proj.weight"],
}
_UP = {"mlp.up_proj.weight": ["mlp.down_proj.weight"]}
_GATED = {**_UP, "post_attention_layernorm.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}
_SHARED = "mlp.shared_expert"
# producer -> consumers
FOUND = {
    "llama": {**_ATTENTION, **_GATED},
    "qwen2": {**_ATTENTION, **_GATED},  # biases
    "gemma2": {**_ATTENTION, **_UP, "pre_feedforward_layernorm.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]},
    "phi3": {
        "input_layernorm.weight": ["self_attn.qkv_proj.weight"],
        "post_attention_layernorm.weight": ["mlp.gate_up_proj.weight"],
    },
    "gpt2": {"ln_1.weight": ["attn.c_attn.weight"], "ln_2.weight": ["mlp.c_fc.weight"]},
    "qwen3_moe": {**_ATTENTION, "post_attention_layernorm.weight": ["mlp.gate.weight", "mlp.experts.gate_up_proj"]},
    "gpt_oss": {**_ATTENTION, "post_attention_layernorm.weight": ["mlp.router.weight", "mlp.experts.gate_up_proj"]},
    "qwen2_moe": {
        **_ATTENTION,
        f"{_SHARED}.up_proj.weight": [f"{_SHARED}.down_proj.weight"],
        "post_attention_layernorm.weight": [
            "mlp.gate.weight", "mlp.experts.gate_up_proj", f"{_SHARED}.gate_proj.weight",
            f"{_SHARED}.up_proj.weight", "mlp.shared_expert_gate.weight",
        ],
    },
}  # fmt: skip


def folds_of(model, number=0):
    """The folds of a decoder layer, and the parameters that these name."""
    prefix, layers = decoder_layers(model)
    axes = {name: -2 if site.transposed else -1 for name, site in find_sites(model).items()}
    outputs = []
    hook = layers[number].register_forward_hook(lambda module, args, output: outputs.append(output))

    def run():
        outputs.clear()
        model(token_ids())
        return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]

    folds = find_folds(layers[number], run, lambda name: axes.get(f"{prefix}.{number}.{name}", -1))
    hook.remove()
    return folds, dict(layers[number].named_parameters())


def scale(parameter, axis, scales, offset=0.0):
    """Apart from `Edit.apply`."""
    moved = parameter.data.movedim(axis, -1)
    moved.copy_((moved + offset) * scales.to(moved.dtype) - offset)


@pytest.mark.parametrize("name", FOUND)
def test_found_and_invariant(name):
    """With scales that are no powers of two, on all layers at once."""
    model = tiny_model(name).double()
    model.config._experts_implementation = "eager"
    before = model(token_ids()).logits.detach()
    for number in range(len(decoder_layers(model)[1])):
        folds, parameters = folds_of(model, number)
        found = {f.producers[0].parameter: sorted(edit.parameter for edit in f.consumers) for f in folds}
        assert found == {producer: sorted(consumers) for producer, consumers in FOUND[name].items()}
        for fold in folds:
            scales = torch.rand(fold.width, generator=torch.Generator().manual_seed(3)) + 0.5
            for edit in fold.producers:
                scale(parameters[edit.parameter], edit.axis, 1 / scales, edit.offset)
            for edit in fold.consumers:
                scale(parameters[edit.parameter], edit.axis, scales[fold.channels])
    after = model(token_ids()).logits.detach()
    # some norms and routers compute in float32 whatever they are given
    assert relative_error(after, before) < 1e-5
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt2", "qwen3_moe"))
def test_powers_of_two_round_nothing(name):
    """Which trials rely on. In bfloat16: the same logits to the bit, but for norms that multiply by 1 + weight."""
    model = tiny_model(name, torch.bfloat16)
    model.config._experts_implementation = "eager"
    before = model(token_ids()).logits.detach()
    for number in range(len(decoder_layers(model)[1])):
        folds, parameters = folds_of(model, number)
        for fold in folds:
            scales = 2.0 ** torch.randint(-3, 4, (fold.width,), generator=torch.Generator().manual_seed(number))
            for edit, each in planned_edits(fold, parameters[fold.producers[0].parameter].data, scales):
                data = parameters[edit.parameter].data
                data.copy_(edit.apply(data, each))
    after = model(token_ids()).logits.detach()
    if name == "gemma2":
        assert relative_error(after, before) < 0.02
    else:
        assert torch.equal(after, before)


def test_heads_that_are_shared():
    """4 heads of 16 take in the values of 2."""
    folds, _ = folds_of(tiny_model("llama"))
    fold = next(f for f in folds if f.producers[0].parameter == "self_attn.v_proj.weight")
    assert fold.channels.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


def test_search_for_folds_leaves_the_model_unchanged():
    model = tiny_model("qwen2_moe", torch.bfloat16)
    model.config._experts_implementation = "eager"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folds_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Toy(nn.Module):
    """x + fc2(activation(fc1(norm(x)))), and what `also` makes of the normed x."""

    def __init__(self, activation=functional.gelu, also=lambda normed: 0, norm=None, loud=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm or nn.LayerNorm(24)
        self.fc1, self.fc2 = nn.Linear(24, 40), nn.Linear(40, 24)
        self.activation, self.also = activation, also
        nn.init.normal_(self.norm.weight, mean=1, std=0.2)
        with torch.no_grad():
            self.fc1.weight.mul_(loud)

    def forward(self, x):
        normed = self.norm(x)
        return x + self.fc2(self.activation(self.fc1(normed))) + self.also(normed)


class Exponential(nn.Module):
    """A norm whose weight is a logarithm: nothing scales its outputs by scaling it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return functional.rms_norm(x, (24,)) * self.weight.exp()


def found_in(toy) -> set[str]:
    x = torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(1))
    return {fold.producers[0].parameter for fold in find_folds(toy, lambda: toy(x), lambda name: -1)}


TOYS = {
    "gelu": (Toy(), {"norm.weight"}),
    "relu": (Toy(functional.relu), {"norm.weight", "fc1.weight"}),  # relu(s x) = s relu(x)
    "squared relu": (Toy(lambda x: functional.relu(x).square()), {"norm.weight"}),
    "gelu of large values": (Toy(loud=1e4), {"norm.weight"}),  # is as good as relu
    "silu of small values": (Toy(functional.silu, loud=1e-4), {"norm.weight"}),  # is as good as x / 2
    "tanh": (Toy(torch.tanh), {"norm.weight"}),
    "the residual is normed": (Toy(also=lambda normed: normed), set()),
    "a little of it is": (Toy(also=lambda normed: 0.01 * normed), set()),
    "a gate listens": (Toy(also=lambda normed: normed.softmax(-1)), set()),
    "a sum listens": (Toy(also=lambda normed: normed.mean(-1, keepdim=True)), set()),
    "a logarithm": (Toy(norm=Exponential()), set()),
}


@pytest.mark.parametrize("name", TOYS)
def test_other_consumers_prevent_folding(name):
    toy, expected = TOYS[name]
    assert found_in(toy) == expected


def test_channels_in_another_order():
    """Values that are rolled and repeated on their way."""

    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.value, self.out = nn.Linear(24, 18), nn.Linear(36, 24)

        def forward(self, x):
            return self.out(self.value(x).roll(5, -1).repeat(1, 1, 2))

    toy, x = Rolled(), torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(1))
    (fold,) = find_folds(toy, lambda: toy(x), lambda name: -1)
    assert fold.channels.tolist() == torch.arange(18).roll(5).repeat(2).tolist()
    assert [edit.parameter for edit in fold.producers] == ["value.weight", "value.bias"]
