"""lowbit generate and chat with --assistant and --prompt-lookup."""

import io
import sys

import pytest

import lowbit

PROMPT = ("--prompt", "the fox the fox the", "--max-new-tokens", "16", "--dtype", "float32")


@pytest.fixture(scope="module")
def drafts(chat_model):
    """The options, for `quantized`: itself in 2 bits, and looking up."""
    folder = chat_model.with_name("chat-W2A16")
    if not folder.exists():
        lowbit.quantize(chat_model, folder, scheme="W2A16_ASYM-G16")
    return (("--assistant", folder), ("--prompt-lookup", "4"))


def test_the_text_is_the_same(done, json_of, quantized, drafts):
    plain = json_of("generate", quantized, *PROMPT)
    for draft in drafts:
        result = json_of("generate", quantized, *PROMPT, *draft)
        assert (result["text"], result["tokens"]) == (plain["text"], 16)
        stats = result["stats"]
        assert stats["path"] == "model.generate" and stats["drafted_tokens"] >= stats["accepted_tokens"]
        lines = done("generate", quantized, *PROMPT, *draft, "--stats").err
        assert f"accepted {stats['accepted_tokens']} of {stats['drafted_tokens']} drafted tokens (" in lines
        assert "by model.generate: drafts come from" in lines
    assert "drafted" not in done("generate", quantized, *PROMPT, "--stats").err


def test_chat(done, quantized, drafts, monkeypatch):
    answers = []
    for options in ((), *drafts):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand again\n"))
        options = ("--temperature", "0", "--max-new-tokens", "6", "--dtype", "float32", *options)
        answers.append(done("chat", quantized, *options).out)
    assert answers[0] == answers[1] == answers[2] != ""


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("chat",)], ids=["generate", "chat"])
def test_contradictory_draft_options_are_refused(command, refused, wrong_usage, quantized, drafts, tmp_path):
    command = (command[0], quantized, *command[1:])
    refused(2, *command, *drafts[0], *drafts[1], says=["--assistant", "--prompt-lookup"])
    for option in (("--kv-cache", "int8"), ("--compile",), ("--prefill-chunk", "64")):
        for draft in drafts:
            refused(2, *command, *draft, *option, says=[option[0], draft[0]])
    refused(1, *command, "--assistant", tmp_path / "nothing", says=tmp_path / "nothing")
    wrong_usage(*command, "--prompt-lookup", "0", says="prompt-lookup")


def test_another_vocabulary(refused, quantized):
    refused(1, "generate", quantized, *PROMPT, "--assistant", "reference", says=["2048", "320"])
