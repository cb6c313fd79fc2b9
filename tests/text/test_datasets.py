"""Texts and chats from files, and from data sets that `datasets` reads: from folders, as it reads the Hub's."""

import json
from importlib.util import find_spec

import pytest
import torch
from folders import save_chat_model
from texts import make_texts, write_rows, write_texts

from lowbit.errors import InputError
from lowbit.text import datasets as data
from lowbit.text.datasets import documents, token_stream

EOS = 2
TEXTS = make_texts(40, words=12)
CHATS = [[{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": text}]
         for n, text in enumerate(make_texts(40, words=8))]  # fmt: skip


HAS_DATASETS = find_spec("datasets") is not None  # an optional extra; pyarrow comes with it
needs_datasets = pytest.mark.skipif(not HAS_DATASETS, reason="datasets is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` keeps goes away with the test."""
    if not HAS_DATASETS:
        return
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 seconds for each stream


def parquet(path, columns: dict):
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


def rows_file(path, columns: dict):
    """The same rows as each kind of file, and as each kind of folder."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        return parquet(path, columns)
    if path.name == "lines.json" or path.suffix == ".jsonl":
        return write_rows(path, rows)
    if path.suffix == ".json":
        path.write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8")
    elif path.name == "saved":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(path)
    elif path.name == "saved with splits":
        from datasets import Dataset, DatasetDict

        splits = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}
        DatasetDict(splits).save_to_disk(path)
    else:
        path.mkdir(parents=True)
        parquet(path / "train-00000.parquet", columns)
    return path


def found_in(samples, tokenizer) -> list[str]:
    """The documents in the stream, without the last, which may be cut."""
    return tokenizer.decode(samples.input_ids.flatten(), clean_up_tokenization_spaces=False).split("</s>")[:-1]


FILES = ["rows.jsonl", "lines.json", "array.json", pytest.param("rows.parquet", marks=needs_datasets)]
KINDS = [*FILES, *(pytest.param(kind, marks=needs_datasets) for kind in ("saved", "saved with splits", "folder"))]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_each_kind(samples_of, tokenizer, tmp_path, kind):
    path = rows_file(tmp_path / kind, {"number": list(range(40)), "title": ["a"] * 40, "text": TEXTS})
    samples = samples_of(path, num_samples=8, seqlen=64)
    found = found_in(samples, tokenizer)
    assert len(found) > 9 and len(set(found)) == len(found) and set(found) <= set(TEXTS)
    assert found != [text for text in TEXTS if text in found]
    assert path.name in samples.source and samples_of.said == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_of_each_kind_go_through_the_template(samples_of, tokenizer, tmp_path, kind, column):
    names = {"user": "human", "assistant": "gpt"}
    chats = CHATS
    if column == "conversations":
        chats = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in chats]
    path = rows_file(tmp_path / kind, {"id": ["x"] * 40, column: chats})
    found = found_in(samples_of(path, num_samples=8, seqlen=64), tokenizer)
    assert len(found) > 5
    assert set(found) <= {f"<user>{q['content']}\n<assistant>{a['content']}\n" for q, a in CHATS}


def test_files_of_rows_give_the_same_samples(samples_of, tmp_path):
    """The order is that of the seed and not of the kind of file."""
    columns = {"text": TEXTS}
    kinds = ["rows.jsonl", "array.json", *(["rows.parquet", "saved"] if HAS_DATASETS else [])]
    paths = [rows_file(tmp_path / kind, columns) for kind in kinds]
    assert len({samples_of(path, num_samples=8, seqlen=64, seed=7).digest for path in paths}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_only_column_of_strings(samples_of, tokenizer, tmp_path, kind):
    path = rows_file(tmp_path / kind, {"number": list(range(40)), "content": TEXTS})
    assert set(found_in(samples_of(path, num_samples=8, seqlen=64), tokenizer)) <= set(TEXTS)


def test_plain_text(samples_of, tokenizer, tmp_path):
    text = "\n".join(make_texts(60))
    (tmp_path / "text.txt").write_text(text)
    for row in samples_of(tmp_path / "text.txt", num_samples=4, seqlen=64).input_ids:
        assert tokenizer.decode(row, clean_up_tokenization_spaces=False) in text


def test_empty_texts_and_nulls_are_passed_over(samples_of, tokenizer, tmp_path):
    rows = [{"text": value} for text in TEXTS for value in (text, None, "", " \n")]
    found = found_in(samples_of(write_rows(tmp_path / "rows.jsonl", rows), num_samples=8, seqlen=64), tokenizer)
    assert len(found) > 9 and set(found) <= set(TEXTS)


def test_byte_order_mark_and_blank_lines(samples_of, tmp_path):
    path = write_texts(tmp_path / "rows.jsonl", TEXTS)
    digest = samples_of(path, num_samples=8, seqlen=64).digest
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert samples_of(path, num_samples=8, seqlen=64).digest == digest


# Chats


def test_chats_need_a_template(refused, tmp_path):
    folder = save_chat_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    refused(path, "chats.jsonl", "chat template", error=InputError, folder=folder)


def strict_template(folder):
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    return folder


def test_chats_that_the_template_refuses_are_left_out_aloud(samples_of, tokenizer, tmp_path):
    folder = strict_template(save_chat_model(tmp_path / "model"))
    chats = CHATS + [chat[1:] for chat in CHATS[:5]]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    samples = samples_of(path, folder, num_samples=1000, seqlen=64)
    assert "5 chats were left out" in samples_of.said[0] and "the user begins" in samples_of.said[0]
    # the template ends its turns with EOS: there is no second one behind a chat
    found = samples.input_ids.flatten().tolist()
    assert not any(found[i] == found[i + 1] == EOS for i in range(len(found) - 1))


def test_what_a_table_fills_in_is_not_part_of_a_message(samples_of, tokenizer, tmp_path):
    """In a table all messages have the same keys, null where there was none; templates ask whether a key is there."""
    folder = save_chat_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% if 'tools' in m %} with {{ m['tools'] }}{% endif %}{% endfor %}"
    )
    nulls = {"tools": None, "from": None, "value": None}
    chats = [[{"role": "user", "content": f"say {n} and more of it", **nulls}] for n in range(40)]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    found = found_in(samples_of(path, folder, num_samples=2, seqlen=64), tokenizer)
    assert found and set(found) <= {chat[0]["content"] for chat in chats}


@pytest.mark.parametrize("count", [3, 200])
def test_chats_that_the_template_refuses_all(refused, tmp_path, count):
    folder = strict_template(save_chat_model(tmp_path / "model"))
    chats = [[{"role": "assistant", "content": str(n)}] for n in range(count)]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    refused(path, "chats.jsonl", "the user begins", error=InputError, folder=folder)


# Files that cannot be used


LINES = '{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["no such"]),
        ("missing.jsonl", None, ["no such"]),
        ("missing.parquet", None, ["no such"]),
        ("missing", None, ["no such", "stdlib-train", "self"]),
        ("empty.txt", b"", ["0 tokens"]),
        ("few.txt", b"the quick brown fox", ["tokens", "at least 32"]),
        ("binary.txt", b"\xff\xfe\x00a", ["UTF-8"]),
        ("empty.jsonl", b"", ["no rows"]),
        ("blank.jsonl", b"\n \n", ["no rows"]),
        ("nothing.jsonl", b'{"text": ""}\n', ["0 tokens"]),
        ("empty.json", b"[]", ["no rows"]),
        ("broken.jsonl", (LINES + '{"text": "thr\n').encode(), ["line 3", "JSON"]),
        ("binary.jsonl", LINES.encode() + b'{"text": "\xff"}\n', ["line 3", "UTF-8"]),
        ("pretty.json", b'{\n "text": "one"\n}\n', ["line 1", "one object on each line"]),
        ("broken.json", b'[{"text": "one"}', ["JSON"]),
        ("deep.jsonl", b'{"a":' * 100_000, ["line 1"]),
        ("number.jsonl", (LINES + "3\n").encode(), ["line 3", "int"]),
        ("numbers.jsonl", b"3\n", ["line 1", "int"]),
        ("other.jsonl", (LINES + '{"txt": "three"}\n').encode(), ["line 3", "'text'", "txt"]),
        ("none.jsonl", b'{"a": 1, "b": 2}\n', ["line 1", "a, b"]),
        ("two.jsonl", b'{"a": "x", "b": "y"}\n', ["line 1", "a, b"]),
        ("type.jsonl", (LINES + '{"text": 3}\n').encode(), ["line 3", "int"]),
        ("list.jsonl", b'{"messages": ["hello"]}\n', ["line 1", "messages"]),
        ("role.jsonl", b'{"messages": [{"text": "hello"}]}\n', ["line 1", "role"]),
        ("row.json", b'[{"text": "one"}, {"a": 3}]', ["row 2", "'text'"]),
        ("text.parquet", b"this is no parquet file", ["parquet" if HAS_DATASETS else "lowbit[eval]"]),
        ("empty.parquet", b"", ["parquet" if HAS_DATASETS else "lowbit[eval]"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_cannot_be_used(refused, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, *words, error=InputError)


@needs_datasets
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": [1, 2], "b": [0.5, 0.5]}, ["text", "a, b"]),
        ({"a": ["x"], "b": ["y"]}, ["2 columns", "a, b"]),
        ({"text": []}, ["no rows"]),
    ],
)
def test_parquet_without_texts(refused, tmp_path, columns, words):
    refused(parquet(tmp_path / "rows.parquet", columns), "rows.parquet", *words, error=InputError)


@needs_datasets
def test_truncated_parquet(refused, tmp_path):
    path = parquet(tmp_path / "rows.parquet", {"text": TEXTS})
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, "rows.parquet", error=InputError)


# Data sets by name. `datasets` takes a folder of that name for the repository, and reads its files as those of the Hub.


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """repository(columns, size) makes org/name in the working folder; `size` is what its card says about it."""
    if not HAS_DATASETS:
        pytest.skip("datasets is not installed")
    monkeypatch.chdir(tmp_path)

    def make(columns, size=None):
        folder = rows_file(tmp_path / "org" / "name", columns)
        parquet(folder / "test-00000.parquet", {name: values[:9] for name, values in columns.items()})
        if size is not None:
            rows = len(next(iter(columns.values())))
            splits = [{"name": "train", "num_bytes": size, "num_examples": rows},
                      {"name": "test", "num_bytes": size, "num_examples": 9}]  # fmt: skip
            card = {"dataset_info": {"splits": splits, "download_size": size, "dataset_size": size}}
            (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
        monkeypatch.setattr(data, "_is", lambda test, name: False)  # neither a file nor a folder, but a name
        return "org/name"

    return make


@pytest.mark.parametrize("size", [None, 5000, 10**12], ids=["size unknown", "small", "large"])
def test_large_data_sets_are_streamed(samples_of, tokenizer, repository, monkeypatch, size):
    import datasets

    opened = []
    original = data._opened
    monkeypatch.setattr(data, "_opened", lambda *args: opened.append(original(*args)) or opened[-1])
    name = repository({"number": list(range(40)), "text": TEXTS}, size)
    samples = samples_of(name, num_samples=8, seqlen=64)
    samples_of(name, num_samples=8, seqlen=64)
    assert {type(rows) for rows in opened} == {datasets.Dataset if size == 5000 else datasets.IterableDataset}
    found = found_in(samples, tokenizer)
    assert len(found) > 9 and set(found) <= set(TEXTS)
    assert found != [text for text in TEXTS if text in found]
    assert samples_of(name, num_samples=8, seqlen=64).digest == samples.digest
    assert samples_of(name, num_samples=8, seqlen=64, seed=1).digest != samples.digest
    assert samples.source == "org/name, train"


@pytest.mark.parametrize("size", [None, 5000], ids=["streamed", "small"])
@pytest.mark.parametrize(
    ("suffix", "expected"),
    [("", "text"), ("::test", "test split"), (":::title", "title"), ("::train:messages", "messages")],
)
def test_config_split_and_column_of_a_name(samples_of, tokenizer, repository, size, suffix, expected):
    titles = [f"title {n} of them all" for n in range(40)]
    name = repository({"title": titles, "messages": CHATS, "text": TEXTS}, size)
    found = set(found_in(samples_of(name + suffix, num_samples=4, seqlen=64), tokenizer))
    chats = {f"<user>{q['content']}\n<assistant>{a['content']}\n" for q, a in CHATS}
    known = {"text": set(TEXTS), "test split": set(TEXTS[:9]), "title": set(titles), "messages": chats}
    assert found and found <= known[expected]


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        (":::body", ["'body'", "number, text"]),
        ("::nothing", ["nothing", "train"]),
        (":other", ["other"]),
        (":::number", ["int"]),
    ],
)
@pytest.mark.parametrize("size", [None, 5000], ids=["streamed", "small"])
def test_names_that_cannot_be_used(refused, repository, size, suffix, words):
    name = repository({"number": list(range(40)), "text": TEXTS}, size)
    refused(name + suffix, "org/name", *words, error=InputError)


@needs_datasets
def test_saved_data_set_without_a_split_for_training(refused, tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"one": Dataset.from_list([{"text": "a"}])}).save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", "'train'", "one", error=InputError)


@pytest.mark.parametrize("name", ["nobody-at-all/no-such-data", "wikitext2", ""])
def test_names_that_cannot_be_reached(refused, name):
    refused(name, data.KNOWN[name][0] if name in data.KNOWN else name, error=InputError)


def test_stream_that_breaks_off(refused, repository, monkeypatch):
    import datasets

    name = repository({"text": TEXTS})

    def broken(self):
        yield {"text": "one"}
        raise ConnectionError("the network went away\nand more")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    refused(name, "org/name", "the network went away", error=InputError)


def lines_of_one_text(monkeypatch, lines: list[str], calls: list):
    """A stand-in for the Hub's Salesforce/wikitext."""
    import datasets

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": lines})

    monkeypatch.setattr(datasets, "load_dataset", load)


@needs_datasets
def test_wikitext_is_one_text(samples_of, tokenizer, monkeypatch):
    calls = []
    lines_of_one_text(monkeypatch, TEXTS, calls)
    samples = samples_of("wikitext2", num_samples=8, seqlen=64)
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})]
    for row in samples.input_ids:
        assert tokenizer.decode(row, clean_up_tokenization_spaces=False) in "\n\n".join(TEXTS)
    assert samples_of("Salesforce/wikitext:wikitext-2-raw-v1", num_samples=8, seqlen=64).digest == samples.digest


def test_without_a_data_set_and_without_a_network_the_model_speaks(samples_of):
    samples = samples_of(None, num_samples=2, seqlen=16)
    assert samples.input_ids.shape == (2, 16) and "sampled from the model" in samples.source
    assert len(samples_of.said) == 1 and "\n" not in samples_of.said[0]
    assert data.DEFAULT_CALIBRATION in samples_of.said[0]
    assert ("offline" if HAS_DATASETS else "lowbit[eval]") in samples_of.said[0]
    assert samples.digest == samples_of("self", num_samples=2, seqlen=16).digest
    assert samples_of.said == []


def test_without_a_data_set_the_default_is_taken_where_it_can_be_had(samples_of, tokenizer, repository, monkeypatch):
    monkeypatch.setattr("lowbit.text.samples.DEFAULT_CALIBRATION", repository({"text": TEXTS}))
    samples = samples_of(None, num_samples=8, seqlen=64)
    assert set(found_in(samples, tokenizer)) <= set(TEXTS)
    assert samples.source == "org/name, train" and samples_of.said == []


# What `lowbit eval` reads


@pytest.mark.parametrize("kind", FILES)
def test_documents_in_their_order(tokenizer, tmp_path, kind):
    path = rows_file(tmp_path / kind, {"text": TEXTS})
    assert list(documents(str(path))) == TEXTS
    stream = token_stream(tokenizer, str(path))
    assert tokenizer.decode(stream, clean_up_tokenization_spaces=False).split("</s>") == [*TEXTS, ""]
    assert torch.equal(token_stream(tokenizer, str(path), 100), stream[:100])


def test_token_stream_of_chats(tokenizer, tmp_path):
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    found = tokenizer.decode(token_stream(tokenizer, str(path)), clean_up_tokenization_spaces=False)
    assert found.startswith("<user>question 0\n<assistant>0: ") and found.count("</s>") == len(CHATS)


def test_token_stream_of_a_text(tokenizer, tmp_path):
    (tmp_path / "text.md").write_text(TEXTS[0])
    stream = token_stream(tokenizer, str(tmp_path / "text.md"))
    assert stream.tolist() == [*tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"], EOS]


@needs_datasets
@pytest.mark.parametrize("cell", [3, CHATS[0]], ids=["number", "chat"])
def test_a_data_set_that_is_joined_has_text(monkeypatch, cell):
    import datasets

    rows = datasets.Dataset.from_list([{"text": cell}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(InputError, match=r"org/name.*text"):
        list(documents("org/name"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"from": ["a"], "value": "x"}]}, r"from is \['a'\]; expected a string"),
        ({"messages": [{"from": "gpt", "value": 5}]}, "value is 5; expected a string"),
        ({"messages": [{"role": {}, "content": "x"}]}, r"role is \{\}; expected a string"),
        ({"messages": [{"role": "user", "content": 1}]}, "content is 1; expected a string"),
        ({"text": "a\ud800b"}, "half of a surrogate pair at 1"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_of_other_types_are_named(tmp_path, name, row, says):
    path = tmp_path / name
    path.write_text(json.dumps(row if name.endswith("l") else [row]))
    with pytest.raises(InputError, match=f"{name}, .* {says}"):
        list(documents(str(path)))


def test_messages_may_hold_parts_and_what_templates_know(tmp_path):
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "a"},
        {"role": "tool", "tool_calls": []},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}))
    assert list(documents(str(tmp_path / "rows.jsonl"))) == [chat]
