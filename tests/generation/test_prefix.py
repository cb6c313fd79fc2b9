"""What of a prompt is in the cache already, by the tokens that were run and those that were dropped again."""

import pytest
import torch
from models import tiny_model

from lowbit.generation import Decoder, Sampling
from lowbit.generation.request import Request, TokenSettings
from lowbit.generation.steps.cache import filled_cache
from lowbit.generation.steps.prefix import PrefixCache


def tokens(*rows, mask=None) -> torch.Tensor:
    ids = torch.tensor(rows)
    return torch.stack([ids, torch.ones_like(ids) if mask is None else torch.tensor(mask)])


@pytest.fixture
def cache():
    return PrefixCache(filled_cache(tiny_model(), 2, 16), 2, 16)


def test_a_prompt_shares_what_comes_before_the_first_difference_of_any_row(cache):
    assert cache.shared(tokens([1, 2], [3, 4])) == 0
    cache.crop(tokens([], []).long())
    cache.append(tokens([1, 2, 3], [4, 5, 6]))
    cache.append(tokens([7], [8]))
    assert cache.shared(tokens([1, 2, 3, 7, 9], [4, 5, 6, 8, 9])) == 4
    assert cache.shared(tokens([1, 2, 3, 7], [4, 5, 6, 8])) == 3  # the logits of the last one are wanted
    assert cache.shared(tokens([1, 2], [4, 5])) == 1
    assert cache.shared(tokens([1, 2, 3, 7, 9], [4, 0, 6, 8, 9])) == 1
    assert cache.shared(tokens([1, 2, 3, 7, 9], [4, 5, 6, 8, 9], mask=[[1] * 5, [0, 1, 1, 1, 1]])) == 0


def test_nothing_is_shared_with_what_was_forgotten_until_the_cache_is_cropped(cache):
    prompt = tokens([1, 2, 3], [4, 5, 6])
    cache.crop(prompt[..., :2])
    assert cache.filled() == 2 and cache.shared(prompt) == 2
    cache.forget()
    cache.append(prompt[..., 2:])
    assert cache.shared(prompt) == 0
    cache.crop(prompt[..., :0])
    cache.append(prompt)
    assert cache.filled() == 0 and cache.shared(prompt) == 2


def test_a_cache_that_proves_too_short_grows_ahead():
    """A conversation that grows by a turn needs no new cache, and no new capture, each time."""
    decoder = Decoder(tiny_model())
    lengths = []
    for rows, new in ((1, 1000), (1, 1024), (2, 1024)):
        prompt = tokens(*[[1]] * rows)
        request = Request(prompt, TokenSettings(Sampling(), (), 0), new, prefill_chunk=None, seed=None)
        assert decoder.runner.prepare(request) is None
        lengths.append(decoder.runner.cache.length)
    assert lengths == [1024, 1536, 1280]


def test_requests_that_fit(cache):
    assert cache.fits(2, 16) and cache.fits(2, 3)
    assert not cache.fits(2, 17) and not cache.fits(1, 16) and not cache.fits(3, 16)
