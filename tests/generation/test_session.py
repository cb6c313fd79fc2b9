"""Sessions: text that streams, where it stops, what the cache keeps between answers."""

import pytest
import torch
from folders import save_chat_model

from lowbit.errors import InputError, UsageError
from lowbit.generation import Decoder, open_session
from lowbit.generation.steps.graph import Eager


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return open_session(save_chat_model(tmp_path_factory.mktemp("session") / "model"))


@pytest.fixture
def fed(session, monkeypatch):
    """How many tokens each call of the model is given."""
    session.decoder.forget()
    lengths, real = [], session.model.forward

    def forward(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(session, "decoder", Decoder(session.model, graphs=Eager()))  # a recorded step runs no forward
    monkeypatch.setattr(session.model, "forward", forward)
    return lengths


def greedy(session, ids, count):
    output = session.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, ids.shape[1] :]


@pytest.mark.usefixtures("compiler")
def test_text_streams_in_pieces(session):
    ids, pieces = session.encode("the quick"), []
    result = session.generate(ids, max_new_tokens=20, on_text=pieces.append)
    wanted = greedy(session, ids, 20)
    assert result.text == "".join(pieces) == session.tokenizer.decode(wanted, skip_special_tokens=True)
    assert len(pieces) > 3 and (result.tokens, result.prompt_tokens) == (len(wanted), ids.shape[1])
    assert result.stats.path == "recorded loop" and not result.interrupted


def test_stop_strings_end_the_run_and_are_left_out(session, fed):
    ids = session.encode("the quick")
    whole = session.generate(ids, max_new_tokens=30).text
    words = whole[10:13]
    fed.clear()
    result = session.generate(ids, max_new_tokens=30, stop=["not there", words])
    assert result.text == whole[: whole.find(words)]
    assert result.tokens < 30 and len(fed) == result.tokens  # nothing is run past it


def test_an_answer_is_not_run_again(session, fed):
    """What the next prompt shares with the conversation so far stays in the cache, but for the last token of it."""
    messages = [{"role": "user", "content": "hello there"}]
    ids = session.encode_chat(messages)
    answer = session.generate(ids, max_new_tokens=6)
    assert fed == [ids.shape[1], *[1] * 5]
    fed.clear()
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "and again"}]
    again = session.encode_chat(messages)
    held = session.decoder.runner.cache.tokens[0, 0]
    shared = next(n for n in range(len(held) + 1) if n == len(held) or held[n] != again[0, n])
    result = session.generate(again, max_new_tokens=3)
    assert shared >= ids.shape[1] and fed == [again.shape[1] - shared, 1, 1]
    assert result.stats.reused_tokens == shared
    assert result.text == session.tokenizer.decode(greedy(session, again, 3), skip_special_tokens=True)


def test_prompts_are_cut(session, fed):
    session.generate(session.encode("the fox " * 20), max_new_tokens=2, prefill_chunk=7)
    assert all(length == 7 for length in fed[:-2]) and sum(fed) == session.encode("the fox " * 20).shape[1] + 1


def test_ctrl_c_returns_what_came_so_far(session):
    ids, pieces = session.encode("the quick"), []
    whole = session.generate(ids, max_new_tokens=20).text

    def on_text(text):
        pieces.append(text)
        if len(pieces) == 5:
            raise KeyboardInterrupt

    result = session.generate(ids, max_new_tokens=20, on_text=on_text)
    assert result.interrupted and 0 < result.tokens < 20
    assert result.text == "".join(pieces) and whole.startswith(result.text)
    assert session.generate(ids, max_new_tokens=20).text == whole  # the cache is whole


def test_seeds_and_samplers(session):
    ids = session.encode("the quick")

    def sampled(**options):
        return session.generate(ids, max_new_tokens=16, temperature=1.5, **options).text

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    greedy_text = session.generate(ids, max_new_tokens=16).text
    for options in ({"top_k": 1}, {"top_p": 0.001}, {"min_p": 1.0}):
        assert sampled(**options) == greedy_text
    assert session.generate(ids, max_new_tokens=16, repetition_penalty=5.0).text != greedy_text


def test_prompts_and_settings_beyond_the_model_are_refused(session):
    with pytest.raises(InputError, match="context of 256"):
        session.generate(session.encode("the fox"), max_new_tokens=256)
    with pytest.raises(InputError, match="vocabulary"):
        session.generate(torch.tensor([[5000]]), max_new_tokens=2)
    with pytest.raises(UsageError, match="temperature"):
        session.generate(session.encode("the fox"), max_new_tokens=2, temperature=-1.0)
