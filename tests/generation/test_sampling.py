"""Sampling against transformers' own processors, and drawn tokens against their distribution."""

import itertools

import pytest
import torch
import transformers
from models import tiny_model

from lowbit.errors import UsageError
from lowbit.generation import Sampling, generate
from lowbit.generation.sampling import NO_TOKEN, pick, scores

ROWS, VOCABULARY = 4, 101
SETTINGS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((0.0, 0.3, 1.0, 2.5), (0, 1, 7, 500), (1.0, 0.9, 0.1), (0.0, 0.2), (1.0, 1.7))
]


def test_filtered_scores_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * 4
    logits[1, :20] = logits[1, 0]  # ties
    ids = torch.randint(0, VOCABULARY, (ROWS, 9), generator=generator)
    seen = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter_(1, ids, True)
    before, model = logits.clone(), tiny_model()
    distinct = set()
    for settings in SETTINGS:
        sampling = Sampling(**settings)
        config = transformers.GenerationConfig(**sampling.arguments())
        config._eos_token_tensor = None
        wanted = model._get_logits_processor(config, input_ids_seq_length=9)(ids, logits.clone())
        actual = scores(logits, sampling, seen if sampling.repetition_penalty != 1 else None)
        assert torch.equal(actual, wanted), settings
        distinct.add(int(actual.isfinite().sum()))
    assert torch.equal(logits, before) and len(distinct) > 8


def test_tokens_are_drawn_as_often_as_their_probability_says():
    draws = 40_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(5)) * 1.5
    for sampling in (Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(2.0, min_p=0.1)):
        probabilities = scores(logits, sampling).softmax(-1)[0].double()
        generator = torch.Generator().manual_seed(3)
        tokens = pick(logits.expand(draws, -1), sampling, None, generator)
        counts = tokens.bincount(minlength=12).double()
        assert counts[probabilities == 0].sum() == 0
        spread = (draws * probabilities * (1 - probabilities)).sqrt()
        assert ((counts - draws * probabilities).abs() <= 4.5 * spread + 1e-9).all()


def test_a_seed_gives_the_tokens_that_model_generate_draws(quantized_model):
    """On CPU, where the generator is the same: the whole chain of processors, padding and penalties included."""
    model = quantized_model("llama")
    ids = torch.randint(3, 128, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for options in (
        {"temperature": 0.8}, {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.4},
    ):  # fmt: skip
        torch.manual_seed(11)
        wanted = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=20, **Sampling(**options).arguments()
        )
        actual = generate(model, ids, mask, max_new_tokens=20, seed=11, **options)
        assert torch.equal(actual.tokens, wanted[:, 8:]), options


def test_greedy_with_a_penalty(quantized_model):
    model = quantized_model("llama")
    ids = torch.randint(3, 128, (3, 8))
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    wanted = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, repetition_penalty=1.5
    )
    assert torch.equal(generate(model, ids, mask, max_new_tokens=20, repetition_penalty=1.5).tokens, wanted[:, 8:])
    assert not torch.equal(generate(model, ids, mask, max_new_tokens=20).tokens, wanted[:, 8:])


def test_seeds(quantized_model, tapes):
    model = quantized_model("llama")
    ids = torch.randint(3, 128, (2, 8))

    def drawn(seed, graphs=None):
        return generate(model, ids, max_new_tokens=16, temperature=1.0, seed=seed, graphs=graphs).tokens

    state = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(drawn(None), drawn(None))
    assert torch.equal(drawn(1), drawn(1, tapes))  # warming up and capturing draw nothing that counts
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)])
def test_rows_whose_logits_are_no_numbers(sampling):
    logits = torch.zeros(4, 10)
    logits[0, 3], logits[1, 3], logits[2, 3] = torch.nan, torch.inf, -torch.inf
    tokens = pick(logits, sampling, None, torch.Generator())
    assert tokens[:2].tolist() == [NO_TOKEN] * 2 and (tokens[2:] >= 0).all()


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2},
                 {"repetition_penalty": 0}, {"temperature": float("nan")}],
)  # fmt: skip
def test_wrong_settings(settings):
    with pytest.raises(UsageError, match=f"{next(iter(settings))} is"):
        Sampling(**settings)
