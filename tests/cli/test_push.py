"""`lowbit push` as a shell sees it; what arrives at a Hub is tested in tests/publish."""

import shutil
from types import SimpleNamespace

import pytest
from folders import contents, write_json
from hub import READ_ONLY, running_hub

import lowbit.eval


@pytest.fixture
def failures(monkeypatch):
    """What `lowbit verify` finds."""
    found = []
    monkeypatch.setattr(lowbit.eval, "verify", lambda folder, **options: SimpleNamespace(ok=not found, failures=found))
    return found


@pytest.fixture
def hub(monkeypatch, failures):
    with running_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "chat-4bit")


def test_dry_run_shows_the_card_and_the_files(done, folder, hub):
    outcome = done("push", folder, "me/tiny", "--dry-run")
    assert outcome.out.startswith("---\n") and "# tiny" in outcome.out
    assert "model.safetensors" in outcome.err and "would be pushed to me/tiny (private)" in outcome.err
    assert hub.requests == []


def test_a_card_can_be_shown_edited_and_pushed(done, folder, hub, tmp_path):
    shown = done("push", folder, "me/tiny", "--dry-run").out
    card = tmp_path / "card.md"
    card.write_text(shown + "\nIt likes foxes.\n", encoding="utf-8")
    outcome = done("push", folder, "me/tiny", "--card", card)
    assert outcome.out.endswith(f"pushed to {hub.url}/me/tiny (private)\n") and outcome.err == ""
    assert hub.contents("me/tiny")["README.md"] == card.read_bytes()
    assert "already at" in done("push", folder, "me/tiny", "--card", card).out


def test_json(json_of, folder, hub):
    result = json_of("push", folder, "me/tiny", "--public")
    assert (result["repo"], result["url"], result["changed"]) == ("me/tiny", f"{hub.url}/me/tiny", True)
    assert not result["private"] and result["card"].startswith("---\n")
    there = hub.contents("me/tiny")
    assert result["files"] == {name: len(there[name]) for name in there if name != ".gitattributes"}


def test_options_reach_the_card(json_of, folder, tmp_path):
    write_json(tmp_path / "eval.json", {"dataset": "stdlib", "perplexity": 12.3456, "tokens": 10})
    options = ["--eval", tmp_path / "eval.json", "--base-model", "acme/Tiny"]
    result = json_of("push", folder, "me/", "--dry-run", *options)
    assert "| perplexity |  | 12.346 |" in result["card"] and "base_model: acme/Tiny" in result["card"]
    assert result["repo"] == "me/Tiny-W4A16-G32" and result["url"] is None


def test_refusals_are_one_line(refused, folder, hub, failures, monkeypatch, tmp_path):
    refused(2, "push", folder, "tiny", says=["tiny", "NAMESPACE/NAME"])
    refused(2, "push", folder, "me/", "--base-model", "Tiny", says="org/name")
    refused(1, "push", tmp_path / "none", "me/", says=["no such folder", tmp_path / "none"])
    refused(1, "push", folder, "me/", "--card", tmp_path / "none.md", says=["none.md", "No such file"])
    refused(1, "push", folder, "me/", "--eval", tmp_path / "none.json", says="none.json")
    failures.append("model.norm.weight holds NaN")
    refused(1, "push", folder, "me/", says=["lowbit verify", "model.norm.weight holds NaN"])
    failures.clear()
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    refused(1, "push", folder, "me/tiny", says=["me/tiny", "hf auth login"])


def test_dense_models_are_left_to_hf_upload(refused, chat_model):
    before = contents(chat_model)
    refused(1, "push", chat_model, "me/", "--dry-run", says=["nothing is quantized", "hf upload"])
    assert contents(chat_model) == before
