"""transformers' assisted generation with lowbit's models: greedy, it gives the tokens that plain decoding gives."""

import pytest
import torch
from models import save_tiny, token_ids

import lowbit

NEW = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target in 8 bits and drafts of the same model in 4 and 2, in float32: there, rows do not depend on each other's
    rounding."""
    work = tmp_path_factory.mktemp("speculative")
    plain = save_tiny(work / "plain", "llama", eos_token_id=None)
    for scheme in ("W8A16-G32", "W4A16-G32", "W2A16_ASYM-G16"):
        lowbit.quantize(plain, work / scheme, scheme=scheme)
    return {name: lowbit.load(work / name, dtype="float32") for name in ("W8A16-G32", "W4A16-G32", "W2A16_ASYM-G16")}


def generate(model, ids, **options):
    """(new tokens, forward passes of the model that took)"""
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)
    finally:
        hook.remove()
    return out[0, ids.shape[1] :].tolist(), len(calls)


@pytest.mark.parametrize("draft", ["W8A16-G32", "W4A16-G32", "W2A16_ASYM-G16"])
def test_assistant_changes_no_token(models, draft):
    ids, target = token_ids(12), models["W8A16-G32"]
    expected, steps = generate(target, ids)
    assert len(expected) == steps == NEW
    drafted, checks = generate(target, ids, assistant_model=models[draft])
    assert drafted == expected
    if draft == "W8A16-G32":
        assert checks < NEW / 2  # it drafts for itself, and is always right
    else:
        assert checks <= NEW


def test_prompt_lookup_changes_no_token(models):
    ids = token_ids(12).repeat(1, 3)  # something to look up
    expected, _ = generate(models["W8A16-G32"], ids)
    looked_up, checks = generate(models["W8A16-G32"], ids, prompt_lookup_num_tokens=4)
    assert looked_up == expected and checks <= NEW
