"""Slots: requests that share steps get the tokens that they get alone."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from models import save_tiny, tiny_model
from tape import Tapes

import lowbit
from lowbit.errors import InputError
from lowbit.generation import Decoder, Draft
from lowbit.generation.slots import Slots, refuse_slots
from lowbit.generation.steps.graph import Eager
from lowbit.options import TokenOptions

SAMPLED = (
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}, {"temperature": 1.5, "min_p": 0.1},
    {"repetition_penalty": 1.5}, {"temperature": 1.0, "repetition_penalty": 0.7},
)  # fmt: skip
LONGEST = 500


@dataclass
class Asked:
    """A request and what became of it. stop: after so many tokens nobody wants more; fail: the one after raises."""

    ids: torch.Tensor
    options: TokenOptions
    stop: int | None = None
    fail: bool = False
    tokens: list[int] = field(default_factory=list)
    ends: list = field(default_factory=list)

    def on_token(self, made: list[int]) -> bool:
        if self.fail and len(self.tokens) == self.stop:
            raise ValueError("whoever reads has gone mad")
        self.tokens += made
        return len(self.tokens) == self.stop and not self.fail

    def alone(self, decoder: Decoder, eos=()) -> list[int]:
        made = decoder.generate(self.ids, **vars(self.options), eos_token_id=eos).tokens[0].tolist()
        return made[: self.stop]


def asked(length: int, new: int, number: int = 0, **given) -> Asked:
    ids = torch.randint(3, 120, (1, length), generator=torch.Generator().manual_seed(1000 + 7 * length + number))
    stop = {name: given.pop(name) for name in ("stop", "fail") if name in given}
    return Asked(ids, TokenOptions(max_new_tokens=new, **given), **stop)


def join(slots: Slots, each: Asked, eos=(), chunk: int | None = 64, **given) -> None:
    request = slots.decoder.request(each.ids, None, each.options, eos, chunk)
    assert slots.takes(request) and slots.free
    slots.join(request, each.on_token, each.ends.append, **given)


def run(slots: Slots, *waiting: Asked, eos=()) -> None:
    """All of them, as soon as there is room."""
    left = list(waiting)
    while left or slots.rows:
        while left and slots.free:
            join(slots, left.pop(0), eos)
        if slots.rows:
            slots.step()


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=4096)


@pytest.fixture
def alone(model):
    return Decoder(model, graphs=Eager())


@pytest.fixture
def slots(model):
    return Slots(usable(Decoder(model)), 5, LONGEST)


def usable(decoder: Decoder) -> Decoder:
    assert refuse_slots(decoder) is None
    return decoder


@pytest.mark.parametrize("captured", [False, True], ids=["recorded", "captured"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_any_schedule_gives_the_tokens_of_each_alone(name, captured, quantized_model):
    """Joining and leaving in any order, of any length, sampled in any way, given up or failing anywhere."""
    draw = random.Random(f"{name} {captured}")
    window = {"sliding_window": 40} if name == "gemma3" else {}
    model = quantized_model(name, max_position_embeddings=1024, **window)
    alone = Decoder(model, graphs=Eager())
    slots = Slots(usable(Decoder(model, graphs=Tapes() if captured else None)), 6, LONGEST)
    everyone = []
    for number in range(40):
        new = draw.randint(1, 40)
        stop = {"stop": draw.randint(0, new - 1), "fail": True} if draw.random() < 0.1 else {}
        stop = stop or ({"stop": draw.randint(1, new)} if draw.random() < 0.2 else {})
        sampled = {**draw.choice(SAMPLED), "seed": number}
        everyone.append(asked(draw.choice([1, 7, 64, 65, draw.randint(1, 200)]), new, number, **sampled, **stop))
    waiting = list(everyone)
    while waiting or slots.rows:
        while waiting and slots.free and draw.random() < 0.5:
            join(slots, waiting.pop(0))
        if slots.rows:
            slots.step()
    for each in everyone:
        assert each.tokens == each.alone(alone), each
        assert [type(end) for end in each.ends] == [ValueError if each.fail else type(None)]


def test_rows_end_by_end_tokens_of_their_own(model, slots, alone):
    free = [asked(9, 30, number) for number in range(5)]
    made = [each.alone(alone) for each in free]
    eos = tuple({tokens[5 + at] for at, tokens in enumerate(made)})
    again = [asked(9, 30, number) for number in range(5)]
    run(slots, *again, eos=eos)
    for each, tokens in zip(again, made, strict=True):
        first = min(tokens.index(end) for end in eos if end in tokens)
        assert each.tokens == tokens[: first + 1] and each.ends == [None]


def test_columns_grow_for_those_that_need_them_and_are_used_again(slots, alone):
    """A request longer than all columns so far joins others; later rows move back to the first ones."""
    early, long = asked(20, 120, 1), asked(300, 180, 2)
    join(slots, early)
    for _ in range(30):
        slots.step()
    assert slots.columns.length == 256
    join(slots, long)
    assert slots.columns.length > 300 and slots.columns.end == 300
    others = [asked(length, 90, length) for length in range(1, 60, 3)]
    run(slots, *others)
    for each in (early, long, *others):
        assert each.tokens == each.alone(alone) and each.ends == [None]
    length, short = slots.columns.length, [asked(5, 50 + number % 40, number) for number in range(36)]
    ends = []
    left = list(short)
    while left or slots.rows:
        while left and slots.free and len(slots.rows) < 3:
            join(slots, left.pop(0))
        slots.step()
        ends.append(slots.columns.end)
    assert slots.columns.length == length and max(ends) == 256 and ends.count(256) > 2
    assert slots._steps[4][0].visible == 256  # and not as many as the long one needed
    assert [each.tokens for each in short] == [each.alone(alone) for each in short]


def test_one_that_is_as_long_as_a_slot(slots, alone):
    """While shorter ones come and go beside it, to the end of all columns."""
    long, others = asked(100, LONGEST - 100, 1), [asked(20, 60, number) for number in range(40)]
    run(slots, long, *others)
    for each in (long, *others):
        assert each.tokens == each.alone(alone)
    assert slots.columns.length <= slots.most
    request = slots.decoder.request(
        torch.ones(1, 101, dtype=torch.long), None, TokenOptions(max_new_tokens=LONGEST - 100)
    )
    assert not slots.takes(request)


@pytest.mark.parametrize("graphs", [None, Tapes()], ids=["recorded", "captured"])
def test_a_row_without_numbers_fails_alone(graphs):
    """An embedding that is NaN: in a prompt, and in the middle of an answer."""
    model = tiny_model(max_position_embeddings=512, tie_word_embeddings=False)
    alone, slots = Decoder(model, graphs=Eager()), Slots(usable(Decoder(model, graphs=graphs)), 4, 256)
    healthy = [asked(12, 60, number) for number in range(3)]
    expected = [each.alone(alone) for each in healthy]
    sick = next(each for each in (asked(6, 20, number) for number in range(100)) if bad_token(each, alone, expected))
    with torch.no_grad():
        model.get_input_embeddings().weight[bad_token(sick, alone, expected)] = torch.nan
    join(slots, healthy[0])
    join(slots, healthy[1])
    join(slots, sick)
    while not sick.ends:
        slots.step()
    for _ in range(20):  # what is no number lies before the next one's first position by then
        slots.step()
    join(slots, healthy[2])  # where the sick one was
    run(slots)
    assert [each.tokens for each in healthy] == expected
    assert isinstance(sick.ends[0], InputError) and "NaN" in str(sick.ends[0]) and len(sick.tokens) == 6
    prompt = Asked(torch.tensor([[5, bad_token_of(model)]]), TokenOptions(max_new_tokens=4))
    join(slots, prompt)
    assert isinstance(prompt.ends[0], InputError) and not slots.rows


def bad_token(each: Asked, alone: Decoder, others: list[list[int]]) -> int | None:
    """The sixth token that a request makes, if it comes up nowhere else."""
    made = each.alone(alone)
    seen = [*made[:5], *each.ids[0].tolist(), *(token for tokens in others for token in tokens)]
    prompts = [token for number in range(3) for token in asked(12, 60, number).ids[0].tolist()]
    return None if made[5] in seen or made[5] in prompts else made[5]


def bad_token_of(model) -> int:
    return int(model.get_input_embeddings().weight.isnan().any(1).nonzero()[0])


def test_a_step_that_fails_ends_all_and_the_next_ones_are_as_good(slots, alone, monkeypatch):
    lost, kept = [asked(8, 20, number) for number in range(3)], asked(8, 20, 9)
    for each in lost:
        join(slots, each)
    slots.step()
    with monkeypatch.context() as broken:
        broken.setattr(slots, "_lay_out", lambda step: 1 / 0)
        slots._laid_out = None
        slots.step()
    assert [type(each.ends[0]) for each in lost] == [ZeroDivisionError] * 3 and not slots.rows
    run(slots, kept)
    assert kept.tokens == kept.alone(alone) and kept.ends == [None]


def test_a_turn_of_a_chat_goes_on_from_the_answer(slots, alone):
    first = asked(30, 20, 1)
    run(slots, first)
    assert slots.decoder.stats.path == "recorded loop" and slots.decoder.stats.new_tokens == 20
    more = asked(6, 20, 2)
    more.ids = torch.cat([first.ids, torch.tensor([first.tokens]), more.ids], 1)
    run(slots, more)
    assert slots.decoder.stats.reused_tokens == 30 + 19 and more.tokens == more.alone(alone)
    beside, other = asked(30, 20, 3), asked(10, 10, 4)
    run(slots, beside, other)  # of which the second has taken the cache
    last = Asked(torch.cat([beside.ids, torch.tensor([beside.tokens])], 1), TokenOptions(max_new_tokens=5))
    run(slots, last)
    assert slots.decoder.stats.reused_tokens < 2 and last.tokens == last.alone(alone)


def test_others_go_on_between_the_chunks_of_a_prompt(slots, alone):
    quick, slow = asked(8, 40, 1), asked(200, 10, 2)
    join(slots, quick)
    chunks = []
    join(slots, slow, on_chunk=lambda positions: (chunks.append((positions, len(quick.tokens))), slots.step()))
    assert chunks == [(64, 1), (64, 2), (64, 3), (8, 4)]
    run(slots)
    assert quick.tokens == quick.alone(alone) and slow.tokens == slow.alone(alone)


def test_in_bfloat16_only_ties_are_broken_otherwise(tmp_path):
    """Attention and dense products may sum in another order for several rows: where the tokens part, their logits are a
    rounding apart."""
    save_tiny(tmp_path / "dense", max_position_embeddings=512, vocab_size=1000)
    lowbit.quantize(tmp_path / "dense", tmp_path / "packed", group_size=16)
    model = lowbit.load(tmp_path / "packed", dtype=torch.bfloat16)
    alone, slots = Decoder(model), Slots(usable(Decoder(model)), 8, 256)
    everyone = [asked(5 + number, 60, number) for number in range(24)]
    run(slots, *everyone)
    same = 0
    for each in everyone:
        expected = each.alone(alone)
        at = next((n for n, pair in enumerate(zip(each.tokens, expected, strict=True)) if pair[0] != pair[1]), None)
        same += at is None
        if at is not None:
            ids = torch.cat([each.ids, torch.tensor([expected[:at]], dtype=torch.long)], 1)
            with torch.no_grad():
                logits = model(ids).logits[0, -1].float()
            assert logits[expected[at]] - logits[each.tokens[at]] < 2**-6 * logits.abs().max()
    assert same > len(everyone) // 2


def test_what_has_no_slots_says_why(model, quantized_model):
    for decoder, words in (
        (Decoder(model, graphs=Eager()), "neither recorded nor captured"),
        (Decoder(model, int8_cache=True), "8 bits"),
        (Decoder(model, compile=True), "compiled"),
        (Decoder(model, draft=Draft(lookup=2)), "drafts"),
    ):
        assert words in refuse_slots(decoder).reason
    other = tiny_model(max_position_embeddings=512)
    other.generation_config.no_repeat_ngram_size = 3
    assert "no_repeat_ngram_size" in refuse_slots(Decoder(other)).reason
    with torch.no_grad():
        other.get_output_embeddings().weight.fill_(torch.nan)
    assert "NaN" in refuse_slots(Decoder(other)).reason
