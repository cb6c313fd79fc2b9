"""Which products read the same input: by memory and version, on every device, seen at weights and at modules alike."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit.discovery.shared_inputs import Products, SharedInputs, module_calls, with_versions

WIDTH = 4
DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


class Linears(nn.Module):
    """Linears a, b and c, called as `use(self, x)` says."""

    def __init__(self, use, device):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, device=device) for _ in range(3))
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def in_place(m, x):
    m.a(x)
    m.b(x.mul_(2))
    m.c(x)


def in_place_by_a_view(m, x):
    m.a(x)
    x[0].zero_()
    m.b(x), m.c(x)


def in_place_and_back(m, x):
    m.a(x)
    m.b(x.add_(1))
    m.c(x.sub_(1))


def copies(m, x):
    m.a(x), m.b(x.clone()), m.c(x + 0)


def views(m, x):
    m.a(x), m.b(x.view(1, -1, WIDTH)), m.c(x.detach())


def parts(m, x):
    m.a(x), m.b(x[:1]), m.c(x[1:])  # the first two begin at the same place


def transposed(m, x):
    m.a(x), m.b(x.T), m.c(x.T)  # a square input: all three begin at the same place and are as large


def bits(m, x):
    m.a(x), m.b(x.view(torch.int32).view(torch.float32)), m.c(x)


def keywords(m, x):
    m.a(input=x), m.b(x), m.c(input=x.clone())


def freed(m, x):
    for linear in (m.a, m.b, m.c):
        linear(x.clone())  # nothing else holds it: the next could take its place, and its id


def twice(m, x):
    m.b(m.a(x)), m.a(x), m.c(x)


def nested(m, x):
    y = m.a(x)
    m.b(y), m.c(y)


def nothing(m, x):
    pass


# use -> the inputs, each with the linears that read it, in the order of use
CASES = {
    in_place: [["a"], ["b", "c"]],
    in_place_by_a_view: [["a"], ["b", "c"]],
    in_place_and_back: [["a"], ["b"], ["c"]],
    copies: [["a"], ["b"], ["c"]],
    views: [["a", "b", "c"]],
    parts: [["a"], ["b"], ["c"]],
    transposed: [["a"], ["b", "c"]],
    bits: [["a", "b", "c"]],
    keywords: [["a", "b"], ["c"]],
    freed: [["a"], ["b"], ["c"]],
    twice: [["a", "a", "c"], ["b"]],
    nested: [["a"], ["b", "c"]],
    nothing: [],
}
USES = pytest.mark.parametrize("use", CASES, ids=lambda use: use.__name__)


class Readers:
    """Input -> names of what reads it, in the order of use."""

    def __init__(self):
        self.inputs, self.found = SharedInputs(), {}

    def seen(self, name, x):
        self.found.setdefault(self.inputs.number_of(x), []).append(name)


def by_products(model, x) -> list[list[str]]:
    readers = Readers()
    weights = {name: getattr(model, name).weight for name in "abc"}
    with with_versions(), Products(weights, readers.seen):
        model(x)
    return list(readers.found.values())


def by_calls(model, x) -> list[list[str]]:
    readers, names = Readers(), {getattr(model, name): name for name in "abc"}
    with with_versions(), module_calls(names, lambda module, x: readers.seen(names[module], x)):
        model(x)
    return list(readers.found.values())


@DEVICES
@USES
@pytest.mark.parametrize("observe", [by_products, by_calls], ids=["products", "calls"])
def test_readers_of_each_input(observe, use, device):
    assert observe(Linears(use, device), torch.zeros(WIDTH, WIDTH, device=device)) == CASES[use]


@USES
def test_a_caller_in_inference_mode_changes_nothing(use):
    """Its own tensors do not count changes, those that the pass makes do."""
    with torch.inference_mode():
        model = Linears(lambda m, x: use(m, x.clone()), "cpu")
        assert by_products(model, torch.zeros(WIDTH, WIDTH)) == CASES[use]
        assert torch.is_inference_mode_enabled()


def test_tensors_that_do_not_count_changes_are_never_the_same_input():
    with torch.inference_mode():
        x = torch.zeros(2, WIDTH)
    inputs = SharedInputs()
    numbers = [inputs.number_of(x), inputs.number_of(x)]
    with torch.no_grad():
        numbers += [inputs.number_of(x.clone()), inputs.number_of(x)]
    assert len(set(numbers)) == 4


@DEVICES
@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: functional.linear(x, w),
        lambda x, w: functional.linear(x, weight=w),
        lambda x, w: functional.linear(bias=None, weight=w, input=x),
        lambda x, w: x @ w.T,
        lambda x, w: x.matmul(other=w.t()),
        lambda x, w: torch.matmul(x, w.mT),
        lambda x, w: torch.mm(x, mat2=w.T),
        lambda x, w: torch.addmm(torch.zeros(3, device=x.device), mat1=x, mat2=w.T),
    ],
)
def test_every_way_to_multiply_is_seen(product, device):
    weight, other = (nn.Parameter(torch.ones(3, WIDTH, device=device)) for _ in range(2))
    x, seen = torch.zeros(2, WIDTH, device=device), []
    with torch.no_grad(), Products({"weight": weight}, lambda name, x: seen.append((name, x))):
        product(x, other)
        assert product(x, weight).shape == (2, 3)
    assert [name for name, _ in seen] == ["weight"] and seen[0][1] is x


@DEVICES
def test_the_matrices_of_experts_are_one_weight(device):
    experts, one = torch.ones(3, WIDTH, WIDTH, device=device), torch.ones(WIDTH, WIDTH, device=device)
    seen, x = [], torch.zeros(2, WIDTH, device=device)
    with Products({"experts": experts, "one": one, "last": experts[2]}, lambda name, _: seen.append(name)):
        for matrix in (experts[1], one, experts[0].T, experts[2], one[1:], experts[0][1:]):
            x[:, : matrix.shape[0]] @ matrix
    assert seen == ["experts", "one", "experts", "last"]  # not what begins inside of a matrix


@pytest.mark.parametrize("observe", [by_products, by_calls], ids=["products", "calls"])
def test_a_model_that_fails_leaves_no_trace(observe):
    model = Linears(lambda m, x: (m.a(x), 1 / 0), "cpu")
    with pytest.raises(ZeroDivisionError):
        observe(model, torch.zeros(2, WIDTH))
    assert not model.a._forward_pre_hooks and torch.is_grad_enabled()
    model.use = nested
    assert observe(model, torch.zeros(2, WIDTH)) == CASES[nested]


def test_what_was_seen_before_a_failure_is_known():
    readers, model = Readers(), Linears(lambda m, x: (m.a(x), m.b(x), 1 / 0), "meta")
    weights = {name: getattr(model, name).weight for name in "abc"}
    with pytest.raises(ZeroDivisionError), Products(weights, readers.seen):
        model(torch.zeros(2, WIDTH, device="meta"))
    assert list(readers.found.values()) == [["a", "b"]]
