"""The divergences of allocations, against whole models whose weights are replaced."""

import pytest
import torch
from layered import SCHEME, opened
from models import save_tiny, tiny_model

from lowbit.numerics.grid import dequantize
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.allocation.judge import Method, divergences
from lowbit.quantizers import checked_options, get_quantizer

COARSE, FINE = Scheme(2, 16, False), Scheme(8, 16)


def method_of(name):
    return Method(Recipe(method=name, options=checked_options(name, {})))


def modules_of(steps):
    return list(dict.fromkeys(step.site.module for group in steps for step in group))


def divergence(model, changed, ids):
    with torch.no_grad():
        wanted, got = (m(ids).logits.log_softmax(-1) for m in (model, changed))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_as_whole_models_have_them(tmp_path, architecture):
    folder = save_tiny(tmp_path / "model", architecture)
    ids = torch.randint(3, 128, (3, 20))
    head = SCHEME if architecture == "llama" else None
    model, steps = opened(folder, ids, head)
    modules = modules_of(steps)
    allocations = [
        {},
        dict.fromkeys(modules, COARSE),
        {module: COARSE if number % 2 else FINE for number, module in enumerate(modules)},
        {modules[-1]: COARSE},
    ]
    found = divergences(model, steps, [], list(ids.split(2)), allocations, method_of("rtn"))
    dense = _in_float64(architecture)
    for schemes, kl in zip(allocations, found, strict=True):
        changed = _in_float64(architecture)
        for module, scheme in schemes.items():
            _round(changed, module, scheme)
        assert kl[0] == pytest.approx(divergence(dense, changed, ids), rel=1e-3, abs=1e-7)
        batches = torch.tensor([divergence(dense, changed, batch) for batch in ids.split(2)])
        assert kl[1] == pytest.approx(float(batches.std()) / 2**0.5, rel=2e-2, abs=1e-7)


def _in_float64(architecture):
    model = tiny_model(architecture, torch.float64)
    model.set_experts_implementation("eager")  # the other one multiplies no float64
    return model


def _round(model, module, scheme):
    parameters = dict(model.named_parameters())
    parameter = parameters.get(module, parameters.get(f"{module}.weight"))
    with torch.no_grad():
        matrices = [parameter] if parameter.ndim == 2 else list(parameter)
        transposed = parameter.ndim == 2 and type(model.get_submodule(module)).__name__ == "Conv1D"
        for matrix in matrices:
            view = matrix.T if transposed else matrix
            options = {"scale_search": "minmax"}
            rounded, _ = get_quantizer("rtn").quantize(view.float().contiguous(), {}, scheme, options)
            view.copy_(dequantize(rounded, torch.float32).double())


def test_gptq_gets_the_inputs_of_the_original_model(tmp_path):
    """Of each weight by itself: what is quantized in front of it does not count. And of other tokens than are judged
    on."""
    folder = save_tiny(tmp_path / "model")
    seen, ids = torch.randint(3, 128, (16, 32)), torch.randint(3, 128, (4, 32))
    model, steps = opened(folder, torch.cat([seen, ids]))
    modules, method = modules_of(steps), method_of("gptq")
    made = []

    def spy(weight, scheme, hessian):
        made.append((weight.clone(), scheme, hessian, method(weight, scheme, hessian)))
        return made[-1][-1]

    spy.wants_hessian = True
    allocations = [dict.fromkeys(modules, COARSE), dict.fromkeys(modules, Scheme(3, 16))]
    found = divergences(model, steps, list(seen.split(4)), list(ids.split(2)), allocations, spy)
    dense = tiny_model(dtype=torch.float32)
    inputs = {module: [] for module in modules}
    for module in modules:
        hook = dense.get_submodule(module).register_forward_pre_hook
        hook(lambda _, args, module=module: inputs[module].append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        dense(seen)
    for schemes, kl in zip(allocations, found, strict=True):
        changed = tiny_model(dtype=torch.float32)
        for module, scheme in schemes.items():
            x, weight = inputs[module][0], changed.get_submodule(module).weight
            (mine,) = (each for each in made if each[1] == scheme and torch.equal(each[0], weight))
            torch.testing.assert_close(mine[2].double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
            with torch.no_grad():
                weight.copy_(dequantize(mine[3]))
        assert kl[0] == pytest.approx(divergence(dense, changed, ids), rel=1e-3)


def test_a_scheme_is_quantized_once_however_many_allocations_have_it(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    ids = torch.randint(3, 128, (1, 8))
    model, steps = opened(folder, ids)
    modules, calls = modules_of(steps), []
    method = method_of("rtn")
    counting = lambda *args: calls.append(args) or method(*args)  # noqa: E731
    counting.wants_hessian = False
    divergences(model, steps, [], [ids], [dict.fromkeys(modules, COARSE)] * 3, counting)
    assert len(calls) == len(modules)
