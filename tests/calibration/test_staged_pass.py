"""Staged passes through small layers: true inputs, pauses in which weights are replaced, threads that end."""

import gc
import weakref

import pytest
import torch
from torch import nn
from toy_layers import (
    BLOCK_STAGES,
    MIXTURE_STAGES,
    WIDTH,
    Block,
    Experts,
    Mixture,
    batch,
    parameters_of,
    replace,
    stages_of,
    true_inputs,
)  # fmt: skip

from lowbit.calibration.staged_pass import Stage, StagedPass, expert_input, find_stages


@pytest.fixture(autouse=True)
def every_pass_ends(no_threads):
    yield
    no_threads("lowbit-staged-pass")


def staged_through(module, x, stages=None):
    return StagedPass(lambda: module(x), stages or stages_of(module, x), parameters_of(module))


def test_a_pass_arrives_with_the_true_inputs():
    block, x = Block(), batch()
    wanted = true_inputs(block, x)
    for visited in ([0, 1, 2, 3], [2], [1, 3], []):
        staged = staged_through(block, x)
        for stage in visited:
            arrived = staged.to(stage)
            assert torch.equal(arrived, wanted[BLOCK_STAGES[stage][0]][0]) and not arrived.requires_grad
            assert staged.to(stage) is arrived
        output = staged.to_end()
        assert torch.equal(output, block(x)) and not output.requires_grad


def test_a_pass_knows_the_residual_stream():
    block, x = Block(), batch()
    after = x + block.b(true_inputs(block, x)["b"][0])
    staged = StagedPass(lambda: block(x), stages_of(block, x), parameters_of(block), x)
    seen = [staged.to(stage) is not None and staged.stream for stage in range(4)]
    assert all(stream is x for stream in seen[:2]) and all(torch.equal(stream, after) for stream in seen[2:])
    staged.to_end()
    assert staged.stream is None  # nothing is held


def test_the_residual_stream_of_the_first_layer():
    """What that layer is given is embedded on the way; the stream is known from the first sum on."""
    one, two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    parameters = {"one": one.weight, "two": two.weight}

    def run():
        x = batch().sin()
        x = x + one(x)
        return x + two(x.tanh())

    stages = find_stages(run, parameters)
    assert [stage.joins for stage in stages] == [False, True]
    staged = StagedPass(run, stages, parameters)
    assert staged.to(0) is not None and staged.stream is None
    embedded = batch().sin()
    assert staged.to(1) is not None and torch.equal(staged.stream, embedded + one(embedded))
    staged.to_end()


def naive(module, x, stages):
    """What arrives at each stage and what comes out, the layer run anew for each; the weights of a stage are replaced
    after it."""
    arrivals = []
    for stage in stages:
        name = stage.experts or stage.parameters[0].removesuffix(".weight")
        arrivals.append(true_inputs(module, x).get(name))
        replace(module, stage.parameters)
    with torch.no_grad():
        return arrivals, module(x)


def assert_arrivals(actual, wanted, stages):
    for stage, got, arrival in zip(stages, actual, wanted, strict=True):
        got = got if stage.experts or got is None else (got,)
        assert (got is None) == (arrival is None), stage
        assert got is None or all(torch.equal(*pair) for pair in zip(got, arrival, strict=True)), stage


def test_weights_replaced_in_a_pause_are_used():
    block, x = Block(), batch()
    stages, before = stages_of(block, x), block(x)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    staged, arrivals = staged_through(block, x), []
    for number, stage in enumerate(stages):
        arrivals.append(staged.to(number))
        replace(block, stage.parameters)
    output = staged.to_end()
    block.load_state_dict(state)
    wanted, wanted_output = naive(block, x, stages)
    assert_arrivals(arrivals, wanted, stages)
    assert torch.equal(output, wanted_output) and not torch.allclose(output, before)


@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
def test_many_passes_at_once(by_keyword):
    """Through experts too; every third batch does not use them, and gives None there."""
    torch.manual_seed(1)
    module = Mixture(by_keyword)
    batches = [batch(seed, tokens=2 + seed % 5, sign=-1 if seed % 3 == 0 else 1) for seed in range(40)]
    module.experts.register_forward_pre_hook(StagedPass.at_experts("experts"), with_kwargs=True)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    passes = [staged_through(module, x, MIXTURE_STAGES) for x in batches]
    arrivals = [[] for _ in batches]
    for number, stage in enumerate(MIXTURE_STAGES):
        for staged, arrived in zip(passes, arrivals, strict=True):
            arrived.append(staged.to(number))
        replace(module, stage.parameters)
    outputs = [staged.to_end() for staged in passes]
    module.by_keyword = False  # for hooks that see positional arguments
    for x, arrived, output in zip(batches, arrivals, outputs, strict=True):
        module.load_state_dict(state)
        wanted, wanted_output = naive(module, x, MIXTURE_STAGES)
        assert_arrivals(arrived, wanted, MIXTURE_STAGES)
        assert (arrived[1] is None) == (arrived[2] is None) == bool(x[0, 0] < 0)
        assert torch.equal(output, wanted_output)


def test_only_passes_of_these_experts_pause_at_the_hook():
    module, x = Mixture(), batch()
    expected = module(x)
    handle = module.experts.register_forward_pre_hook(StagedPass.at_experts("experts"), with_kwargs=True)
    assert torch.equal(module(x), expected)  # no staged pass
    linears = [stage for stage in MIXTURE_STAGES if stage.experts is None]
    parameters = {name: p for name, p in parameters_of(module).items() if p.ndim == 2}
    staged = StagedPass(lambda: module(x), linears, parameters)
    assert staged.to(0) is not None and staged.to(2) is not None and torch.equal(staged.to_end(), expected)
    handle.remove()


class Watched:
    """Something that a forward pass holds."""


@pytest.mark.parametrize("moves", [[], [0], [0, 2]], ids=["before the start", "at the first stage", "later"])
def test_abandoning_ends_the_pass_at_once_and_frees_what_it_holds(moves):
    block, x, closed_over = Block(), batch(), Watched()
    watched, cleaned, done = [weakref.ref(closed_over)], [], []
    for part in block.children():
        part.register_forward_hook(lambda *_: done.append(1))

    def run(closed_over=closed_over):
        local = Watched()
        watched.append(weakref.ref(local))
        try:
            return block(x)
        finally:
            cleaned.append(local is not closed_over)

    staged = StagedPass(run, stages_of(block, x), parameters_of(block))
    del run, closed_over
    done.clear()
    watched += [weakref.ref(staged.to(stage)) for stage in moves]
    before = len(done)
    staged.abandon()
    gc.collect()
    assert len(done) == before and len(cleaned) == bool(moves)  # what has not begun does not begin
    assert all(reference() is None for reference in watched)
    staged.abandon()  # again: nothing to do


def test_a_finished_pass_holds_nothing():
    block, x, closed_over = Block(), batch(), Watched()
    staged = StagedPass(lambda _=closed_over: block(x), stages_of(block, x), parameters_of(block))
    output = staged.to_end()
    assert torch.equal(output, block(x))
    watched = [weakref.ref(closed_over), weakref.ref(output)]
    del closed_over, output
    assert all(reference() is None for reference in watched)
    staged.abandon()  # nothing to do
    assert staged.to(1) is None


@pytest.mark.parametrize("where", ["before", "between", "after"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_an_error_in_the_pass_is_raised_to_the_caller(where, kind):
    block, x, error = Block(), batch(), kind("out of memory, say")

    def run():
        if where == "before":
            raise error
        inner = block.z(x)
        if where == "between":
            raise error
        block.b(inner)
        raise error

    stages = [Stage(("z.weight",)), Stage(("b.weight",))]
    staged = StagedPass(run, stages, {"z.weight": block.z.weight, "b.weight": block.b.weight})
    stops = {"before": 0, "between": 1, "after": 2}[where]
    for stage in range(stops):
        assert staged.to(stage) is not None
    with pytest.raises(kind) as caught:
        staged.to_end() if stops == 2 else staged.to(stops)
    assert caught.value is error
    staged.abandon()


def test_the_error_of_one_pass_leaves_the_others_alone():
    block = Block()
    good, bad = staged_through(block, batch()), StagedPass(lambda: block(torch.ones(2, 99)), [], {})
    assert good.to(0) is not None
    with pytest.raises(RuntimeError):
        bad.to_end()
    assert torch.equal(good.to_end(), block(batch()))


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_expert_input_is_what_the_expert_multiplies(transposed):
    """For any tokens, also those that the router would send elsewhere."""
    experts, hidden = Experts(transposed), batch(tokens=7)
    routing = torch.zeros(7, 2, dtype=torch.int64)
    for expert in range(4):
        found = expert_input(experts, experts.gate_up_proj, expert, hidden, routing)
        assert torch.equal(found, hidden)
        found = expert_input(experts, experts.down_proj, expert, hidden, routing)
        torch.testing.assert_close(found, experts.middle(expert, hidden).detach())
        assert not found.requires_grad
    replace(experts, ["gate_up_proj"])  # is measured with the weights as they are now
    found = expert_input(experts, experts.down_proj, 1, hidden, routing)
    torch.testing.assert_close(found, experts.middle(1, hidden).detach())
