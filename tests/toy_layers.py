"""Layers small enough to know what happens in them, and what is asked of them: stages, true inputs, other weights."""

import torch
from torch import nn
from torch.nn import functional

from lowbit.calibration.staged_pass import Stage, find_stages

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


def replace(module, names):
    """Other weights in place, as quantization does."""
    with torch.no_grad():
        for name in names:
            parameter = module.get_parameter(name)
            parameter.copy_((parameter * 1.5).round() / 1.5)
