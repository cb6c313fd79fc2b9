"""The vocabulary of a GGUF file, from a folder's tokenizer.json.

Byte-level BPE (Llama 3, Qwen, GPT-2, ...) is written whole. llama.cpp splits text by rules of its own that the file
names (`tokenizer.ggml.pre`); which name belongs to a tokenizer is told by the regex it splits with, through the table
that transformers reads such files by.
"""

import json
from pathlib import Path

from lowbit.errors import InputError
from lowbit.pipeline.gguf_architecture import import_gguf
from lowbit.upstream import MissingNameError


def add_vocabulary(writer, folder: Path, size: int, pre: str | None) -> list[str]:
    """Add the tokenizer of `folder` to a GGUFWriter, `size` tokens in all. pre: name of the splitting rules, if the
    user knows it. Returns what a user should know. Raises InputError for a vocabulary larger than the model's."""
    gguf = import_gguf()
    data = _tokenizer(folder)
    splits = _splits(data.get("pre_tokenizer"))
    whole = data.get("model", {}).get("type") == "BPE" and splits is not None
    gguf.SpecialVocab(folder, load_merges=whole, n_vocab=size).add_to_gguf(writer, quiet=True)
    if not whole:
        writer.add_tokenizer_model("no_vocab")
        return ["the tokenizer is no byte-level BPE of a tokenizer.json: the file has no vocabulary, only token ids"]
    tokens, types = _tokens(data, size, gguf.TokenType)
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


def _tokenizer(folder: Path) -> dict:
    file = folder / "tokenizer.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None


def _tokens(data: dict, size: int, kinds) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids that the tokenizer does not use are padding."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(kinds.UNUSED)] * size
    vocabulary = [(number, text, kinds.NORMAL) for text, number in data["model"]["vocab"].items()]
    for added in data.get("added_tokens") or ():
        kind = kinds.CONTROL if added.get("special") else kinds.USER_DEFINED
        vocabulary.append((added["id"], added["content"], kind))
    for number, text, kind in vocabulary:
        if not 0 <= number < size:
            raise InputError(f"token {text!r} has id {number}, the model has {size} tokens: the tokenizer is another's")
        tokens[number], types[number] = text, int(kind)
    return tokens, types


def _splits(pre_tokenizer: dict | None) -> list[str] | None:
    """The regexes that a byte-level pre-tokenizer splits by, "" for that of GPT-2; None if it is not byte-level."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if not byte_level:
        return None
    regexes = [step["pattern"].get("Regex", "?") for step in steps if step.get("type") == "Split"]
    return regexes + [""] * bool(byte_level[0].get("use_regex", True))


def _pre_name(splits: list[str]) -> str | None:
    if splits == [""]:
        return "gpt-2"
    from lowbit.transformers_api import GGUF_PRE_TOKENIZER_SPLITS

    return next((name for name, split in GGUF_PRE_TOKENIZER_SPLITS.items() if splits == [split]), None)
