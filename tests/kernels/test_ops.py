"""The operators as torch sees them: shapes, dtypes, gradients, tracing. The kernels have tests of their own."""

import pytest
import torch

pytest.importorskip("triton")

from lowbit_kernels import ops, reference
from lowbit_kernels.layout import PER_CHANNEL, Layout, interleave_gate_up, pack
from lowbit_kernels.tuning import select
from lowbit_kernels.tuning.tune import random_weight

CPU = torch.device("cpu")
# bits, group_size, sym, dtype, out_features, in_features
FORMS = [
    (4, 128, True, torch.bfloat16, 96, 256),
    (4, 32, False, torch.float16, 72, 160),
    (8, PER_CHANNEL, True, torch.bfloat16, 33, 100),
    (3, 64, False, torch.bfloat16, 64, 192),
]


def made(form):
    """(layout, (codes, scales, zeros), weight, meta)"""
    layout = Layout(*form)
    weight = random_weight(layout, CPU)
    return layout, weight, *pack(*weight, layout.bits)


def run(x, weight, meta, layout, bias=None):
    return ops.linear(
        x, weight, meta, bias, layout.bits, layout.group_size, layout.sym, layout.dtype, layout.out_features
    )


def relative(actual, wanted):
    return float((actual.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("form", FORMS, ids=lambda f: select.key(Layout(*f), 1).rpartition(" ")[0])
def test_linear_takes_any_input(form):
    layout, parts, weight, meta = made(form)
    dense = reference.dequantize(*parts, layout.bits).double()
    whole = torch.randn(2, 3, layout.in_features + 5)
    for x in (
        whole[..., :-5].to(layout.dtype),  # rows apart
        whole[..., 5:].to(layout.dtype).transpose(0, 1),
        torch.randn(layout.in_features, 4).to(layout.dtype).T,  # no row in one piece
        torch.randn(layout.in_features).to(layout.dtype),
        torch.randn(40, layout.in_features).to(layout.dtype),  # another kernel
        # through the dtype of the scales
        torch.randn(2, layout.in_features),
        torch.randn(2, layout.in_features).half(),
        torch.randn(2, layout.in_features).bfloat16(),
    ):
        y = run(x, weight, meta, layout)
        assert y.shape == (*x.shape[:-1], layout.out_features) and y.dtype == x.dtype
        assert relative(y, x.to(layout.dtype).double() @ dense.T) < 8e-3
    assert run(x[:0], weight, meta, layout).shape == (0, layout.out_features)


def test_bias_is_added_by_every_kernel():
    layout, parts, weight, meta = made(FORMS[0])
    bias = 5 * torch.randn(layout.out_features).to(layout.dtype)
    dense = reference.dequantize(*parts, layout.bits).double()
    x = torch.randn(40, layout.in_features).to(layout.dtype)
    wanted = x.double() @ dense.T + bias.double()
    assert relative(run(x, weight, meta, layout, bias), wanted) < 8e-3
    run(x, weight, meta, layout, bias.requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, len(x)))
    bias = bias.detach()
    assert relative(run(x[:3], weight, meta, layout, bias), wanted[:3]) < 8e-3
    dense_pieces = select.Choice("dense", select.Dense(chunk=64 * 2 * layout.in_features), "")
    assert relative(ops.run(x, weight, meta, layout, bias, dense_pieces), wanted) < 8e-3


def gate_up_parts(form):
    """A fused weight, and (gate, up) in float64."""
    bits, group_size, sym, dtype, _, in_features = form
    layout = Layout(bits, group_size, sym, dtype, 48, in_features)
    gate, up = (random_weight(layout, CPU, seed) for seed in (1, 2))
    fused = [None if g is None else interleave_gate_up(g, u) for g, u in zip(gate, up, strict=True)]
    dense = [reference.dequantize(*part, bits).double() for part in (gate, up)]
    return Layout(bits, group_size, sym, dtype, 96, in_features), pack(*fused, bits), dense


@pytest.mark.parametrize("rows", [1, 40])
def test_gate_up(rows):
    layout, packed, (gate, up) = gate_up_parts(FORMS[1])
    x = torch.randn(rows, layout.in_features).to(layout.dtype)
    y = ops.gate_up(x, *packed, layout.bits, layout.group_size, layout.sym, layout.dtype, layout.out_features)
    wanted = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    assert y.shape == (rows, 48) and relative(y, wanted) < 8e-3


def expert_parts(experts=4):
    layout = Layout(*FORMS[0])
    parts = [random_weight(layout, CPU, seed) for seed in range(experts)]
    packed = [pack(*part, layout.bits) for part in parts]
    dense = [reference.dequantize(*part, layout.bits).double() for part in parts]
    return layout, torch.stack([p[0] for p in packed]), torch.stack([p[1] for p in packed]), dense


@pytest.mark.parametrize("biased", [False, True])
def test_experts(biased):
    layout, weight, meta, dense = expert_parts()
    counts = [3, 0, 20, 1]
    start = torch.tensor([0, 3, 3, 23, 24], dtype=torch.int32)
    x = torch.randn(24 + 2, layout.in_features).to(layout.dtype)  # two rows are no expert's
    bias = torch.randn(4, layout.out_features).to(layout.dtype) if biased else None
    y = ops.experts(
        x, weight, meta, start, bias, layout.bits, layout.group_size, layout.sym, layout.dtype, layout.out_features
    )
    wanted = torch.cat([part.double() @ d.T for part, d in zip(x[:24].split(counts), dense, strict=True)])
    if biased:
        wanted += bias.double().repeat_interleave(torch.tensor(counts), 0)
    assert relative(y[:24], wanted) < 8e-3 and not y[24:].any()


@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_of_the_input(rows):
    layout, parts, weight, meta = made(FORMS[0])
    x = torch.randn(rows, layout.in_features).to(layout.dtype).requires_grad_()
    grad = torch.randn(rows, layout.out_features).to(layout.dtype)
    run(x, weight, meta, layout).backward(grad)
    assert relative(x.grad, grad.double() @ reference.dequantize(*parts, layout.bits).double()) < 8e-3

    layout, packed, (gate, up) = gate_up_parts(FORMS[0])
    x = torch.randn(rows, layout.in_features).to(layout.dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = torch.randn(rows, 48).to(layout.dtype)
    form = (layout.bits, layout.group_size, layout.sym, layout.dtype, layout.out_features)
    ops.gate_up(x, *packed, *form).backward(grad)
    (torch.nn.functional.silu(exact @ gate.T) * (exact @ up.T)).backward(grad.double())
    assert relative(x.grad, exact.grad) < 1.5e-2


def test_gradients_through_experts():
    layout, weight, meta, dense = expert_parts()
    start = torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32)
    x = torch.randn(9, layout.in_features).to(layout.dtype).requires_grad_()  # the last row is no expert's
    grad = torch.randn(9, layout.out_features).to(layout.dtype)
    bias = torch.zeros(4, layout.out_features, dtype=layout.dtype, requires_grad=True)
    ops.experts(
        x, weight, meta, start, bias, layout.bits, layout.group_size, layout.sym, layout.dtype, layout.out_features
    ).backward(grad)
    parts = grad[:8].double().split([3, 0, 4, 1])
    assert relative(x.grad[:8], torch.cat([g @ d for g, d in zip(parts, dense, strict=True)])) < 8e-3
    assert not x.grad[8].any()
    assert relative(bias.grad, torch.stack([g.sum(0) for g in parts])) < 8e-3


def test_opcheck():
    layout, _, weight, meta = made(FORMS[0])
    form = (layout.bits, layout.group_size, layout.sym, layout.dtype, layout.out_features)
    for rows in (0, 2):
        x = torch.randn(rows, layout.in_features).to(layout.dtype).requires_grad_(rows > 0)
        torch.library.opcheck(ops.linear.default, (x, weight, meta, None, *form))
    layout, packed, _ = gate_up_parts(FORMS[0])
    torch.library.opcheck(ops.gate_up.default, (x, *packed, *form[:4], layout.out_features))
    layout, weight, meta, _ = expert_parts(2)
    start = torch.tensor([0, 1, 2], dtype=torch.int32)
    bias = torch.randn(2, layout.out_features).to(layout.dtype).requires_grad_()
    torch.library.opcheck(ops.experts.default, (x, weight, meta, start, bias, *form[:4], layout.out_features))


def test_compiles_without_guards_on_rows():
    layout, _, weight, meta = made(FORMS[0])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: run(x, weight, meta, layout) * 2, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 40):  # two would be taken for the two K tiles of the weight
        x = torch.randn(rows, layout.in_features).to(layout.dtype)
        assert torch.equal(compiled(x), run(x, weight, meta, layout) * 2)
    assert len(graphs) == 1


def test_wrong_tensors_are_refused():
    layout, _, weight, meta = made(FORMS[0])
    x = torch.randn(2, layout.in_features).to(layout.dtype)
    with pytest.raises(ValueError, match=r"expected torch\.int16"):
        run(x, weight[:1], meta, layout)
    with pytest.raises(ValueError, match=r"expected torch\.int32"):
        run(x, weight, meta[:, :1], layout)
    with pytest.raises(ValueError, match="not a multiple of group_size"):
        run(x[:, :200], weight, meta, layout)
