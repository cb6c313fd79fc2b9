"""The figures of `lowbit bench`: bytes, the loops, and what comes of a side that fails."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from lowbit.bench.bytes_moved import bytes_per_second, cache_bytes, extra_memory, model_bytes, step_bytes, tensor_bytes
from lowbit.bench.loops import LOOPS, Timing, prompts
from lowbit.bench.peers import PEERS, parse_against
from lowbit.bench.random_model import dense_model, quantized_model
from lowbit.bench.repeats import Bench, Side, kernels
from lowbit.bench.shapes import config_of
from lowbit.errors import UsageError
from lowbit.numerics.scheme import Scheme

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CONFIG = config_of("tiny")


@pytest.fixture(scope="module")
def dense():
    return dense_model(CONFIG, dtype=torch.bfloat16)


def bench(**changes):
    return Bench(**{"device": CPU, "batches": (2,), "prompt_tokens": 5, "new_tokens": 4, "rounds": 2, **changes})


def test_bytes_of_a_step(dense):
    """By hand: two layers of q, k, v, o, gate, up, down, and two norms; the last norm, and the head, which is tied."""
    linears = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    rest = 2 * (5 * 128 + 512 * 128) + 4 * 2 * 16  # norms and head in bf16, two float32 tables of frequencies
    cache = 2 * 2 * 2 * 32 * 2 * 100  # keys and values, layers, heads, head_dim, bytes, tokens
    assert cache_bytes(CONFIG, 3, 100, torch.bfloat16) == 3 * cache
    assert step_bytes(dense, 3, 100) == 2 * linears + rest + 3 * cache
    quantized = quantized_model(CONFIG, Scheme(4, 128), dtype=torch.bfloat16)
    groups = linears // 128
    assert step_bytes(quantized, 3, 100) == linears / 2 + 2 * groups + 14 * 16 + rest + 3 * cache


def test_bytes_of_experts_and_windows():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    model = dense_model(config, dtype=torch.float32)
    experts = 8 * 3 * 32 * 16 * 4
    one, many = step_bytes(model, 1, 0), step_bytes(model, 1000, 0)
    assert many - one == pytest.approx(experts * 3 / 4)
    windows = config_of("gemma-2-2b", 2)  # one layer sees 4096 tokens, the other one all
    assert cache_bytes(windows, 1, 8000, torch.bfloat16) == 2 * (4096 + 8000) * 4 * 256 * 2


def test_tensors_of_tensors_and_shared_ones_count_once():
    class Pair(torch.Tensor):
        def __tensor_flatten__(self):
            return ["first", "second"], None

    pair = torch.zeros(7).as_subclass(Pair)
    pair.first, pair.second = torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int16)
    assert tensor_bytes(pair) == 3 + 4
    linear = nn.Linear(4, 4, bias=False)
    assert model_bytes(nn.ModuleList([linear, nn.Sequential(linear)])) == 64


def test_memory_and_bandwidth():
    with extra_memory(CPU) as extra:
        torch.ones(2**24)  # 64 MiB, and freed
    assert not extra or 2**25 < extra[0] < 2**28
    assert 0 < bytes_per_second(CPU) < 1e13


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_make_every_token(loop, dense, monkeypatch):
    """Also those after an end token."""
    monkeypatch.setattr(dense.generation_config, "eos_token_id", list(range(512)))
    seen = []
    hook = dense.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape),
                                                 with_kwargs=True)  # fmt: skip
    timing = LOOPS[loop](dense)(prompts(512, 3, 7, 1, CPU), 5)
    hook.remove()
    called = 1 if loop == "lowbit" else 4  # a recorded step is repeated without the model
    assert seen == [(3, 7), *[(3, 1)] * called]
    assert (timing.batch, timing.prompt_tokens, timing.steps) == (3, 7, 4)
    assert timing.first_seconds > 0 and timing.decode_seconds > 0


def test_prompts_of_rounds_share_no_start():
    first, second = (prompts(512, 2, 6, number, CPU) for number in (1, 2))
    assert (first[:, 0] != second[:, 0]).all() and torch.equal(first, prompts(512, 2, 6, 1, CPU))


def test_figures_are_medians(dense):
    """Of runs that are made up: 10 prompt tokens a second, and 4, 2 and 1 steps a second beside 2 each."""
    fake = bench(rounds=3)
    fake.sides = {name: {"weights_bytes": 0, "peak_bytes": None} for name in ("lowbit", "other")}
    fake.bandwidth = 1e6
    for seconds in (1.0, 2.0, 4.0):
        mine, other = Timing(2, 5, 1.0, 4, seconds, ""), Timing(2, 5, 1.0, 4, 2.0, "")
        done = {("lowbit", "generate"): mine, ("other", "generate"): other}
        fake._keep(done, 2, "lowbit")
    fake._step_bytes = {("lowbit", 2): 1e5, ("other", 2): 2e5}
    mine, other = fake.result()["rows"]
    assert (mine["decode_tokens_per_second"], mine["spread"], mine["slower"]) == (4.0, [2.0, 8.0], None)
    assert (mine["prefill_tokens_per_second"], mine["first_token_seconds"]) == (10.0, 1.0)
    assert mine["bandwidth_share"] == pytest.approx(1e5 / 0.5 / 1e6)
    assert (other["slower"], other["bandwidth_share"]) == (1.0, pytest.approx(2e5 / 0.5 / 1e6))


def test_sides_that_fail_are_named(dense):
    """One that does not load, one that breaks in a run: what else there is, is measured."""

    def broken():
        raise RuntimeError("no kernel\nfor this GPU")

    breaks = dense_model(CONFIG, dtype=torch.bfloat16)
    breaks.model.layers[0].mlp = None
    running = bench(batches=(1,), rounds=1)
    running.compare(Side("lowbit", "", lambda: dense), [Side("a", "", broken), Side("b", "", lambda: breaks),
                                                        Side("c", "", lambda: dense)])  # fmt: skip
    result = running.result()
    assert {(row["side"], row["loop"]) for row in result["rows"]} == {(s, x) for s in ("lowbit", "c") for x in LOOPS}
    failed = [(left["side"], left["loop"], left["batch"]) for left in result["left_out"]]
    assert failed[0] == ("a", None, None) and {f[0] for f in failed[1:]} == {"b"} and len(failed) == 3
    assert result["left_out"][0]["reason"] == "no kernel"
    alone = bench(batches=(1,), rounds=1)
    alone.compare(Side("lowbit", "", lambda: dense), [Side("a", "", broken)])
    assert [row["side"] for row in alone.result()["rows"]] == ["lowbit", "lowbit"]


def test_batches_that_do_not_fit_are_named(dense, monkeypatch):
    monkeypatch.setattr("lowbit.bench.repeats.available_memory", lambda: 2**20)
    running = bench(batches=(1, 1000), rounds=1)
    running.compare(Side("lowbit", "", lambda: dense), [])
    result = running.result()
    assert {row["batch"] for row in result["rows"]} == {1}
    (left,) = result["left_out"]
    assert left["batch"] == 1000 and left["reason"].startswith("keys, values and activations take 0.0 GB")
    long = bench(prompt_tokens=250, new_tokens=7)
    long.compare(Side("lowbit", "", lambda: dense), [Side(name, "", lambda: dense) for name in ("lowbit", "lowbit")])
    assert [left["reason"] for left in long.result()["left_out"]] == ["257 tokens exceed the context of 256"]


def test_kernels_of_a_model(dense):
    assert kernels(dense, (1,)) == []
    model = quantized_model(CONFIG, Scheme(4, 64), dtype=torch.bfloat16, backend="reference")
    assert {"scheme": "W4A16-G64", "shape": [512, 128], "count": 4, "backend": "reference", "inputs": "exact",
            "kernels": {}} in kernels(model, (1, 16))  # fmt: skip


def test_names_of_peers():
    assert parse_against("none") == (False, [])
    assert parse_against("bitsandbytes, unquantized") == (True, ["bitsandbytes NF4", "bitsandbytes int8"])
    with pytest.raises(UsageError, match="cannot compare against 'vllm'; allowed: unquantized, bitsandbytes, torchao"):
        parse_against("torchao,vllm")
    assert PEERS["bitsandbytes int8"].refuse(Scheme(4, 128)) is not None
    installed = replace(PEERS["bitsandbytes int8"], package="torch")
    assert installed.refuse(Scheme(8, 128)) is None and installed.refuse(Scheme(4, 128)) == "it has 8 bits, not 4"
