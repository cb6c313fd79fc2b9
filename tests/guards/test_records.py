"""JSON of strangers: what becomes a typed object, what becomes one line, and which files are not opened."""

import json
import os
from dataclasses import dataclass, field

import pytest

from lowbit.errors import InputError
from lowbit.guards.reading import check_regular_files, open_regular, parse_json, read_json
from lowbit.guards.records import record


@dataclass(frozen=True)
class Inner:
    size: int
    scale: float = 1.0
    named: str | None = field(default=None, metadata={"key": "_name"})


@dataclass(frozen=True)
class Outer:
    groups: dict[str, Inner]
    targets: list[str] | None = None
    place: str | list[str] = "here"
    anything: object = None


def test_values_that_fit_become_objects():
    value = {"groups": {"a": {"size": 3, "_name": "x", "unknown": [1]}}, "place": ["b"], "anything": {"c": None}}
    made = record(Outer, value, "f.json")
    assert made == Outer({"a": Inner(3, 1.0, "x")}, None, ["b"], {"c": None})
    assert record(Outer, {"groups": {}, "targets": None}, "f.json") == Outer({})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "it is None; expected an object"),
        ([], r"it is \[\]; expected an object"),
        ({}, "groups is missing; expected an object of objects"),
        ({"groups": None}, "groups is None"),
        ({"groups": {"a": 1}}, "groups.a is 1; expected an object"),
        ({"groups": {"a b": {"size": "3"}}}, "groups.'a b'.size is '3'; expected a whole number"),
        ({"groups": {"a": {"size": True}}}, "groups.a.size is True"),
        ({"groups": {"a": {"size": 3.0}}}, "groups.a.size is 3.0"),
        ({"groups": {"a": {"size": 2**63}}}, "groups.a.size is 9223372036854775808"),
        ({"groups": {"a": {"size": 10**5000}}}, "groups.a.size is a int"),
        ({"groups": {"a": {"size": 1, "scale": float("nan")}}}, "groups.a.scale is nan; expected a number"),
        ({"groups": {"a": {"size": 1, "scale": False}}}, "groups.a.scale is False"),
        ({"groups": {"a": {"size": 1, "_name": 2}}}, "groups.a._name is 2; expected a string or null"),
        ({"groups": {}, "targets": ["x", None]}, r"targets\[1\] is None; expected a string"),
        ({"groups": {}, "place": {}}, r"place is \{\}; expected a string or a list of strings"),
        ({"groups": {}, "place": "\x1b[2J\n" * 99}, None),
        ({"groups": {"\x1b\n": 0}}, r"groups.'\\x1b\\n' is 0"),
    ],
)
def test_values_that_do_not_fit_are_named_in_one_line(value, says):
    if says is None:
        record(Outer, value, "f.json")
        return
    with pytest.raises(InputError, match=f"^f.json: {says}") as caught:
        record(Outer, value, "f.json")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "more than 50,000 values"),
        (b"[" * 40_000, "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        (b'["\\ud800"]', "not valid JSON"),
        (b'{"\\uD800": 1}', "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b"[" + b"[]," * 30_000 + b"0]", "more than 50,000 values"),
    ],
)
def test_json_that_is_refused(data, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_json(data, "f.json", most=50_000)
    assert "\n" not in str(caught.value)


def test_surrogate_pairs_are_characters():
    assert parse_json(b'"\\ud83d\\ude00"', "f.json") == "\N{GRINNING FACE}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_devices_are_not_opened(tmp_path):
    """Reading from a pipe that nobody writes to would never end."""
    os.mkfifo(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", tmp_path, os.devnull):
        with pytest.raises(InputError, match=r"refusing to open|is a folder"):
            open_regular(path)
    with pytest.raises(InputError, match="refusing to open"):
        read_json(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json is a pipe"):
        check_regular_files(tmp_path)


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "blob").write_text(json.dumps({"a": 1}))
    (tmp_path / "config.json").symlink_to("blob")
    (tmp_path / "nowhere").symlink_to("gone")
    check_regular_files(tmp_path)
    assert read_json(tmp_path / "config.json") == {"a": 1}
    with pytest.raises(InputError, match="nowhere is missing"):
        read_json(tmp_path / "nowhere")
