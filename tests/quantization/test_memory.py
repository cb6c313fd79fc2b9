"""What a calibrated run expects to take, against what is counted on small shapes, and whether its forward passes stay
open between the stages of a layer."""

import types
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding

from lowbit.calibration.staged_pass import StagedPass, find_stages
from lowbit.numerics.scheme import Scheme
from lowbit.quantization import memory
from lowbit.quantization.memory import Shapes, expected_memory, pass_bytes, solver_peak
from lowbit.quantizers import checked_options, gptq, gptq_factor, gptq_grids
from lowbit.torch_api import place_of

HELD_NOW = 10_000
# Two streams of 40 tokens, of which three hidden states of 3 numbers of 2 bytes each are held
SHAPES = Shapes([[]], 2, 2, 3, [16, 16, 8], True)
OPEN_PASSES = 2 * 40 * 3 * 3 * 2


@pytest.mark.parametrize(
    ("allowed", "free", "keep"),
    [
        (HELD_NOW + OPEN_PASSES, 0, True),
        (HELD_NOW + OPEN_PASSES - 1, 10**9, False),
        (None, 2 * OPEN_PASSES, True),  # half of what is free
        (None, 2 * OPEN_PASSES - 2, False),
    ],
)
def test_passes_stay_open_where_that_is_allowed(allowed, free, keep, monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda: HELD_NOW)
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    expected = expected_memory(SHAPES, allowed)
    assert expected.keep == keep
    assert expected.peak == HELD_NOW + (OPEN_PASSES if keep else OPEN_PASSES * 16 // 40)  # else one at a time


class Counted(TorchDispatchMode):
    """Bytes of the tensors that operators give back, for as long as these live; `peak`: the most at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return output

    def _count(self, tensor):
        storage, size = place_of(tensor)[0], tensor.untyped_storage().nbytes()
        if storage not in self._alive:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._alive[storage] = self._alive.get(storage, 0) + 1
        weakref.finalize(tensor, self._forget, storage, size)

    def _forget(self, storage, size):
        self._alive[storage] -= 1
        if not self._alive[storage]:
            del self._alive[storage]
            self.now -= size


@pytest.mark.parametrize(("rows", "features"), [(64, 768), (1536, 256), (512, 512)])
def test_what_the_solver_holds(rows, features, monkeypatch):
    """Within a tenth, where groups and slices are as small beside the matrices as they are in a model."""
    monkeypatch.setattr(gptq_factor, "SLICE_ELEMENTS", 2**12)
    monkeypatch.setattr(gptq_grids, "SHRINKS", (1.0,))
    x, weight = torch.randn(2 * features, features), torch.randn(rows, features)
    with torch.no_grad(), Counted() as counted:
        stats = {"hessian": x.T @ x, "missing": torch.randn(rows, features)}
        counted.peak = counted.now
        gptq.quantize(weight, stats, Scheme(4, 16, False), checked_options("gptq", {"sweeps": 1}))
    assert counted.peak == pytest.approx(solver_peak(rows, features, True), rel=0.1)


def test_what_a_waiting_pass_holds():
    """A decoder layer's pass at its widest linear, beside the layer and what it was called with."""
    hidden, tokens = 128, 256
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.no_grad():
        layer, x = LlamaDecoderLayer(config, 0).eval(), torch.randn(1, tokens, hidden)
        positions = LlamaRotaryEmbedding(config)(x, torch.arange(tokens).unsqueeze(0))
    parameters = {name: p for name, p in layer.named_parameters() if p.ndim == 2}
    counted = Counted()

    def run():
        with counted:
            return layer(x.clone(), position_embeddings=positions)

    stages = find_stages(run, parameters, x)
    counted.now = 0
    staged = StagedPass(run, stages, parameters)
    assert staged.to(len(stages) - 1).shape[-1] == 512
    widest = types.SimpleNamespace(widest=512, streams=1, itemsize=4, hidden_size=hidden)
    assert counted.now == pytest.approx(pass_bytes(widest, tokens), rel=0.1)
    staged.abandon()
