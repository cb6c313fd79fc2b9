"""What a weight costs to second order, against derivatives of the whole model in float64 and against its real KL."""

import pytest
import torch
from layered import SCHEME, opened
from models import save_tiny, tiny_model

from lowbit.numerics.grid import dequantize, quantize_nearest
from lowbit.quantization.allocation.fisher import second_order_costs


def costs_of(folder, ids, tmp_path, repeats=1, lm_head=None):
    """Module -> nats per token; with repeats, the mean over as many random signs."""
    model, steps = opened(folder, ids, lm_head)
    schemes = {step.site.module: [SCHEME] for group in steps for step in group}
    batches = [ids.repeat(repeats, 1)]
    found = second_order_costs(model, steps, batches, schemes, quantize_nearest, tmp_path)
    assert not [*tmp_path.iterdir()]  # hidden states are not left behind
    return {module: cost[SCHEME] for module, cost in found.items()}


def rounded(weight):
    return dequantize(quantize_nearest(weight.float(), SCHEME), torch.float32).double()


def by_derivatives(model, ids, module, transposed):
    """1/2 sum over tokens of d^T J^T F J d, with J d by central differences: F is the variance under p."""
    linear = model.get_submodule(module)
    matrix = linear.weight.detach().T if transposed else linear.weight.detach()
    change = rounded(matrix.contiguous()) - matrix
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    p = model(ids).logits.softmax(-1)
    handle.remove()
    d = seen[0] @ change.T
    total = 0.0
    for token in range(ids.shape[1]):
        push = torch.zeros_like(d)
        push[:, token] = d[:, token]

        def moved(by, push=push):
            handle = linear.register_forward_hook(lambda _, args, out: out + by * push)
            logits = model(ids).logits
            handle.remove()
            return logits

        slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
        total += float(((p * slope**2).sum(-1) - (p * slope).sum(-1) ** 2).sum()) / 2
    return total / ids.numel()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen3"])
def test_as_derivatives_have_it(tmp_path, architecture):
    folder = save_tiny(tmp_path / "model", architecture)
    ids = torch.randint(3, 128, (1, 6))
    (tmp_path / "states").mkdir()
    found = costs_of(folder, ids, tmp_path / "states", repeats=2000)
    model = tiny_model(architecture, torch.float64)
    modules = [name for name in found if ".0." in name or ".1." in name]
    assert len(modules) >= 8
    with torch.no_grad():
        for module in modules[::3]:
            expected = by_derivatives(model, ids, module, architecture == "gpt2")
            assert found[module] == pytest.approx(expected, rel=0.06), module


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_experts_near_their_real_divergence(tmp_path, architecture):
    """Of the last layer, behind whose experts no router chooses others: a choice has no derivative."""
    folder = save_tiny(tmp_path / "model", architecture)
    ids = torch.randint(3, 128, (4, 24))
    (tmp_path / "states").mkdir()
    found = costs_of(folder, ids, tmp_path / "states", repeats=20)
    model = tiny_model(architecture, torch.float64)
    model.set_experts_implementation("eager")
    parameters = dict(model.named_parameters())
    experts = [module for module in found if ".1." in module and "expert" in module]
    assert len(experts) >= 2
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
        for module in experts:
            parameter = parameters.get(module, parameters.get(f"{module}.weight"))
            before = parameter.detach().clone()
            parameter.copy_(_rounded_like(model, module, before))
            got = model(ids).logits.log_softmax(-1)
            parameter.copy_(before)
            real = float((wanted.exp() * (wanted - got)).sum(-1).mean())
            assert found[module] == pytest.approx(real, rel=0.25), module


def _rounded_like(model, module, weight):
    if weight.ndim == 2:
        return rounded(weight)
    transposed = getattr(model.get_submodule(module.rpartition(".")[0]), "is_transposed", False)
    matrices = [rounded(m.T.contiguous()).T if transposed else rounded(m) for m in weight]
    return torch.stack(matrices)


def test_the_head_has_a_cost(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "states").mkdir()
    ids = torch.randint(3, 128, (2, 16))
    found = costs_of(folder, ids, tmp_path / "states", repeats=50, lm_head=SCHEME)
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
        model.lm_head.weight.copy_(rounded(model.lm_head.weight))
        got = model(ids).logits.log_softmax(-1)
    assert found["lm_head"] == pytest.approx(float((wanted.exp() * (wanted - got)).sum(-1).mean()), rel=0.1)
