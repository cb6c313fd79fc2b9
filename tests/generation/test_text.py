"""Text that comes token by token is the text of all tokens, and ends where a stop string begins."""

import pytest
import torch
from folders import save_tokenizer

from lowbit.generation.text import TextStream

TEXTS = [
    "the quick brown fox",
    "Zwölf Boxkämpfer 走る 🦊🦊 jagen",
    "  spaces\n\nand lines ",
    "</s>the dog<s> sleeps</s>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def streamed(tokenizer, ids, stop=()):
    """The pieces, how many tokens were taken, and the stream."""
    pieces = []
    stream = TextStream(tokenizer, stop, pieces.append)
    taken = next((number for number, token in enumerate(ids, 1) if stream.put(token)), len(ids))
    stream.finish()
    assert stream.text == "".join(pieces) and all(pieces)
    return pieces, taken, stream


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces, _, stream = streamed(tokenizer, ids)
    assert stream.text == whole(tokenizer, ids)
    assert len(pieces) >= 3 and "\N{REPLACEMENT CHARACTER}" not in stream.text


def test_any_tokens_make_the_whole_text(tokenizer):
    """Random bytes: characters that never become whole included."""
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 40):
        ids = torch.randint(0, 280, (length,), generator=generator).tolist()
        assert streamed(tokenizer, ids)[2].text == whole(tokenizer, ids)


@pytest.mark.parametrize("text", TEXTS)
def test_stop_strings_wherever_they_are(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    text = whole(tokenizer, ids)
    for start in range(len(text)):
        for length in (1, 2, 5):
            words = text[start : start + length]
            for stop in ([words], [words, "never there"]):  # the longest one, and a shorter one
                _, taken, stream = streamed(tokenizer, ids, stop)
                assert stream.text == text[: text.find(words)] and stream.stopped
                assert words in whole(tokenizer, ids[:taken]) and words not in whole(tokenizer, ids[: taken - 1])


def test_the_first_of_several_stop_strings_counts(tokenizer):
    ids = tokenizer("the quick brown fox")["input_ids"]
    assert streamed(tokenizer, ids, ["fox", "brown", "quick b"])[2].text == "the "


def test_false_starts_of_stop_strings_are_shown(tokenizer):
    ids = tokenizer("the quick brown fox")["input_ids"]
    _, taken, stream = streamed(tokenizer, ids, ["quiet", "fox!"])
    assert stream.text == "the quick brown fox" and not stream.stopped and taken == len(ids)


def test_sentencepiece_keeps_its_spaces():
    """A tokenizer that leaves out the space in front of what it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁the": 1, "▁fox": 2, "es": 3, "▁run": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert streamed(tokenizer, [1, 2, 3, 4])[2].text == "the foxes run"
