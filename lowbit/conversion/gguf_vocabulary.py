"""The vocabulary of a GGUF file, from a folder's tokenizer.json.

Byte-level BPE (Llama 3, Qwen, GPT-2, ...) is written whole. llama.cpp splits text by rules of its own that the file
names (`tokenizer.ggml.pre`); which name belongs to a tokenizer is told by the regex it splits with, through the table
that transformers reads such files by.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.errors import InputError, first_line
from lowbit.formats.gguf import import_gguf
from lowbit.guards.reading import read_json
from lowbit.guards.records import record
from lowbit.upstream import MissingNameError


@dataclass(frozen=True)
class _Pattern:
    regex: str | None = field(default=None, metadata={"key": "Regex"})


@dataclass(frozen=True)
class _Step:
    """Of a pre-tokenizer."""

    type: str | None = None
    use_regex: bool = True
    pattern: _Pattern = _Pattern()


@dataclass(frozen=True)
class _PreTokenizer(_Step):
    pretokenizers: list[_Step] | None = None


@dataclass(frozen=True)
class _Model:
    """vocab: of BPE token -> id; other kinds have other ones."""

    type: str | None = None
    vocab: object = None


@dataclass(frozen=True)
class _AddedToken:
    id: int
    content: str
    special: bool = False


@dataclass(frozen=True)
class _Tokenizer:
    """What is read of a tokenizer.json."""

    model: _Model = _Model()
    pre_tokenizer: _PreTokenizer | None = None
    added_tokens: list[_AddedToken] | None = None


def add_vocabulary(writer, folder: Path, size: int, pre: str | None) -> list[str]:
    """Add the tokenizer of `folder` to a GGUFWriter, `size` tokens in all. pre: name of the splitting rules, if the
    user knows it. Returns what a user should know. Raises InputError for a vocabulary larger than the model's."""
    gguf = import_gguf()
    file = folder / "tokenizer.json"
    tokenizer = record(_Tokenizer, read_json(file), str(file)) if file.is_file() else _Tokenizer()
    splits = _splits(tokenizer.pre_tokenizer or _PreTokenizer())
    whole = tokenizer.model.type == "BPE" and splits is not None
    try:
        gguf.SpecialVocab(folder, load_merges=whole, n_vocab=size).add_to_gguf(writer, quiet=True)
    except Exception as error:  # it reads the files of the tokenizer, and expects them to be as they should be
        raise InputError(f"the gguf package cannot read the tokenizer of {folder}: {first_line(error)}") from None
    if not whole:
        writer.add_tokenizer_model("no_vocab")
        return ["the tokenizer is no byte-level BPE of a tokenizer.json: the file has no vocabulary, only token ids"]
    vocabulary = record(dict[str, int], tokenizer.model.vocab, f"{file}: model.vocab")
    tokens, types = _tokens(vocabulary, tokenizer.added_tokens or (), size, gguf.TokenType)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    try:
        pre, why = pre or _pre_name(splits), ""
    except MissingNameError as error:
        why = f" ({error})"
    writer.add_tokenizer_pre(pre or "default")
    if pre is None:
        return [f"llama.cpp's name for how this tokenizer splits text is not known{why}: it will split as by default"]
    return []


def _tokens(normal: dict[str, int], added: Iterable[_AddedToken], size: int, kinds) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids that the tokenizer does not use are padding."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(kinds.UNUSED)] * size
    vocabulary = [(number, text, kinds.NORMAL) for text, number in normal.items()]
    for token in added:
        vocabulary.append((token.id, token.content, kinds.CONTROL if token.special else kinds.USER_DEFINED))
    for number, text, kind in vocabulary:
        if not 0 <= number < size:
            raise InputError(f"token {text!r} has id {number}, the model has {size} tokens: the tokenizer is another's")
        tokens[number], types[number] = text, int(kind)
    return tokens, types


def _splits(pre_tokenizer: _PreTokenizer) -> list[str] | None:
    """The regexes that a byte-level pre-tokenizer splits by, "" for that of GPT-2; None if it is not byte-level."""
    steps = [pre_tokenizer] if pre_tokenizer.pretokenizers is None else pre_tokenizer.pretokenizers
    byte_level = [step for step in steps if step.type == "ByteLevel"]
    if not byte_level:
        return None
    regexes = [step.pattern.regex or "?" for step in steps if step.type == "Split"]
    return regexes + [""] * byte_level[0].use_regex


def _pre_name(splits: list[str]) -> str | None:
    if splits == [""]:
        return "gpt-2"
    from lowbit.transformers_api import GGUF_PRE_TOKENIZER_SPLITS

    return next((name for name, split in GGUF_PRE_TOKENIZER_SPLITS.items() if splits == [split]), None)
