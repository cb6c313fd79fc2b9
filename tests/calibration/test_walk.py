"""Walks through small layers: stages in their true order, pauses in which weights are replaced, threads that end."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit.calibration.walk import Stage, Walk, expert_input, find_stages

WIDTH = 6


class Conv1D(nn.Module):
    """As in gpt2: weight [in, out], one addmm."""

    def __init__(self, features_in, features_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_in, features_out))
        self.bias = nn.Parameter(torch.randn(features_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    """Names in no useful order: `z`, `a` and `m` share an input; then `b`; then `up` and `gate`; then `c`."""

    def __init__(self):
        super().__init__()
        for name in "abmz":
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=name == "a"))
        self.up, self.gate, self.c = Conv1D(WIDTH, 10), Conv1D(WIDTH, 10), Conv1D(10, WIDTH)

    def forward(self, x):
        inner = torch.tanh(x)
        inner = self.z(inner) * torch.sigmoid(self.a(inner)) + self.m(inner)
        x = x + self.b(inner)
        normed = x / x.norm(dim=-1, keepdim=True)
        return x + self.c(self.up(normed) * torch.sigmoid(self.gate(normed)))


BLOCK_STAGES = [("z", "a", "m"), ("b",), ("up", "gate"), ("c",)]


class Experts(nn.Module):
    """As transformers has them: 3-D parameters, a loop over the experts that were hit. transposed: as in gpt_oss."""

    def __init__(self, transposed=False, experts=4, middle=5):
        super().__init__()
        self.num_experts, self.transposed = experts, transposed
        shapes = (WIDTH, 2 * middle), (middle, WIDTH)
        up, down = (torch.randn(experts, *(shape if transposed else shape[::-1])) for shape in shapes)
        self.gate_up_proj, self.down_proj = nn.Parameter(up), nn.Parameter(down)

    def multiply(self, x, weight):
        return x @ weight if self.transposed else functional.linear(x, weight)

    def middle(self, expert, x):
        gate, up = self.multiply(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return functional.silu(gate) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        mask = functional.one_hot(top_k_index, self.num_experts).permute(2, 1, 0)
        for expert in (mask.sum((1, 2)) > 0).nonzero()[:, 0]:
            position, token = torch.where(mask[expert])
            found = self.multiply(self.middle(expert, hidden_states[token]), self.down_proj[expert])
            output.index_add_(0, token, found * top_k_weights[token, position, None])
        return output


class Mixture(nn.Module):
    """A linear, then a router and experts, then a linear; a batch whose first number is negative skips the experts."""

    def __init__(self, by_keyword=False):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router, self.experts, self.by_keyword = nn.Linear(WIDTH, 4), Experts(), by_keyword

    def forward(self, x):
        skipped, x = bool(x[0, 0] < 0), self.first(x)
        if not skipped:
            weights, index = self.router(x).softmax(-1).topk(2)
            routed = {"top_k_index": index, "top_k_weights": weights}
            x = x + (self.experts(x, **routed) if self.by_keyword else self.experts(x, index, weights))
        return self.last(x)


MIXTURE_STAGES = [
    Stage(("first.weight",)),
    Stage(("router.weight",)),
    Stage(("experts.gate_up_proj", "experts.down_proj"), "experts"),
    Stage(("last.weight",)),
]


def parameters_of(module):
    """The matrices of a module, not in the order of their use."""
    return dict(sorted(((n, p) for n, p in module.named_parameters() if p.ndim > 1), reverse=True))


def stages_of(module, *inputs):
    return find_stages(lambda: module(*inputs), parameters_of(module))


def names(stages):
    return [tuple(name.removesuffix(".weight") for name in stage.parameters) for stage in stages]


def batch(seed=0, tokens=3, sign=1):
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = sign * x[0, 0].abs()
    return x


def true_inputs(module, x):
    """Name of a module -> what it is called with."""
    found, hooks = {}, []
    for name, part in module.named_modules():
        hooks.append(part.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args)))
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(autouse=True)
def every_walk_ends(no_threads):
    yield
    no_threads("lowbit-walk")


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
def test_every_way_to_multiply_is_seen(product):
    weights = {"one": nn.Parameter(torch.randn(4, WIDTH)), "two": nn.Parameter(torch.randn(3, 4))}
    x = batch()

    def run():
        return product(torch.tanh(product(x, weights["one"])), weights["two"])

    stages = find_stages(run, weights)
    assert names(stages) == [("one",), ("two",)]
    walk = Walk(run, stages, weights)
    assert torch.equal(walk.to(0), x)
    torch.testing.assert_close(walk.to(1), torch.tanh(product(x, weights["one"].detach())))
    torch.testing.assert_close(walk.to_end(), run().detach())


def walk_through(module, x, stages=None):
    return Walk(lambda: module(x), stages or stages_of(module, x), parameters_of(module))


def test_a_walk_arrives_with_the_true_inputs():
    block, x = Block(), batch()
    wanted = true_inputs(block, x)
    for visited in ([0, 1, 2, 3], [2], [1, 3], []):
        walk = walk_through(block, x)
        for stage in visited:
            arrived = walk.to(stage)
            assert torch.equal(arrived, wanted[BLOCK_STAGES[stage][0]][0]) and not arrived.requires_grad
            assert walk.to(stage) is arrived
        output = walk.to_end()
        assert torch.equal(output, block(x)) and not output.requires_grad


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


def test_a_walk_knows_the_residual_stream():
    block, x = Block(), batch()
    after = x + block.b(true_inputs(block, x)["b"][0])
    walk = Walk(lambda: block(x), stages_of(block, x), parameters_of(block), x)
    seen = [walk.to(stage) is not None and walk.stream for stage in range(4)]
    assert all(stream is x for stream in seen[:2]) and all(torch.equal(stream, after) for stream in seen[2:])
    walk.to_end()
    assert walk.stream is None  # nothing is held


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
    walk = Walk(run, stages, parameters)
    assert walk.to(0) is not None and walk.stream is None
    embedded = batch().sin()
    assert walk.to(1) is not None and torch.equal(walk.stream, embedded + one(embedded))
    walk.to_end()


def replace(module, names):
    """Other weights in place, as quantization does."""
    with torch.no_grad():
        for name in names:
            parameter = module.get_parameter(name)
            parameter.copy_((parameter * 1.5).round() / 1.5)


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
    walk, arrivals = walk_through(block, x), []
    for number, stage in enumerate(stages):
        arrivals.append(walk.to(number))
        replace(block, stage.parameters)
    output = walk.to_end()
    block.load_state_dict(state)
    wanted, wanted_output = naive(block, x, stages)
    assert_arrivals(arrivals, wanted, stages)
    assert torch.equal(output, wanted_output) and not torch.allclose(output, before)


@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
def test_many_walks_at_once(by_keyword):
    """Through experts too; every third batch does not use them, and gives None there."""
    torch.manual_seed(1)
    module = Mixture(by_keyword)
    batches = [batch(seed, tokens=2 + seed % 5, sign=-1 if seed % 3 == 0 else 1) for seed in range(40)]
    module.experts.register_forward_pre_hook(Walk.at_experts("experts"), with_kwargs=True)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    walks = [walk_through(module, x, MIXTURE_STAGES) for x in batches]
    arrivals = [[] for _ in batches]
    for number, stage in enumerate(MIXTURE_STAGES):
        for walk, arrived in zip(walks, arrivals, strict=True):
            arrived.append(walk.to(number))
        replace(module, stage.parameters)
    outputs = [walk.to_end() for walk in walks]
    module.by_keyword = False  # for hooks that see positional arguments
    for x, arrived, output in zip(batches, arrivals, outputs, strict=True):
        module.load_state_dict(state)
        wanted, wanted_output = naive(module, x, MIXTURE_STAGES)
        assert_arrivals(arrived, wanted, MIXTURE_STAGES)
        assert (arrived[1] is None) == (arrived[2] is None) == bool(x[0, 0] < 0)
        assert torch.equal(output, wanted_output)


def test_only_walks_of_these_experts_pause_at_the_hook():
    module, x = Mixture(), batch()
    expected = module(x)
    handle = module.experts.register_forward_pre_hook(Walk.at_experts("experts"), with_kwargs=True)
    assert torch.equal(module(x), expected)  # no walk
    linears = [stage for stage in MIXTURE_STAGES if stage.experts is None]
    parameters = {name: p for name, p in parameters_of(module).items() if p.ndim == 2}
    walk = Walk(lambda: module(x), linears, parameters)
    assert walk.to(0) is not None and walk.to(2) is not None and torch.equal(walk.to_end(), expected)
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

    walk = Walk(run, stages_of(block, x), parameters_of(block))
    del run, closed_over
    done.clear()
    watched += [weakref.ref(walk.to(stage)) for stage in moves]
    before = len(done)
    walk.abandon()
    gc.collect()
    assert len(done) == before and len(cleaned) == bool(moves)  # what has not begun does not begin
    assert all(reference() is None for reference in watched)
    walk.abandon()  # again: nothing to do


def test_a_finished_walk_holds_nothing():
    block, x, closed_over = Block(), batch(), Watched()
    walk = Walk(lambda _=closed_over: block(x), stages_of(block, x), parameters_of(block))
    output = walk.to_end()
    assert torch.equal(output, block(x))
    watched = [weakref.ref(closed_over), weakref.ref(output)]
    del closed_over, output
    assert all(reference() is None for reference in watched)
    walk.abandon()  # nothing to do
    assert walk.to(1) is None


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
    walk = Walk(run, stages, {"z.weight": block.z.weight, "b.weight": block.b.weight})
    stops = {"before": 0, "between": 1, "after": 2}[where]
    for stage in range(stops):
        assert walk.to(stage) is not None
    with pytest.raises(kind) as caught:
        walk.to_end() if stops == 2 else walk.to(stops)
    assert caught.value is error
    walk.abandon()


def test_the_error_of_one_walk_leaves_the_others_alone():
    block = Block()
    good, bad = walk_through(block, batch()), Walk(lambda: block(torch.ones(2, 99)), [], {})
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
