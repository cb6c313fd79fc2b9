"""Linears that share a product: found by what they take, equal to linears on their own, never a product of the past."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from models import save_tiny, tiny_model, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from weights import DTYPES, random_quantized

import lowbit
from lowbit.backends import torch_cpu
from lowbit.discovery.shared_inputs import Products
from lowbit.layers.linear import LowbitLinear
from lowbit.layers.shared_product import SharedProduct, share_products
from lowbit.numerics.scheme import Scheme

# scheme, out_features of the members, in_features, dtype, act-order
CASES = [
    (Scheme(4, 32), (48, 16, 16), 96, "bf16", False),
    (Scheme(4, 32, False), (16, 160), 64, "fp16", False),
    (Scheme(3, 64, False), (48, 32), 128, "bf16", True),
    (Scheme(8, 32), (64, 16, 32), 96, "bf16", False),
    (Scheme(8, -1), (48, 32), 96, "fp16", False),
    (Scheme(2, 16, False), (16, 16), 32, "bf16", False),
    (Scheme(4, 16), (7, 3, 1), 48, "fp32", True),
]
cases = pytest.mark.parametrize(
    ("scheme", "outs", "columns", "dtype", "act_order"),
    [(s, n, k, DTYPES[d], a) for s, n, k, d, a in CASES],
    ids=[f"{s.name}-{'+'.join(map(str, n))}x{k}-{d}{'-act' * a}" for s, n, k, d, a in CASES],
)


class Block(nn.Module):
    """Linears of one input, and a place where something may happen between two calls."""

    def __init__(self, *linears):
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.between = lambda x: None

    def forward(self, x):
        outputs = []
        for linear in self.linears:
            outputs.append(linear(x))
            self.between(x)
        return outputs


def linears(scheme, outs, columns, dtype, act_order=False, bias=True):
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3)) // scheme.group_of(columns)
    made = []
    for seed, rows in enumerate(outs):
        qweight = random_quantized(scheme, rows, columns, dtype, seed=seed)
        qweight = replace(qweight, g_idx=order.to(torch.int32)) if act_order else qweight
        offset = torch.randn(rows, generator=torch.Generator().manual_seed(seed)).to(dtype) if bias else None
        made.append(LowbitLinear.from_quantized(qweight, offset))
    return made


def fused(block):
    product = SharedProduct(list(block.linears))
    assert product.join()
    product.serve(block)
    return block


def pair(**changes):
    """A block, the same one with a shared product, and an input."""
    case = {"scheme": Scheme(4, 32), "outs": (48, 16, 32), "columns": 64, "dtype": torch.bfloat16, **changes}
    alone = Block(*linears(**case))
    x = torch.randn(2, 3, case["columns"], generator=torch.Generator().manual_seed(5)).to(case["dtype"])
    return alone, fused(copy.deepcopy(alone)), x


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def counted(block):
    """The number of rows of every product from here on."""
    calls = []

    def counting(run):
        def call(x, buffers, scheme, shape, bias=None):
            calls.append(shape[0])
            return run(x, buffers, scheme, shape, bias)

        return call

    for linear in block.linears:
        linear.run = counting(linear.run)
    return calls


@cases
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_products_and_bits_are_those_of_linears_on_their_own(scheme, outs, columns, dtype, act_order, bias, rows):
    alone = Block(*linears(scheme, outs, columns, dtype, act_order, bias))
    together = fused(copy.deepcopy(alone))
    calls = counted(together)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)
    for actual, expected in zip(together(x), alone(x), strict=True):
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)
    assert calls == [sum(outs)]
    state, expected = together.state_dict(), alone.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    for a, b in zip(together.linears, alone.linears, strict=True):
        assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_member_on_its_own_and_twice(mode):
    alone, together, x = pair()
    with mode():
        for number in (1, 1, 0, 2, 1):
            assert torch.equal(together.linears[number](x), alone.linears[number](x))
            x.mul_(1.5)  # outside of the module's forward nothing is kept
        together.linears.append(together.linears[1])
        assert_equal(together(x), [*alone(x), alone.linears[1](x)])


def test_an_input_that_is_changed_in_place_is_multiplied_anew():
    alone, together, x = pair()
    alone.between = together.between = lambda x: x.add_(1)
    with torch.no_grad():
        assert_equal(together(x.clone()), alone(x.clone()))


def test_shared_product_is_dropped_after_an_error_or_a_change_of_mode():
    alone, together, x = pair()

    def fail(x):
        raise ValueError("in between")

    together.between = fail
    with torch.inference_mode():
        x = x.clone()
        with pytest.raises(ValueError, match="in between"):
            together(x)
        product = together.linears[0].shared
        assert product.kept is None and not product.running
    x.requires_grad_(False)
    grads = iter([True, False, True])
    together.between = lambda x: torch.set_grad_enabled(next(grads))
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        outputs = together(x)
    assert [y.requires_grad for y in outputs] == [False, True, False]
    assert_equal(outputs, alone(x))


def test_threads_do_not_get_each_other_s_products():
    alone, together, _ = pair()
    inputs = [torch.randn(1, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(200)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        for outputs, x in zip(pool.map(torch.no_grad()(together), inputs), inputs, strict=True):
            assert_equal(outputs, alone(x))


def test_gradients_of_the_input_and_the_biases():
    grads = []
    for block in pair()[:2]:
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5)).bfloat16().requires_grad_()
        for linear in block.linears:
            linear.bias.requires_grad_()
        sum((n + 1) * y.float().pow(2).sum() for n, y in enumerate(block(x))).backward()
        grads.append([x.grad, *(linear.bias.grad for linear in block.linears)])
    assert all(float(g.abs().min()) > 0 for g in grads[1][1:])
    for actual, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_moves_copies_and_loading_join_again():
    alone, together, x = pair()
    for made in (copy.deepcopy(together), together.to(torch.float16), together.float()):
        product = made.linears[0].shared
        assert product.joined and all(linear.shared is product for linear in made.linears)
        assert list(product.members) == list(made.linears)
    x = x.float()
    assert_equal(together(x), alone.float()(x))
    other = Block(*linears(Scheme(4, 32), (48, 16, 32), 64, torch.float32))
    other.linears[1].bias.data.fill_(7)
    together.load_state_dict(other.state_dict())
    assert together.linears[0].shared.joined
    assert_equal(together(x), other(x))
    together.linears[1].unprepare()
    calls = counted(together)
    for actual, expected in zip(together(x), other(x), strict=True):  # one by its dense weight: rounded differently
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert calls == [48, 32]


@pytest.mark.slow
def test_compiled_graphs_multiply_once():
    alone, together, x = pair()
    products = []

    def backend(graph, inputs):
        products.append(sum("lowbit.linear_" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            compiled = torch.compile(together, fullgraph=True, backend=backend)
            assert_equal(compiled(x), alone(x))
            assert_equal(compiled(x + 1), alone(x + 1))
    assert products and set(products) == {1}


def test_linears_that_differ_stay_apart():
    assert not SharedProduct([*linears(Scheme(4, 32), (16,), 64, torch.float16),
                              *linears(Scheme(4, 64), (16,), 64, torch.float16)]).join()  # fmt: skip
    ordered = linears(Scheme(4, 32), (16, 16), 64, torch.float16, act_order=True)
    qweight = ordered[1].quantized_weight()
    ordered[1] = LowbitLinear.from_quantized(replace(qweight, g_idx=qweight.g_idx.flip(0)), ordered[1].bias)
    assert not SharedProduct(ordered).join() and ordered[0].shared is None
    assert not SharedProduct([ordered[0].unprepare(), ordered[1]]).join()


def shares(model):
    """Names of the linears of each product, in the first layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LowbitLinear) and module.shared is not None and ".0." in name:
            found.setdefault(module.shared, []).append(name.rpartition(".")[2])
    return sorted(found.values())


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("llama", [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]),
        ("qwen2", [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]),
        ("qwen2_moe", [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]),
        ("gpt_oss", [["q_proj", "k_proj", "v_proj"]]),
        ("gpt_neox", []),
        ("phi3", []),
        ("gpt2", []),
    ],
)
def test_models_run_and_save_as_without(tmp_path, name, shared):
    lowbit.quantize(save_tiny(tmp_path / "dense", name, torch.bfloat16), tmp_path / "quantized", group_size=32)
    together, alone = lowbit.load(tmp_path / "quantized"), lowbit.load(tmp_path / "quantized", fuse=False)
    assert shares(together) == shared and shares(alone) == []
    assert together.get_memory_footprint() <= alone.get_memory_footprint()
    assert share_products(together) == []  # once is enough
    with torch.no_grad():
        assert torch.equal(together(token_ids()).logits, alone(token_ids()).logits)
        assert torch.equal(together(token_ids(1)).logits, alone(token_ids(1)).logits)
    together.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("quantized", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_loading_lays_each_product_out_once(tmp_path, monkeypatch):
    lowbit.quantize(save_tiny(tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "quantized", group_size=32)
    rows, prepare = [], torch_cpu.prepare
    monkeypatch.setattr(torch_cpu, "prepare", lambda weight: rows.append(weight.out_features) or prepare(weight))
    lowbit.load(tmp_path / "quantized", backend="torch_cpu")
    assert sorted(rows) == 2 * [64] + 2 * [64] + 2 * [64 + 2 * 32] + 2 * [2 * 96]


def quantized_in_place(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            qweight = random_quantized(Scheme(4, 32), *module.weight.shape, torch.float32)
            model.set_submodule(name, LowbitLinear.from_quantized(qweight))
    return model


def test_a_model_that_changes_its_input_between_the_calls_shares_nothing():
    model = quantized_in_place(tiny_model("llama"))

    def change(module, args, output):
        args[0].mul_(1)

    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(change)
    assert shares(model) == [] and len(share_products(model)) == 2
    assert shares(model) == [["q_proj", "k_proj", "v_proj"]]


def test_a_linear_that_takes_a_view_multiplies_on_its_own():
    """Its input is the same numbers, but another object: the product that was kept would not be found for it."""
    model = quantized_in_place(tiny_model("llama"))
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0].view_as(args[0]),))
    share_products(model)
    assert shares(model) == [["q_proj", "k_proj", "v_proj"]]


def test_dense_models_are_not_searched_for_shared_inputs():
    dense = tiny_model("llama")
    dense.register_forward_pre_hook(lambda *_: pytest.fail("there is nothing to look for"))
    assert share_products(dense) == []


def test_the_output_embedding_is_not_multiplied_to_see_what_is_shared():
    model, calls = quantized_in_place(tiny_model("llama")), []
    with Products({"head": model.lm_head.weight}, lambda name, x: calls.append(name)):
        assert share_products(model) and calls == []
        assert model(token_ids()).logits.any() and calls == ["head"]


def test_a_model_with_an_encoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    assert shares(quantized_in_place(model)) == [] and share_products(model)
    found = {tuple(names) for names in shares(model)}
    assert ("q", "k", "v") in found  # those of self-attention


def test_a_model_that_does_not_run_on_two_tokens_stays_as_it_was(caplog):
    model = quantized_in_place(tiny_model("llama"))
    model.model.norm.register_forward_pre_hook(lambda module, args: 1 / 0)
    with caplog.at_level(logging.INFO, "lowbit"):
        assert share_products(model) == []
    assert "does not run on two token ids: division by zero" in caplog.text
    assert not model.model.layers[0].self_attn.q_proj._forward_pre_hooks
