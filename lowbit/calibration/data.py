"""From the name of a data set, or a text file, to one stream of token ids."""

from collections.abc import Iterator
from pathlib import Path

import torch

from lowbit.calibration.stdlib import sources
from lowbit.errors import InputError

# Names people use -> (data set on the Hub, config, split, text column)
KNOWN = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
}
STDLIB_HELDOUT, STDLIB_TRAIN = "stdlib", "stdlib-train"
_STDLIB_SPLITS = {STDLIB_HELDOUT: "heldout", STDLIB_TRAIN: "train"}


def documents(name: str) -> Iterator[str]:
    """The texts of a data set.

    name: a text file; "stdlib" (held-out modules of the Python standard library; works offline) or "stdlib-train";
    "wikitext2"; or any data set as `org/name[:config[:split[:column]]]`, read with `datasets`.
    """
    if name in _STDLIB_SPLITS:
        yield from (text for _, text in sources(_STDLIB_SPLITS[name]))
    elif _is_file(name):
        try:
            yield Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{name} is not UTF-8 text") from None
    elif name in KNOWN or name.split(":")[0].count("/") == 1:
        yield from _from_hub(*(KNOWN.get(name) or _parsed(name)))
    else:
        known = ", ".join([*_STDLIB_SPLITS, *KNOWN])
        raise InputError(
            f"no such text file or data set: {name} (expected a file, org/name[:config[:split]], or one of {known})"
        )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # longer than a file name can be
        return False


def _parsed(name: str) -> tuple[str, str | None, str, str]:
    parts = name.split(":") + [""] * 3
    return parts[0], parts[1] or None, parts[2] or "test", parts[3] or "text"


def _from_hub(repository: str, config: str | None, split: str, column: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"reading {repository} needs the datasets package: pip install 'lowbit[eval]'") from None
    try:
        rows = load_dataset(repository, config, split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load the data set {repository} ({split}): {reason}") from None
    if column not in rows.column_names:
        raise InputError(f"{repository} has no column {column!r}; it has {', '.join(rows.column_names)}")
    # wikitext and its like are lines of one text: joined, as every published perplexity does
    yield "\n\n".join(rows[column])


def token_stream(tokenizer, name: str, limit: int | None = None) -> torch.Tensor:
    """int64 [T]: the documents one after another, each ended by the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in documents(name):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.int64)
