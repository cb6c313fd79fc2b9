"""Continuous batching: requests of packed models that run together get the answers that they get alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from served import LONG, NAME, serving
from transformers import ContinuousBatchingConfig, GenerationConfig

from lowbit.errors import InputError, UsageError
from lowbit.generation import open_session
from lowbit.layers.linear import LowbitLinear
from lowbit.options import BatchingOptions, LimitOptions
from lowbit.server.run import answers_of

SIZES = BatchingOptions(continuous_batching=True, cb_num_blocks=64, cb_max_batch_tokens=256)
PROMPTS = [f"the quick brown fox {number} " * (1 + number % 3) for number in range(10)]


@pytest.fixture(scope="module")
def batched(folder):
    with serving(open_session(folder), batching=SIZES, limits=LimitOptions(max_tokens=LONG, context=4000)) as each:
        yield each


def test_generate_batch_runs_packed_linears(folder, session):
    """transformers' own call, with no server: prompts of several lengths, more than fit in one pass."""
    model = open_session(folder).model
    assert any(isinstance(module, LowbitLinear) for module in model.modules())
    prompts = [session.encode(prompt)[0].tolist() for prompt in PROMPTS]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1)
    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by default it takes most of the memory
    made = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=sizes)
    for prompt, output in zip(prompts, made.values(), strict=True):
        alone = session.decoder.generate(torch.tensor([prompt]), max_new_tokens=12, eos_token_id=())
        assert output.generated_tokens == alone.tokens[0].tolist()


def test_ten_at_once_get_what_they_get_alone(batched, session):
    def ask(prompt: str) -> str:
        with batched.client() as client:
            stream = len(prompt) % 2 == 0
            made = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0, stream=stream)
            return "".join(chunk.choices[0].text for chunk in made) if stream else made.choices[0].text

    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(ask, PROMPTS))
    assert texts == [session.generate(session.encode(prompt), max_new_tokens=12).text for prompt in PROMPTS]


def test_each_samples_as_it_says(batched):
    """One that samples does not make the next one sample."""
    greedy = batched.complete(max_tokens=12, temperature=0).json()["choices"][0]["text"]
    sampled = {batched.complete(max_tokens=12, temperature=5.0).json()["choices"][0]["text"] for _ in range(3)}
    assert len(sampled) > 1
    assert batched.complete(max_tokens=12, temperature=0).json()["choices"][0]["text"] == greedy
    assert batched.complete(max_tokens=12, temperature=5.0, top_k=1).json()["choices"][0]["text"] == greedy


def test_a_stop_string_and_a_client_that_goes_end_an_answer(batched):
    whole = batched.complete(max_tokens=30, temperature=0).json()["choices"][0]["text"]
    stop = whole[10:13]
    cut = batched.complete(max_tokens=3000, temperature=0, stop=stop).json()
    assert cut["choices"][0]["text"] == whole[: whole.index(stop)] and cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < 30
    with batched.client() as client:
        chunks = client.completions.create(model=NAME, prompt="the quick", max_tokens=3000, stream=True)
        next(iter(chunks))
        chunks.close()
    assert batched.complete(max_tokens=2).status == 200


@pytest.mark.parametrize("given", [{"seed": 1}, {"min_p": 0.1}, {"repetition_penalty": 1.5}])
def test_what_a_batch_cannot_do_for_one_is_refused(batched, given):
    reply = batched.complete(**given)
    assert reply.status == 400 and "--continuous-batching" in reply.error["message"]
    assert reply.error["param"] == next(iter(given))


def test_a_model_whose_answers_would_be_others_is_refused(session, monkeypatch):
    monkeypatch.setattr(session.model.generation_config, "no_repeat_ngram_size", 3)
    with pytest.raises(InputError, match=r"does not do what this model needs: .* no_repeat_ngram_size"):
        answers_of(session, LimitOptions(), SIZES, None)


def test_a_request_beyond_the_paged_cache_is_refused(folder):
    small = BatchingOptions(continuous_batching=True, cb_block_size=32, cb_num_blocks=2)
    with serving(open_session(folder), batching=small) as served:
        assert served.complete(max_tokens=80).error["code"] == "context_length_exceeded"


def test_sizes_of_nothing_are_refused():
    from lowbit.cli.commands.running.generate import RunningOptions
    from lowbit.cli.commands.running.serve import _check_batching

    with pytest.raises(UsageError, match="--cb-max-batch-tokens is a size"):
        _check_batching(BatchingOptions(cb_max_batch_tokens=5), RunningOptions())
