"""The loop gives the tokens that `model.generate` gives, on any architecture, however the prompt is cut and padded."""

import inspect
import logging

import pytest
import torch
from covering import slow_but
from models import tiny_model
from tape import Tapes
from tiny import tiny_model_that_runs
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from lowbit.errors import InputError, UsageError
from lowbit.generation import Decoder, Session, generate
from lowbit.generation.steps.graph import Eager
from lowbit.generation.steps.notices import say_once
from lowbit.transformers_api import cache_argument

# architecture -> what its config needs: prompts are longer than the windows
ARCHITECTURES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "phi3": {}, "gpt2": {"n_positions": 512}, "gpt_neox": {}, "qwen3_moe": {},
    "gemma2": {"sliding_window": 16}, "gemma3": {"sliding_window": 16}, "mixtral": {"sliding_window": 16},
    "gpt_oss": {"sliding_window": 16},
}  # fmt: skip
NEW = 12


def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts, all but the first padded on the left."""
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : length * row // (rows + 1)] = 0
    return ids.masked_fill(mask == 0, 0), mask


def expected(model, ids, mask, new: int = NEW, **options) -> torch.Tensor:
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)
    return output[:, ids.shape[1] :]


def was_captured(stats) -> bool:
    """Or not, because transformers 5.17 makes a tensor of a number in each step of some models."""
    return stats.path == "tape" or "lift_fresh" in (stats.why or "")


@pytest.fixture
def model(quantized_model):
    return quantized_model("llama")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", slow_but(("llama", "gemma3", "mixtral"), ARCHITECTURES))
def test_greedy_tokens_are_those_of_model_generate(name, rows, quantized_model):
    model = quantized_model(name, max_position_embeddings=512, **ARCHITECTURES[name])
    decoder, captured = Decoder(model), Decoder(model, graphs=Tapes())
    called = Decoder(model, graphs=Eager())
    for length, chunks in ((200, (None, 64)), (7, (None, 3)), (1, (1,))):
        ids, mask = batch(rows, length)
        wanted = expected(model, ids, mask)
        for chunk in chunks:
            decoder.forget()
            assert torch.equal(decoder.generate(ids, mask, max_new_tokens=NEW, prefill_chunk=chunk).tokens, wanted)
            assert decoder.stats.path == "recorded loop" and decoder.stats.why is None
        assert torch.equal(captured.generate(ids, mask, max_new_tokens=NEW).tokens, wanted)
        assert was_captured(captured.stats)
        assert torch.equal(called.generate(ids, mask, max_new_tokens=NEW).tokens, wanted)
        assert called.stats.path == "static loop"


@pytest.mark.parametrize("name", ["kosmos-2.5", "exaone4_5", "hyperclovax_vision_v2"])
def test_models_that_count_positions_for_themselves(name):
    """From an offset, say; with positions from 0 on they would give something else."""
    if name not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know the model")
    model, _ = tiny_model_that_runs("AutoModelForImageTextToText", name)
    ids, mask = batch(3, 9)
    pad = model.generation_config.pad_token_id or 0
    ids = (ids % 90 + 3).masked_fill(mask == 0, pad)
    wanted = expected(model, ids, mask, eos_token_id=None)
    for graphs in (None, Tapes()):
        result = generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=(), graphs=graphs)
        assert torch.equal(result.tokens, wanted)
        # kosmos-2.5 of transformers 5.17 gives other logits with a static cache
        assert result.stats.path != "model.generate" or "off in a trial" in result.stats.why


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_eager_attention_is_captured_too(name, tapes):
    model = tiny_model(name, attn_implementation="eager", **ARCHITECTURES[name])
    ids, mask = batch(2, 30)
    result = generate(model, ids, mask, max_new_tokens=NEW, graphs=tapes)
    assert torch.equal(result.tokens, expected(model, ids, mask)) and was_captured(result.stats)


def test_model_generate_takes_a_static_cache_too(quantized_model):
    for name in ("llama", "gemma3"):
        model = quantized_model(name, max_position_embeddings=512, **ARCHITECTURES[name])
        ids, mask = batch(3, 40)
        static = expected(model, ids, mask, cache_implementation="static")
        assert torch.equal(static, generate(model, ids, mask, max_new_tokens=NEW).tokens)


@pytest.mark.parametrize("graphs", [None, Eager(), Tapes()], ids=["recorded", "called", "captured"])
def test_rows_end_by_themselves(model, graphs):
    """An end token that comes up early in some rows, later or never in others."""
    ids, mask = batch(3, 9)
    free = expected(model, ids, mask, new=40, eos_token_id=None)
    ends = sorted({int(token) for token in free[:, 3:12].flatten()})
    lengths = set()
    for eos in (ends[0], ends[len(ends) // 2], ends[-2:], ends):
        wanted = expected(model, ids, mask, new=40, eos_token_id=eos, pad_token_id=0)
        result = generate(model, ids, mask, max_new_tokens=40, eos_token_id=eos, graphs=graphs)
        assert torch.equal(result.tokens, wanted)
        for row, length in zip(free.tolist(), result.lengths, strict=True):
            first = [number for number, token in enumerate(row) if token in (eos if isinstance(eos, list) else [eos])]
            assert length == (first[0] + 1 if first else 40)
        assert result.stats.new_tokens == sum(result.lengths)
        lengths.update(result.lengths)
    assert len(lengths) > 3


def test_end_tokens_of_the_generation_config(quantized_model):
    model = tiny_model()
    ids, mask = batch(1, 9)
    free = generate(model, ids, mask, max_new_tokens=20, eos_token_id=()).tokens[0].tolist()
    model.generation_config.eos_token_id = [free[5]]
    assert generate(model, ids, mask, max_new_tokens=20).lengths == [free.index(free[5]) + 1]
    assert generate(model, ids, mask, max_new_tokens=20, eos_token_id=()).lengths == [20]


def test_a_prompt_is_run_from_where_it_differs(model, monkeypatch):
    decoder, fed = Decoder(model, graphs=Eager()), []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kw: fed.append(kw["input_ids"].shape[1]) or real(*args, **kw))

    def run(ids):
        fed.clear()
        result = decoder.generate(ids, max_new_tokens=4, eos_token_id=())
        assert torch.equal(result.tokens, expected(model, ids, torch.ones_like(ids), 4, eos_token_id=None))
        return decoder.stats.reused_tokens

    ids, _ = batch(1, 20)
    first = decoder.generate(ids, max_new_tokens=4, eos_token_id=()).tokens
    conversation = torch.cat([ids, first, ids[:, :5]], 1)
    del fed[:]
    assert run(conversation) == 23 and fed[:4] == [6, 1, 1, 1]  # the last answer token was never fed
    assert run(conversation) == 28 and fed[:1] == [1]  # the logits of the last one are wanted
    other = conversation.clone()
    other[0, 10] += 1
    assert run(other) == 10
    decoder.forget()
    assert run(other) == 0
    assert run(batch(1, 300)[0]) == 0  # a longer cache starts empty


def test_prefix_is_reused_past_a_sliding_window_and_with_padding(quantized_model):
    model = quantized_model("gemma3", max_position_embeddings=512, **ARCHITECTURES["gemma3"])
    decoder = Decoder(model, graphs=Tapes())
    ids, mask = batch(3, 60)
    decoder.generate(ids, mask, max_new_tokens=20, eos_token_id=())
    ids[:, 30:] = 5
    result = decoder.generate(ids, mask, max_new_tokens=20, eos_token_id=())
    assert torch.equal(result.tokens, expected(model, ids, mask, 20, eos_token_id=None))
    assert decoder.stats.reused_tokens == int(mask[:, :30].sum()) and decoder.runner.graphs.captures == 1


def test_tokens_are_read_while_the_next_step_runs(model, tapes):
    decoder = Decoder(model, graphs=tapes)
    ids, mask = batch(1, 5)
    plain = decoder.generate(ids, mask, max_new_tokens=4, eos_token_id=()).tokens
    # nothing is captured before the first token is out; no token is read before the step after it has been started
    assert tapes.log == ["read 0", "step", "step", "read 1", "step", "read 2", "read 3"]
    tapes.log.clear()
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=4, eos_token_id=()).tokens, plain)
    assert tapes.log == ["step", "read 4", "step", "read 5", "step", "read 6", "read 7"]
    assert tapes.captures == 1 and tapes.generators == [decoder.runner.step.generator]


def test_a_step_is_captured_again_only_for_what_it_holds(model, tapes):
    decoder = Decoder(model, graphs=tapes)
    for captures, rows, length, options in (
        (1, 1, 5, {}), (1, 1, 100, {}), (2, 1, 5, {"temperature": 1.0, "seed": 1}),
        (2, 1, 5, {"temperature": 1.0, "seed": 2}), (3, 2, 5, {}), (4, 2, 400, {}), (5, 2, 5, {"eos_token_id": 7}),
    ):  # fmt: skip
        decoder.generate(*batch(rows, length), max_new_tokens=3, **options)
        assert tapes.captures == captures


def test_on_token_sees_each_token_and_ends(model, tapes):
    ids, mask = batch(2, 6)
    for graphs in (None, tapes):
        seen = []

        def on_token(tokens, seen=seen):
            seen.append(tokens)
            return len(seen) == 5

        result = generate(model, ids, mask, max_new_tokens=20, graphs=graphs, on_token=on_token)
        assert seen == result.tokens.T.tolist() and len(seen) == 5


def test_logits_that_are_no_numbers(tapes):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    for graphs in (None, tapes):
        for temperature in (0.0, 1.0):
            with pytest.raises(InputError, match="NaN"):
                generate(model, *batch(2, 6), max_new_tokens=3, temperature=temperature, graphs=graphs)


def test_stats_count_what_was_done(model):
    decoder = Decoder(model)
    ids, mask = batch(3, 8)
    decoder.generate(ids, mask, max_new_tokens=5, eos_token_id=())
    stats = decoder.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.reused_tokens) == (int(mask.sum()), 15, 0)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0 and stats.seconds >= stats.time_to_first_token
    assert stats.decode_tokens_per_second == pytest.approx(12 / stats.decode_seconds)

    def stop(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.generate(ids, mask, max_new_tokens=5, on_token=stop)
    assert decoder.stats.new_tokens == 3


@pytest.mark.parametrize("name", ["mamba", "gpt_neo", "recurrent_gemma", "moshi"])
def test_models_without_a_static_cache_run_in_model_generate(name, caplog):
    model, _ = tiny_model_that_runs("AutoModelForCausalLM", name)
    say_once.cache_clear()
    caplog.set_level(logging.INFO, "lowbit")
    ids, mask = batch(1, 9)
    ids = ids % 90 + 3
    seen = []
    for _ in range(2):
        result = generate(model, ids, mask, max_new_tokens=6, eos_token_id=(), on_token=seen.append)
    assert torch.equal(result.tokens, expected(model, ids, mask, 6, eos_token_id=None))
    assert seen[6:] == result.tokens.T.tolist()
    assert result.stats.path == "model.generate" and result.stats.why
    said = [record for record in caplog.records if "model.generate" in record.message]
    assert len(said) == 1 and result.stats.why in said[0].message and said[0].levelno == logging.INFO
    stopped = generate(model, ids, mask, max_new_tokens=6, eos_token_id=(), on_token=lambda tokens: True)
    assert torch.equal(stopped.tokens, result.tokens[:, :1])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_int8_cache_runs_in_the_loop(name, quantized_model):
    """Past the window too; captured and called it holds the same."""
    model = quantized_model(name, max_position_embeddings=512, **ARCHITECTURES[name])
    called = Session(model, None, int8_cache=True).decoder
    ids, mask = batch(2, 30)
    first = called.generate(ids, mask, max_new_tokens=NEW, eos_token_id=())
    captured = Decoder(model, int8_cache=True, graphs=Tapes()).generate(ids, mask, max_new_tokens=NEW, eos_token_id=())
    assert torch.equal(first.tokens, captured.tokens)
    assert (first.stats.path, captured.stats.path) == ("recorded loop", "tape")
    assert all(layer.keys.dtype == torch.int8 for layer in called.runner.step.cache.layers)


def test_a_cache_that_fails_or_counts_in_python_is_not_used(model, caplog):
    ids, mask = batch(1, 9)
    wanted = expected(model, ids, mask)

    def failing(model, batch, length):
        raise ValueError("no such cache")

    config = AutoConfig.for_model("mistral", sliding_window=16)
    for make_cache, reason in (
        (failing, "no such cache"),
        (lambda model, batch, length: DynamicCache(config=model.config), "not static"),
        (lambda model, batch, length: StaticCache(config=config, max_cache_len=length), "counts in Python"),
    ):
        result = generate(model, ids, mask, max_new_tokens=NEW, make_cache=make_cache)
        assert torch.equal(result.tokens, wanted)
        assert result.stats.path == "model.generate" and reason in result.stats.why
        assert caplog.records[-1].levelname == "WARNING" and "asked for" in caplog.records[-1].message


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_first_prompt_that_is_cut_short_rules_nothing_out(error, monkeypatch):
    """What it has left in the cache is not seen either."""
    model, (ids, mask) = tiny_model(), batch(2, 20)
    decoder, real = Decoder(model), model.lm_head.forward

    def cut(*args):
        raise error

    monkeypatch.setattr(model.lm_head, "forward", cut)  # the cache is filled by then
    with pytest.raises(error):
        decoder.generate(ids, mask, max_new_tokens=NEW, prefill_chunk=8)
    monkeypatch.setattr(model.lm_head, "forward", real)
    result = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=(), prefill_chunk=8)
    assert torch.equal(result.tokens, expected(model, ids, mask, eos_token_id=None))
    assert (result.stats.path, result.stats.reused_tokens) == ("recorded loop", 0)


def test_a_model_that_has_run_is_not_ruled_out(model, monkeypatch):
    """An error is its own, then; before it has run, it is taken for one of the static cache."""
    ids, mask = batch(1, 20)
    decoder, real = Decoder(model, graphs=Eager()), model.forward
    decoder.generate(ids[:, :9], max_new_tokens=2)

    def failing(*args, **kwargs):
        if kwargs["input_ids"].shape[1] == 8:
            raise RuntimeError("it has broken down")
        return real(*args, **kwargs)

    failing.__signature__ = inspect.signature(real)
    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(RuntimeError, match="broken down"):
        decoder.generate(ids + 1, mask, max_new_tokens=2, prefill_chunk=8)
    assert decoder.stats.path == "static loop"
    result = generate(model, ids, mask, max_new_tokens=NEW, prefill_chunk=8)
    assert torch.equal(result.tokens, expected(model, ids, mask)) and "broken down" in result.stats.why


def test_a_model_that_leaves_the_cache_empty_is_not_run_in_the_loop(model, monkeypatch):
    """Its next step would see nothing of the prompt."""
    ids, mask = batch(2, 9)
    wanted, real, name = expected(model, ids, mask), model.forward, cache_argument(model)

    def forward(*args, **kwargs):
        if isinstance(kwargs.get(name), StaticCache):
            kwargs[name] = None
        return real(*args, **kwargs)

    forward.__signature__ = inspect.signature(real)
    monkeypatch.setattr(model, "forward", forward)
    result = generate(model, ids, mask, max_new_tokens=NEW)
    assert torch.equal(result.tokens, wanted)
    assert result.stats.path == "model.generate" and "does not fill the cache" in result.stats.why


def test_processors_of_a_generation_config_are_kept():
    model = tiny_model()
    model.generation_config.suppress_tokens = list(range(3, 100))
    ids, mask = batch(1, 9)
    result = generate(model, ids, mask, max_new_tokens=8, eos_token_id=())
    assert result.stats.path == "model.generate" and "suppress_tokens" in result.stats.why
    assert not ((result.tokens >= 3) & (result.tokens < 100)).any()


@pytest.mark.usefixtures("compiler")
def test_a_step_that_cannot_be_captured_is_called(model, monkeypatch, caplog):
    """And said, and forgotten once another step can be."""
    real = model.forward

    def forward(*args, **kwargs):
        kwargs["input_ids"].max().item()  # the host waits for the device
        return real(*args, **kwargs)

    forward.__signature__ = inspect.signature(real)
    monkeypatch.setattr(model, "forward", forward)
    ids, mask = batch(2, 9)
    for graphs, path in ((Tapes(), "tape"), (None, "recorded loop")):
        say_once.cache_clear()
        decoder = Decoder(model, graphs=graphs)
        result = decoder.generate(ids, mask, max_new_tokens=NEW)
        assert torch.equal(result.tokens, expected(model, ids, mask))
        assert result.stats.path == "static loop" and "cannot be captured" in result.stats.why
        assert caplog.records[-1].levelno == logging.WARNING and result.stats.why in caplog.records[-1].message
        with monkeypatch.context() as whole:
            whole.setattr(model, "forward", real)
            stats = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=5).stats
        assert (stats.path, stats.why) == (path, None)


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens(monkeypatch):
    """`aot_eager` traces as inductor does and needs no C++ compiler."""
    model = AutoModelForCausalLM.from_config(tiny_model().config).eval()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    ids, mask = batch(2, 9)
    result = generate(model, ids, mask, max_new_tokens=NEW, compile=True)
    assert torch.equal(result.tokens, expected(model, ids, mask))
    assert result.stats.path == "compiled static loop" and result.stats.setup_seconds > 0


def test_a_step_that_cannot_be_compiled_is_not(model, monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: failing)
    say_once.cache_clear()
    ids, mask = batch(2, 9)
    result = generate(model, ids, mask, max_new_tokens=NEW, compile=True)
    assert torch.equal(result.tokens, expected(model, ids, mask))
    assert (result.stats.path, result.stats.why) == ("static loop", "torch.compile fails: no compiler")
    assert caplog.records[-1].levelno == logging.WARNING and result.stats.why in caplog.records[-1].message


def test_wrong_prompts(model):
    ids, mask = batch(2, 6)
    for arguments, options, says in (
        ((ids[0],), {}, "expected"),
        ((ids, mask[:, :3]), {}, "attention_mask"),
        ((ids, mask.flip(1)), {}, "left"),
        ((ids,), {"max_new_tokens": 0}, "max_new_tokens"),
        ((ids,), {"prefill_chunk": 0}, "prefill_chunk"),
        ((ids,), {"top_p": 0.0}, "top_p"),
    ):
        with pytest.raises(UsageError, match=says):
            generate(model, *arguments, **{"max_new_tokens": 2, **options})
