"""lowbit generate: the samplers, stop strings, statistics."""

import pytest
from transformers import AutoTokenizer

import lowbit

PROMPT = ("--prompt", "the fox", "--max-new-tokens", "16")


def test_stop_strings(json_of, quantized):
    whole = json_of("generate", quantized, *PROMPT)["text"]
    first, second = whole[6:8], whole[3:5]
    result = json_of("generate", quantized, *PROMPT, "--stop", first, "--stop", second)
    assert result["text"] == whole[: min(whole.find(first), whole.find(second))]


def test_samplers_reach_the_loop(json_of, quantized):
    """Each of them alone, at its strictest, makes sampling greedy; the penalty is transformers' own."""
    greedy = json_of("generate", quantized, *PROMPT)["text"]
    hot = ("--temperature", "1.5", "--seed", "3")
    assert json_of("generate", quantized, *PROMPT, *hot)["text"] != greedy
    for option in (("--top-k", "1"), ("--top-p", "0.01"), ("--min-p", "1")):
        assert json_of("generate", quantized, *PROMPT, *hot, *option)["text"] == greedy
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    ids = tokenizer("the fox", return_tensors="pt")
    output = lowbit.load(quantized).generate(**ids, max_new_tokens=16, do_sample=False, repetition_penalty=3.0)
    wanted = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json_of("generate", quantized, *PROMPT, "--repetition-penalty", "3")["text"] == wanted != greedy


@pytest.mark.usefixtures("compiler")
def test_statistics(done, json_of, quantized):
    result = json_of("generate", quantized, *PROMPT, "--prefill-chunk", "1")
    stats = result["stats"]
    assert stats["prompt_tokens"] == result["prompt_tokens"] and stats["new_tokens"] == result["tokens"]
    assert stats["path"] == "recorded loop" and stats["why"] is None and stats["reused_tokens"] == 0
    assert 0 < stats["time_to_first_token"] < stats["seconds"] and stats["decode_tokens_per_second"] > 0
    lines = done("generate", quantized, *PROMPT, "--stats").err
    assert "16 tokens" in lines and "per second" in lines and "by recorded loop" in lines
    assert "by recorded loop" not in done("generate", quantized, *PROMPT, "--no-compile").err


def test_wrong_options(refused, wrong_usage, quantized):
    refused(2, "generate", quantized, *PROMPT, "--stop", "", says="--stop")
    for option, value in (("--top-k", "-1"), ("--min-p", "2"), ("--repetition-penalty", "0"), ("--prefill-chunk", "0")):
        wrong_usage("generate", quantized, *PROMPT, option, value, says=option[2:])
    wrong_usage("chat", quantized, "--context", "grow", says="slide")
