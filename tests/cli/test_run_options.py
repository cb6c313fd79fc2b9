"""Options of `generate` and `chat` that say how the model is held in memory."""

import pytest

from lowbit.generation import kv_int8, open_session

PROMPT = ("--prompt", "the quick brown fox", "--max-new-tokens", 12)


def text_of(model, **kwargs):
    session = open_session(model, **kwargs)
    return session.generate(session.encode(PROMPT[1]), max_new_tokens=PROMPT[3]).text


@pytest.fixture
def encoded(monkeypatch):
    """Shapes of the rows that were kept as int8."""
    shapes = []
    encode = kv_int8.encode
    monkeypatch.setattr(kv_int8, "encode", lambda rows: shapes.append(tuple(rows.shape)) or encode(rows))
    return shapes


def test_int8_keys_and_values(json_of, quantized, encoded):
    json_of("generate", quantized, *PROMPT, "--kv-cache", "full")
    assert not encoded
    made = json_of("generate", quantized, *PROMPT, "--kv-cache", "int8")
    assert encoded and made["tokens"] == 12
    assert made["text"] == text_of(quantized, kv_cache="int8")


def test_int8_keys_and_values_in_a_chat(done, quantized, encoded, monkeypatch):
    lines = iter(["hello", "!exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    done("chat", quantized, "--kv-cache", "int8", "--lm-head", "W8A16-G64", "--max-new-tokens", 4, "--seed", 1)
    assert encoded


def test_a_quantized_head(json_of, quantized):
    asked = "W2A16-G16"
    made = json_of("generate", quantized, *PROMPT, "--lm-head", asked)["text"]
    assert made == text_of(quantized, lm_head=asked) != text_of(quantized)
    for usual in ([], ["--lm-head", "none"]):  # the embedded model's is too small for it
        assert json_of("generate", quantized, *PROMPT, *usual)["text"] == text_of(quantized)


def test_a_large_head_is_quantized_on_a_cpu(done, json_of, quantized, monkeypatch):
    monkeypatch.setattr("lowbit.hf.head._LARGE", 1)
    expected = text_of(quantized, lm_head="W8A16-G128")
    assert json_of("generate", quantized, *PROMPT)["text"] == expected == text_of(quantized, lm_head="auto")
    told = "the output embedding runs in W8A16-G64 (KL 0.002 or less): --lm-head none leaves it dense"
    assert told in " ".join(done("generate", quantized, *PROMPT).err.split())
    for asked in ("none", "W8A16-G32"):
        assert told not in " ".join(done("generate", quantized, *PROMPT, "--lm-head", asked).err.split())
    assert json_of("generate", quantized, *PROMPT, "--lm-head", "none")["text"] == text_of(quantized)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv-cache", "int4"], "kv-cache is 'int4'; allowed: full, int8"),
        (["--lm-head", "int8"], "scheme 'int8' is not known"),
    ],
)
def test_wrong_run_options_are_refused(refused, quantized, options, says):
    refused(2, "generate", quantized, *PROMPT, *options, says=says)
