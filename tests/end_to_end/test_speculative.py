"""transformers' assisted generation with lowbit's models: greedy, it gives the tokens that plain decoding gives."""

import pytest
import torch
from models import save_tiny, token_ids

import lowbit

NEW = 24


SCHEMES = ("W8A16-G32", "W4A16-G32", "W2A16_ASYM-G16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in 8 bits, and in 4 and 2."""
    work = tmp_path_factory.mktemp("speculative")
    plain = save_tiny(work / "plain", "llama", eos_token_id=None)
    for scheme in SCHEMES:
        lowbit.quantize(plain, work / scheme, scheme=scheme)
    return work


@pytest.fixture(scope="module")
def target(folders):
    """In float32: there, rounding does not decide between tokens when several of them are checked at a time."""
    return lowbit.load(folders / SCHEMES[0], dtype="float32")


def generate(model, ids, **options):
    """(new tokens, forward passes of the model that took)"""
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)
    finally:
        hook.remove()
    return out[0, ids.shape[1] :].tolist(), len(calls)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_assistant_changes_no_token(folders, target, scheme):
    draft = lowbit.load(folders / scheme, dtype="float32")
    draft.generation_config.assistant_confidence_threshold = 0.0  # a random model is sure of nothing
    ids = token_ids(12)
    expected, steps = generate(target, ids)
    assert len(expected) == steps == NEW
    drafted, checks = generate(target, ids, assistant_model=draft)
    assert drafted == expected
    if scheme == SCHEMES[0]:
        assert checks < NEW / 3  # what drafts for itself is always right


def test_prompt_lookup_changes_no_token(target):
    ids = token_ids(12).repeat(1, 3)  # something to look up
    expected, _ = generate(target, ids)
    looked_up, _ = generate(target, ids, prompt_lookup_num_tokens=4)
    assert looked_up == expected
