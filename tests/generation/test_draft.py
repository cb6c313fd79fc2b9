"""Drafts change no greedy token, wherever they come from; what became of them is counted; what cannot be is refused."""

import copy

import pytest
import torch
from folders import save_chat_model, save_tokenizer
from models import save_tiny, tiny_model
from tiny import tiny_model_that_runs
from transformers import PreTrainedModel
from transformers.generation import candidate_generator

import lowbit
from lowbit.errors import InputError, UsageError
from lowbit.generation import Decoder, Draft, open_session

pytestmark = pytest.mark.slow

NEW = 24
SCHEMES = ("W8A16-G16", "W4A16-G16", "W2A16_ASYM-G16")
WINDOW = {"llama": {}, "gemma3": {"sliding_window": 16}}


def prompt(length: int = 30) -> torch.Tensor:
    """The same ten tokens over and over: something to look up."""
    ids = torch.randint(3, 128, (1, 10), generator=torch.Generator().manual_seed(length))
    return ids.repeat(1, length)[:, :length]


@pytest.fixture(scope="module", params=WINDOW)
def models(request, tmp_path_factory):
    """(target, {scheme: assistant}): a random model in 8 bits, and in 8, 4 and 2, in float32. They draft although they
    are sure of nothing."""
    work = tmp_path_factory.mktemp("draft")
    save_tiny(work / "plain", request.param, **WINDOW[request.param])
    for scheme in SCHEMES:
        lowbit.quantize(work / "plain", work / scheme, scheme=scheme)
    found = {scheme: lowbit.load(work / scheme, dtype="float32") for scheme in SCHEMES}
    for model in found.values():
        model.generation_config.assistant_confidence_threshold = 0.0
    target = lowbit.load(work / SCHEMES[0], dtype="float32")
    try:
        target.generate(prompt(), max_new_tokens=NEW, assistant_model=found[SCHEMES[0]], eos_token_id=None)
    except RuntimeError:
        with pytest.raises(InputError, match="cannot check drafts of Gemma3ForCausalLM"):
            Decoder(target, draft=Draft(assistant=found[SCHEMES[0]])).generate(prompt(), max_new_tokens=NEW)
        pytest.skip("this transformers checks no drafts of models with a sliding window")
    return target, found


@pytest.fixture
def target(models) -> PreTrainedModel:
    return models[0]


@pytest.fixture
def assistants(models) -> dict[str, PreTrainedModel]:
    return models[1]


@pytest.fixture
def proposed(monkeypatch):
    """How many tokens transformers' generators of candidates give, each time they are asked."""
    counts = []
    for name in ("AssistedCandidateGenerator", "PromptLookupCandidateGenerator"):
        kind = getattr(candidate_generator, name)

        def counted(self, input_ids, real=kind.get_candidates, **kwargs):
            candidates, logits = real(self, input_ids, **kwargs)
            counts.append(candidates.shape[1] - input_ids.shape[1])
            return candidates, logits

        monkeypatch.setattr(kind, "get_candidates", counted)
    return counts


@pytest.mark.parametrize("kind", [*SCHEMES, 1, 5, 40])
def test_greedy_tokens_are_those_without_a_draft(kind, assistants, target, proposed):
    draft = Draft(lookup=kind) if isinstance(kind, int) else Draft(assistant=assistants[kind])
    decoder, plain = Decoder(target, draft=draft), Decoder(target)
    for length in (30, 7):
        proposed.clear()
        wanted = plain.generate(prompt(length), max_new_tokens=NEW, eos_token_id=()).tokens
        result = decoder.generate(prompt(length), max_new_tokens=NEW, eos_token_id=())
        assert torch.equal(result.tokens, wanted)
        stats = result.stats
        assert (stats.path, stats.prompt_tokens, stats.new_tokens) == ("model.generate", length, NEW)
        # each check gives one token that was not drafted
        assert (stats.drafted_tokens, stats.accepted_tokens) == (sum(proposed), NEW - len(proposed))
        if kind == SCHEMES[0]:
            assert stats.accepted_tokens == stats.drafted_tokens > 0 and stats.first_tokens == 1 + proposed[0]
    assert "assistant" in stats.why if draft.lookup is None else "text" in stats.why


def test_answers_end_within_a_check(assistants, target):
    """By on_token, and by end tokens that are drafted."""
    decoder = Decoder(target, draft=Draft(assistant=assistants[SCHEMES[0]]))
    free = decoder.generate(prompt(), max_new_tokens=NEW, eos_token_id=()).tokens[0].tolist()
    seen = []
    stopped = decoder.generate(
        prompt(), max_new_tokens=NEW, eos_token_id=(), on_token=lambda tokens: seen.append(tokens) or len(seen) == 5
    )
    assert stopped.tokens[0].tolist() == free[:5] and seen == [[token] for token in free[:5]]
    for end in sorted(set(free))[:3]:
        result = decoder.generate(prompt(), max_new_tokens=NEW, eos_token_id=end)
        assert result.tokens[0].tolist() == free[: free.index(end) + 1] and result.lengths == [free.index(end) + 1]


def test_a_seed_gives_the_same_tokens_again(assistants, target):
    for draft in (Draft(assistant=assistants[SCHEMES[1]]), Draft(lookup=4)):
        decoder, state = Decoder(target, draft=draft), torch.get_rng_state()

        def sampled(seed, decoder=decoder, **options):
            options = {"max_new_tokens": NEW, "temperature": 1.5, "seed": seed, "eos_token_id": (), **options}
            return decoder.generate(prompt(), **options).tokens.tolist()

        assert sampled(1) == sampled(1) != sampled(2)
        greedy = Decoder(target).generate(prompt(), max_new_tokens=NEW, eos_token_id=()).tokens.tolist()
        for option in ({"top_k": 1}, {"top_p": 0.001}, {"min_p": 1.0}):
            assert sampled(3, **option) == greedy
        assert torch.equal(torch.get_rng_state(), state)


def test_the_repetition_penalty_is_the_one_without_a_draft(assistants, target):
    options = {"max_new_tokens": NEW, "repetition_penalty": 3.0, "eos_token_id": ()}
    wanted = Decoder(target).generate(prompt(), **options).tokens
    for draft in (Draft(assistant=assistants[SCHEMES[1]]), Draft(lookup=4)):
        assert torch.equal(Decoder(target, draft=draft).generate(prompt(), **options).tokens, wanted)


def test_encoder_decoders(proposed):
    model, _ = tiny_model_that_runs("AutoModelForSeq2SeqLM", "t5")
    model.generation_config.update(decoder_start_token_id=0, assistant_confidence_threshold=0.0)
    ids = prompt() % 90 + 3
    wanted = Decoder(model).generate(ids, max_new_tokens=NEW, eos_token_id=()).tokens
    for draft in (Draft(assistant=copy.deepcopy(model)), Draft(lookup=3)):
        proposed.clear()
        result = Decoder(model, draft=draft).generate(ids, max_new_tokens=NEW, eos_token_id=())
        assert torch.equal(result.tokens, wanted)
        assert result.stats.drafted_tokens == sum(proposed) >= result.stats.accepted_tokens == NEW - len(proposed) > 0


def test_contradictory_or_unsupported_drafts_are_refused():
    model, lookup = tiny_model(), Draft(lookup=3)
    for wrong in ({}, {"assistant": model, "lookup": 3}, {"lookup": 0}):
        with pytest.raises(UsageError, match="lookup"):
            Draft(**wrong)
    for wrong in ({"int8_cache": True}, {"compile": True}, {"make_cache": lambda *_: None}):
        with pytest.raises(UsageError, match="cache"):
            Decoder(model, draft=lookup, **wrong)
    with pytest.raises(UsageError, match="the model itself"):
        Decoder(model, draft=Draft(assistant=model))
    with pytest.raises(UsageError, match="one prompt at a time: got 2"):
        Decoder(model, draft=lookup).generate(prompt().repeat(2, 1), max_new_tokens=2)
    with pytest.raises(InputError, match="vocabulary of 64, the model one of 128"):
        Decoder(model, draft=Draft(assistant=tiny_model(vocab_size=64)))
    mamba, _ = tiny_model_that_runs("AutoModelForCausalLM", "mamba")
    t5, _ = tiny_model_that_runs("AutoModelForSeq2SeqLM", "t5")
    for pair in ((mamba, lookup), (model, Draft(assistant=mamba))):
        with pytest.raises(InputError, match=r"Mamba.* state"):
            Decoder(pair[0], draft=pair[1])
    with pytest.raises(InputError, match="encoder-decoder"):
        Decoder(model, draft=Draft(assistant=t5))
    model.generation_config.num_beams = 4
    with pytest.raises(InputError, match="beam_search"):
        Decoder(model, draft=lookup)


# Sessions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("session") / "model")


def test_text_streams(folder):
    """With the first lines of a long answer, Ctrl-C included."""
    plain, drafted = open_session(folder), open_session(folder, prompt_lookup=4)
    ids, pieces = plain.encode("the fox the fox the"), []
    wanted = plain.generate(ids, max_new_tokens=20).text
    assert drafted.generate(ids, max_new_tokens=20, on_text=pieces.append).text == wanted == "".join(pieces)
    stop = wanted[8:11]
    assert drafted.generate(ids, max_new_tokens=20, stop=[stop]).text == wanted[: wanted.find(stop)]

    def interrupt(text):
        raise KeyboardInterrupt

    result = drafted.generate(ids, max_new_tokens=20, on_text=interrupt)
    assert result.interrupted and wanted.startswith(result.text) and result.tokens < 20
    assert drafted.generate(ids, max_new_tokens=20).text == wanted


def test_a_tokenizer_of_its_own_cannot_draft(folder, tmp_path):
    """Where both have as many tokens transformers would not notice."""
    other = save_chat_model(tmp_path / "other")
    save_tokenizer(other, vocabulary=280)
    with pytest.raises(InputError, match=r"tokenizer of .*other"):
        open_session(folder, assistant=other)


def test_the_context_holds_what_is_drafted(tmp_path):
    """Learned positions have an end, which tokens that a lookup proposes do not know."""
    save_tiny(tmp_path / "gpt2", "gpt2", vocab_size=320, eos_token_id=None)
    save_tokenizer(tmp_path / "gpt2")
    session = open_session(tmp_path / "gpt2", prompt_lookup=20)
    ids = torch.tensor([[5, 6, 7, 8] * 23])
    assert session.generate(ids, max_new_tokens=16).tokens == 16
    with pytest.raises(InputError, match="92 prompt tokens and 17 new ones exceed the model's context of 108"):
        session.generate(ids, max_new_tokens=17)
    save_tiny(tmp_path / "short", vocab_size=320, max_position_embeddings=64)
    save_tokenizer(tmp_path / "short")
    assert open_session(tmp_path / "gpt2", assistant=tmp_path / "short").context_length == 64
