"""Recorded steps: what is repeated is what Python would do."""

import accelerate
import pytest
import torch
from models import tiny_model
from test_loop import ARCHITECTURES, batch, expected

from lowbit.generation import Decoder
from lowbit.generation.steps.graph import Eager
from lowbit.generation.steps.recording import Recordings


class Counting:
    """A step of a few operations on tensors of its own."""

    length, filled = 1000, 0

    def __init__(self, operations):
        self.x, self.y, self.operations = torch.arange(6.0).view(2, 3), torch.zeros(2, 3), operations

    def set_visible(self, visible: int) -> None:
        self.visible = visible

    def __call__(self) -> None:
        self.filled += 1
        self.y.copy_(self.operations(self.x))
        self.x += 1


def constants(x):
    changed = torch.zeros(3)  # has to be zero again in the next step
    changed += x.sum(0)
    return changed * torch.tensor(2.0)


def in_place(x):
    y = x.clone()
    y[:, 1:].mul_(3)
    y.t()[0] -= 1
    return y


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "operations",
    [
        constants,
        in_place,
        lambda x: torch.cat([x[:, 1:], -x[:, :1]], -1) * torch.ones(3),
        lambda x: torch.sort(x.sin(), -1).values + x.topk(1).indices,
        lambda x: x.reshape(3, 2).t().contiguous().view(-1)[None, :3] + torch.linspace(0, 1, 3),  # it has no `out`
        lambda x: (x.bfloat16() / 3).double().float() ** 2 + x.mean(-1, keepdim=True),
        lambda x: torch.where(x > 4, x, x.new_full((), 7.0)).softmax(-1) @ torch.eye(3),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh") + torch.nn.functional.layer_norm(x, (3,)),
        lambda x: torch.stack([*x.unbind(-1)], -1).roll(1, -1).masked_fill(x == 5, 0).cumsum(-1),
    ],
)
@torch.inference_mode()
def test_operations_are_repeated(operations):
    python, repeated = Counting(operations), Counting(operations)
    python()
    replay = Recordings().capture(repeated, None)
    for _ in range(5):
        assert repeated.filled == python.filled and torch.equal(repeated.x, python.x)
        torch.testing.assert_close(repeated.y, python.y, rtol=1e-6, atol=1e-6)
        python()
        replay()


@pytest.mark.usefixtures("compiler")
@torch.inference_mode()
def test_random_numbers_are_drawn_anew():
    generator, seen = torch.Generator().manual_seed(0), []
    step = Counting(lambda x: torch.rand(3, generator=generator) + torch.empty(3).exponential_(generator=generator))
    replay = Recordings().capture(step, generator)
    for _ in range(3):
        seen.append(step.y[0].clone())
        replay()
    generator.manual_seed(0)
    for numbers in seen:
        assert torch.equal(
            numbers, torch.rand(3, generator=generator) + torch.empty(3).exponential_(generator=generator)
        )


@pytest.mark.usefixtures("compiler")
@torch.inference_mode()
def test_interrupted_while_it_is_recorded_anew():
    step, interrupted = Counting(lambda x: x * 2 if wanted else interrupted.pop()), []
    wanted = True
    replay = Recordings().capture(step, None)
    step.filled = replay.sees
    wanted = False
    with pytest.raises(IndexError):
        replay()
    wanted = True
    for _ in range(3):
        before = step.x.clone()
        replay()
        assert torch.equal(step.y, before * 2) and torch.equal(step.x, before + 1)


@pytest.mark.parametrize("reads", [lambda x: x * x.max().item(), lambda x: x if x.sum() > 0 else -x, torch.nonzero])
@torch.inference_mode()
def test_a_step_that_reads_a_tensor_cannot_be_recorded(reads):
    with pytest.raises(RuntimeError, match="reads a tensor"):
        Recordings().capture(Counting(reads), None)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_more_positions_than_a_recording_sees(name, quantized_model):
    """It is recorded anew when it has used them up, and with it goes on in the next run."""
    model = quantized_model(name, max_position_embeddings=1024, **ARCHITECTURES[name])
    decoder = Decoder(model)
    for length in (250, 240):
        ids, mask = batch(2, length)
        result = decoder.generate(ids, mask, max_new_tokens=30, eos_token_id=())
        assert torch.equal(result.tokens, expected(model, ids, mask, 30, eos_token_id=None))
        assert decoder.stats.path == "recorded loop" and decoder.runner.replay.sees == 512


@pytest.mark.usefixtures("compiler")
def test_sampled_tokens_are_those_of_called_steps(quantized_model):
    model = quantized_model("llama")
    ids, mask = batch(3, 20)
    for options in ({"temperature": 0.8, "top_k": 20}, {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.3}):
        results = [
            Decoder(model, graphs=graphs).generate(ids, mask, max_new_tokens=25, seed=3, eos_token_id=(), **options)
            for graphs in (None, Eager())
        ]
        assert torch.equal(results[0].tokens, results[1].tokens)
        assert [result.stats.path for result in results] == ["recorded loop", "static loop"]


def test_weights_that_come_and_go_are_not_kept():
    assert isinstance(Decoder(accelerate.cpu_offload(tiny_model())).runner.graphs, Eager)


def test_without_a_compiler_steps_are_called(quantized_model, without_native):
    assert isinstance(Decoder(quantized_model("llama")).runner.graphs, Eager)
