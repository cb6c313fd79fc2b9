"""From the name of a data set, or a file, to documents: texts, and chats as lists of messages.

`lowbit eval` takes them in their order, as one stream of tokens. Calibration takes them in a shuffled order, from the
training split, and only as many as it needs.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowbit.errors import InputError, UsageError, first_line
from lowbit.guards.records import record
from lowbit.text.chat_template import chat_ids
from lowbit.text.stdlib import sources

# Names people use -> (data set on the Hub, config, split that is evaluated on, text column)
KNOWN = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
}
# Their rows are lines of one text: joined, as every published perplexity does
_ONE_TEXT = {repository for repository, *_ in KNOWN.values()}
STDLIB_HELDOUT, STDLIB_TRAIN = "stdlib", "stdlib-train"
_STDLIB_SPLITS = {STDLIB_HELDOUT: "heldout", STDLIB_TRAIN: "train"}
DEFAULT_CALIBRATION = "NeelNanda/pile-10k"

# A path that ends like this is never looked for on the Hub
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".npy", ".safetensors")
# Where the column is not named; texts first, because they need no chat template
_COLUMNS = ("text", "messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # names of the conversations of ShareGPT
# Data sets that download more bytes (or do not say how many) are streamed: C4 is 300 GB, and a megabyte of it is enough
_LARGEST_DOWNLOAD = 2_000_000_000
_STREAM_BUFFER = 1000  # rows among which a stream is shuffled, beside the order of its files

Document = str | list[dict]


@dataclass(frozen=True)
class Texts:
    """Calibration text: `documents` in a shuffled order, or one long text, `whole`. name: what it is, for people."""

    name: str
    documents: Iterable[Document] = ()
    whole: str | None = None


def documents(name: str) -> Iterator[Document]:
    """The documents of a data set in their order.

    name: a text file, rows of one (.jsonl, .json, .parquet); "stdlib" (held-out modules of the Python standard library;
    works offline) or "stdlib-train"; "wikitext2"; or any data set as `org/name[:config[:split[:column]]]`, read with
    `datasets`.
    """
    if name in _STDLIB_SPLITS:
        yield from (text for _, text in sources(_STDLIB_SPLITS[name]))
    elif _is(Path.is_file, name):
        rows = _file_rows(Path(name))
        yield from [_read_text(Path(name))] if rows is None else rows
    elif name in KNOWN or _is_hub_name(name):
        yield _joined(*(KNOWN.get(name) or _parsed(name, "test")))
    else:
        raise _unknown(name, [*_STDLIB_SPLITS, *KNOWN])


def shuffled(name: str, seed: int) -> Texts:
    """The text of a data set for calibration: the names of `documents`, from the split "train" where none is named, and
    folders that `datasets` reads or has saved. A file is checked here, all of it, before any row is taken."""
    if name == STDLIB_HELDOUT:
        raise UsageError(f"{name} is what `lowbit eval` measures on: calibrate on {STDLIB_TRAIN}")
    if name == STDLIB_TRAIN:
        return Texts(name, _in_random_order([text for _, text in sources("train")], seed))
    if _is(Path.is_file, name):
        path = Path(name)
        rows = _file_rows(path)
        return Texts(path.name, whole=_read_text(path)) if rows is None else _rows_of_file(path, rows, seed)
    if name in KNOWN:
        (repository, config, _, column), split = KNOWN[name], "train"
    elif _is(Path.is_dir, name):
        repository, config, split, column = name, None, "train", None
    elif _is_hub_name(name):
        repository, config, split, column = _parsed(name, "train", None)
    else:
        raise _unknown(name, ["self", STDLIB_TRAIN, *KNOWN])
    shown = f"{Path(name).name if config is None and _is(Path.is_dir, name) else repository}, {split}"
    if repository in _ONE_TEXT:
        return Texts(shown, whole=_joined(repository, config, split, column or "text"))
    return Texts(shown, _from_datasets(repository, config, split, column, seed))


def token_stream(tokenizer, name: str, limit: int | None = None) -> torch.Tensor:
    """int64 [T]: the documents one after another, each ended by the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents(name):
        if isinstance(document, str):
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
        else:
            ids += ended(chat_tokens(tokenizer, document, name), end)
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.int64)


def chat_tokens(tokenizer, messages: list[dict], name: str) -> list[int]:
    """A chat through the tokenizer's template. InputError if it has none, or if the template refuses the chat."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(f"{name} has chats, and the tokenizer has no chat template: expected one, or a column of text")
    return chat_ids(tokenizer, messages, f"a chat of {name}")


def ended(ids: list[int], end: list[int]) -> list[int]:
    """With the end-of-text token behind them; many chat templates, and some tokenizers, put it there themselves."""
    return ids if end and ids[-1:] == end else ids + end


def _is(test: Callable[[Path], bool], name: str) -> bool:
    try:
        return bool(name) and test(Path(name))
    except (OSError, ValueError):  # longer than a file name can be, or with a null character
        return False


def _is_hub_name(name: str) -> bool:
    return name.split(":")[0].count("/") == 1 and not name.startswith((".", "/", "~", ":")) and not _is_file_name(name)


def _is_file_name(name: str) -> bool:
    return name.lower().endswith(FILE_SUFFIXES)


def _unknown(name: str, known: list[str]) -> InputError:
    return InputError(
        f"no such text file or data set: {name} "
        f"(expected a file, org/name[:config[:split[:column]]], or one of {', '.join(known)})"
    )


def _parsed(name: str, split: str, column: str | None = "text") -> tuple[str, str | None, str, str | None]:
    parts = name.split(":") + [""] * 3
    return parts[0], parts[1] or None, parts[2] or split, parts[3] or column


# Files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _file_rows(path: Path) -> Sequence[Document] | None:
    """The rows of a file as documents; None if it is no file of rows but one text."""
    try:
        if path.suffix.lower() in (".jsonl", ".json"):
            return _json_rows(path)
        return _parquet_rows(path) if path.suffix.lower() == ".parquet" else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None


def _rows_of_file(path: Path, rows: Sequence[Document], seed: int) -> Texts:
    if not len(rows):
        raise InputError(f"{path} has no rows: expected texts or chats")
    return Texts(path.name, _in_random_order(rows, seed))


class _JsonLines(Sequence):
    """The documents in a file of JSON lines. Every line is checked once, and read again when it is wanted: the file may
    be larger than memory."""

    def __init__(self, path: Path):
        self.path, self.column, self.offsets = path, None, []
        position = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self._document(line, f"{path}, line {number}")
                    self.offsets.append(position)
                position += len(line)

    def _document(self, line: bytes, where: str) -> Document:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise InputError(f"{where} is not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}): expected one object on each line") from None
        self.column = self.column or _column(row, where)
        return _cell(row, self.column, where)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Document:
        offset = self.offsets[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._document(file.readline(), f"{self.path} at byte {offset}")


def _json_rows(path: Path) -> Sequence[Document]:
    """JSON lines, or one array of objects."""
    with path.open("rb") as file:
        if file.read(64).lstrip(b" \t\r\n\xef\xbb\xbf")[:1] != b"[":
            return _JsonLines(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{path} is not JSON: {error}") from None
    column = _column(rows[0], f"{path}, row 1") if rows else ""
    return [_cell(row, column, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _parquet_rows(path: Path) -> Sequence[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'lowbit[eval]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            first = next((batch.to_pylist()[0] for batch in file.iter_batches(batch_size=1)), None)
            if first is None:
                return []
            column = _column(first, str(path))
            cells = file.read(columns=[column])[column]
    except (ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as parquet: {first_line(error)}") from None
    return _Cells(cells, str(path))


class _Cells(Sequence):
    """The documents in a column of an arrow table."""

    def __init__(self, cells, name: str):
        self.cells, self.name = cells, name

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> Document:
        if index >= len(self):
            raise IndexError(index)
        where = f"{self.name}, row {index + 1}"
        try:
            value = self.cells[index].as_py()
        except UnicodeDecodeError:
            raise InputError(f"{where} is not UTF-8 text") from None
        return _document(value, where)


# Data sets, of the Hub and of the disk


def _import_datasets(repository: str):
    try:
        import datasets
    except ImportError:
        raise InputError(f"reading {repository} needs the datasets package: pip install 'lowbit[eval]'") from None
    return datasets


def _no_data_set(repository: str, split: str, error: Exception) -> InputError:
    return InputError(f"cannot load the data set {repository} ({split}): {first_line(error)}")


def _joined(repository: str, config: str | None, split: str, column: str) -> str:
    """All rows of a column, as one text."""
    datasets = _import_datasets(repository)
    try:
        rows = datasets.load_dataset(repository, config, split=split)
    except Exception as error:
        raise _no_data_set(repository, split, error) from None
    if column not in rows.column_names:
        raise InputError(f"{repository} has no column {column!r}; it has {', '.join(rows.column_names)}")
    texts = [_document(cell, f"{repository}, row {number}") for number, cell in enumerate(rows[column], 1)]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{repository}: the column {column!r} has chats; expected lines of text")
    return "\n\n".join(texts)


def _from_datasets(
    repository: str, config: str | None, split: str, column: str | None, seed: int
) -> Iterator[Document]:
    """Documents of a data set in a shuffled order; only the rows that are asked for are read."""
    datasets = _import_datasets(repository)
    try:
        rows = _opened(datasets, repository, config, split)
        first = next(iter(rows), None)
    except Exception as error:  # the network, the files and the names, each with exceptions of its own
        raise _no_data_set(repository, split, error) from None
    if first is None:
        raise InputError(f"{repository} ({split}) has no rows: expected texts or chats")
    column = _column(first, repository, column)
    rows = rows.select_columns([column])
    if isinstance(rows, datasets.IterableDataset):
        return _streamed(rows.shuffle(seed=seed, buffer_size=_STREAM_BUFFER), column, repository, split)
    order = _order(len(rows), seed)
    return (_document(rows[int(i)][column], f"{repository}, row {int(i) + 1}") for i in order)


def _opened(datasets, repository: str, config: str | None, split: str):
    """A data set on the disk, which gives rows by number; a stream of one that is too large to download for this."""
    folder = Path(repository)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # written by save_to_disk
        saved = datasets.load_from_disk(repository)
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise InputError(f"no split {split!r}; it has {', '.join(saved)}")
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    if repository == DEFAULT_CALIBRATION:
        _check_reachable(datasets, repository)
    builder = datasets.load_dataset_builder(repository, config)
    size = builder.info.download_size
    if (size and size <= _LARGEST_DOWNLOAD) or Path(builder.cache_dir).is_dir():
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    return builder.as_streaming_dataset(split=split)


def _check_reachable(datasets, repository: str) -> None:
    """Fail at once where the Hub cannot be reached. `datasets` would try for half a minute, with a warning each time;
    that is right for a data set somebody asked for, and not for the one we would like to have."""
    from huggingface_hub import HfApi

    if not (Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir():
        HfApi().dataset_info(repository, timeout=10)


def _streamed(rows, column: str, repository: str, split: str) -> Iterator[Document]:
    rows = enumerate(rows, 1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _no_data_set(repository, split, error) from None
        yield _document(row[column], f"{repository}, row {number} of the shuffled stream")


# Rows


def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _in_random_order(rows: Sequence[Document], seed: int) -> Iterator[Document]:
    return (rows[int(i)] for i in _order(len(rows), seed))


def _column(row, where: str, wanted: str | None = None) -> str:
    """The column that holds the documents: `wanted`, one with a usual name, or the only one with strings."""
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a {type(row).__name__}; expected an object with a column of text or of chats")
    columns = ", ".join(row) or "none"
    if wanted is not None:
        if wanted not in row:
            raise InputError(f"{where} has no column {wanted!r}; it has {columns}")
        return wanted
    strings = [name for name, value in row.items() if isinstance(value, str)]
    for name in _COLUMNS:
        if name in row:
            return name
    if len(strings) != 1:
        raise InputError(
            f"{where} has no column {', '.join(_COLUMNS[:-1])} or {_COLUMNS[-1]}, and {len(strings)} columns of "
            f"strings: expected one of them; the columns are {columns}"
        )
    return strings[0]


def _cell(row, column: str, where: str) -> Document:
    if not isinstance(row, dict) or column not in row:
        found = f"the columns {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise InputError(f"{where} has no {column!r} as the rows before it have, but {found}")
    return _document(row[column], where)


def _document(value, where: str) -> Document:
    """A text, or a chat with `role` and `content` in each message. Nothing (null) is an empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _unicode(value, where)
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return [_message(message, where) for message in value]
    raise InputError(f"{where} holds a {type(value).__name__}; expected a text, or a list of messages with a role each")


@dataclass(frozen=True)
class _Message:
    role: str | None = None
    content: str | list[object] | dict | None = None
    speaker: str | None = field(default=None, metadata={"key": "from"})
    value: str | None = None


def _message(message: dict, where: str) -> dict:
    # tables fill what other messages have and this one has not with null
    message = {key: value for key, value in message.items() if value is not None}
    record(_Message, message, where)
    if "from" in message and "value" in message:
        return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if "role" not in message:
        raise InputError(f"{where}: a message has {', '.join(message) or 'nothing'}; expected role and content")
    return message


def _unicode(text: str, where: str) -> str:
    """Raises InputError for half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text has half of a surrogate pair at {error.start}; expected Unicode") from None
    return text
