"""Which weights of a layer multiply the same input, in the order of their use: seen in one forward pass."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from toy_layers import BLOCK_STAGES, MIXTURE_STAGES, WIDTH, Block, Mixture, batch, names, parameters_of, stages_of

from lowbit.calibration.staged_pass import StagedPass, find_stages


def test_stages_are_in_the_order_of_use_and_share_what_is_one_input():
    block = Block()
    stages = stages_of(block, batch())
    assert names(stages) == BLOCK_STAGES and all(stage.experts is None for stage in stages)
    assert stages_of(Mixture(), batch()) == MIXTURE_STAGES
    assert stages_of(Mixture(), batch(sign=-1)) == [MIXTURE_STAGES[0], MIXTURE_STAGES[3]]


def test_an_input_is_known_by_identity():
    first, second, third = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
    parameters = {"first": first.weight, "second": second.weight, "third": third.weight}

    def views(x):
        first(x), second(x.view(1, -1, WIDTH)), third(x.detach())

    def equal_copies(x):
        first(x), second(x.clone()), third(x + 0)

    def changed_in_place(x):
        first(x)
        x = x.mul_(2)
        second(x), third(x)

    def freed_at_once(x):
        alive = []
        for linear in (first, second, third):
            alive.append(weakref.ref(copy := x.clone()))
            linear(copy)
            del copy
        assert all(reference() is not None for reference in alive)  # or the next could take the address of the last

    def other_tokens(x):
        first(x), second(x[:1]), third(x)  # all three start at the same address

    def used_twice(x):
        second(first(x)), first(x), third(second(x))

    expected = {
        views: [("first", "second", "third")],
        equal_copies: [("first",), ("second",), ("third",)],
        changed_in_place: [("first",), ("second", "third")],
        freed_at_once: [("first",), ("second",), ("third",)],
        other_tokens: [("first", "third"), ("second",)],
        used_twice: [("first",), ("second",), ("third",)],
    }
    for run, stages in expected.items():
        found = find_stages(lambda run=run: run(batch(tokens=4)), parameters)
        assert names(found) == stages, run.__name__


@pytest.mark.parametrize(
    "product",
    [
        functional.linear,
        lambda x, w: functional.linear(x, w, torch.ones(len(w))),
        lambda x, w: x @ w.T,
        lambda x, w: x.matmul(w.t()),
        lambda x, w: torch.matmul(x, w.T),
        lambda x, w: torch.mm(x, w.T),
        lambda x, w: torch.addmm(torch.zeros(len(w)), x, w.T),
    ],
)
def test_every_way_to_multiply_is_seen(product, no_threads):
    weights = {"one": nn.Parameter(torch.randn(4, WIDTH)), "two": nn.Parameter(torch.randn(3, 4))}
    x = batch()

    def run():
        return product(torch.tanh(product(x, weights["one"])), weights["two"])

    stages = find_stages(run, weights)
    assert names(stages) == [("one",), ("two",)]
    staged = StagedPass(run, stages, weights)
    assert torch.equal(staged.to(0), x)
    torch.testing.assert_close(staged.to(1), torch.tanh(product(x, weights["one"].detach())))
    torch.testing.assert_close(staged.to_end(), run().detach())
    no_threads("lowbit-staged-pass")


def test_linears_that_write_to_the_residual_stream_are_found():
    block, x = Block(), batch()

    def joining(hidden):
        return [
            names([stage])[0] for stage in find_stages(lambda: block(x), parameters_of(block), hidden) if stage.joins
        ]

    assert joining(x) == [("b",), ("c",)]
    assert joining(x.clone()) == []  # not what the layer was given
    assert joining(None) == []  # it is taken to begin with z * a + m, which nothing is added to
    # neither sums that the stream does not enter, nor products that something is done to before
    gelu, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def run():
        y = gelu(x)
        return x + torch.relu(last(y + 0.1 * y**3))

    parameters = {"gelu": gelu.weight, "last": last.weight}
    assert not any(stage.joins for stage in find_stages(run, parameters, x))
