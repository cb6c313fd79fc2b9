"""Mutated files of model folders, and everything that reads them: each must succeed or raise a LowbitError of one line.

A case is one value in one JSON file exchanged for junk, or taken away; which ones is drawn from a seed. The readers run
in this process. `tests/test_fuzz.py` runs a fixed number of cases, `scripts/fuzz.py` as many as are asked for.
"""

import contextlib
import copy
import json
import logging
import os
import random
import shutil
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from folders import save_chat_model

import lowbit
from lowbit.checkpoint.report_file import converted_dtype, load_report
from lowbit.errors import LowbitError
from lowbit.folders.locate import load_config
from lowbit.folders.opened import summarize
from lowbit.publish.card import model_card
from lowbit.publish.facts import Facts
from lowbit.quantization.calibrated.job import Job
from lowbit.report_page.page import render
from lowbit.text.datasets import shuffled
from lowbit.verification.checks import static_checks

MISSING = object()
_NESTED = [[]]
for _ in range(60):
    _NESTED = [_NESTED]
JUNK = (
    MISSING, None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 10**4000, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", r"re:(?:[\w.]{1,40}){1,40}(?=\s)",
    "re:(", "\ud800", "\0", "../../etc/passwd", "/dev/zero", "1e9",
    "\x1b[2J\nx", "x" * 100_000, [], [None], [1, "a", {}], ["re:(.*)*$"], _NESTED, {}, {"a": None}, {"": {"x": [1]}},
    {"x": 1, "y": "z"},
)  # fmt: skip
_CARD = {
    "license": "other", "license_name": "tiny", "license_link": "LICENSE", "base_model": "org/tiny", "language": ["en"],
    "tags": ["a", "b"], "pipeline_tag": "text-generation", "base_model_relation": "finetune",
}  # fmt: skip
_CHATS = {"messages": [{"role": "user", "content": "hi"}, {"from": "gpt", "value": "ho"}], "text": None}
_HEADER = "model.safetensors"
_SIDE_BY_SIDE = ("config.json", "lowbit_report.json", "lowbit_manifest.json", "README.md")


@dataclass(frozen=True)
class Case:
    """One value exchanged, or the key of it: `path` are the keys and indices that lead to it."""

    folder: Path
    file: str
    path: tuple
    junk: object
    is_key: bool = False

    def __str__(self) -> str:
        place = "".join(f"[{step!r}]" for step in self.path)
        junk = "gone" if self.junk is MISSING else repr(self.junk)[:80]
        return f"{self.folder.name}/{self.file}{place} {'renamed' if self.is_key else '='} {junk}"


def make_folders(where: Path) -> list[Path]:
    """Small quantized folders of each format, with what a run, a person and the Hub put beside the weights."""
    plain = save_chat_model(where / "plain", num_hidden_layers=1)
    made = [plain]
    for name, options in {
        "packed": {"scheme": "W4A16_ASYM-G16", "max_shard_size": "60KB", "overrides": [("model.*o_proj", "W8A16-G32")]},
        "int": {"scheme": "W8A8"},
        "gptq": {"scheme": "W4A16-G32", "format": "gptq"},
        "awq": {"scheme": "W4A16_ASYM-G32", "format": "awq"},
    }.items():
        lowbit.quantize(plain, where / name, **options)
        made.append(where / name)
    lowbit.convert_dtype(plain, where / "half", "BF16")
    for folder in (*made, where / "half"):
        _write(folder / "README.md", _CARD)
        (folder / "data.jsonl").write_text(json.dumps(_CHATS) + "\n", encoding="utf-8")
    job = where / ".job.job"
    job.mkdir()
    (job / "job.json").write_text(json.dumps(_job()), encoding="utf-8")
    return [*made, where / "half", job]


def _job() -> dict:
    report = {"modules": [{"name": "q_proj", "error": 0.1, "output_error": 0.2}], "seconds": 1.0, "layer": 0}
    layer = {"file": "layer-0000-a.safetensors", "sha256": "0" * 64, "report": report, "streams": ["0" * 64]}
    return {"identity": {"tokens": "0" * 64, "recipe": {"bits": 4}}, "layers": [layer], "output": [1, 2]}


def cases(folders: list[Path], seed: int) -> Iterator[Case]:
    """Without end: files by turns, so that a large one gets no more of them than a small one."""
    chance = random.Random(seed)
    files = [(folder, file) for folder in folders for file in _files(folder)]
    places = {(folder, file): list(_places(_read(folder / file))) for folder, file in files}
    while True:
        for folder, file in files:
            path, junk = chance.choice(places[folder, file]), chance.choice(JUNK)
            is_key = chance.random() < 0.1 and bool(path) and isinstance(path[-1], str) and isinstance(junk, str)
            yield Case(folder, file, path, junk, is_key)


def failure(case: Case, scratch: Path) -> str | None:
    """What is wrong with how a case is taken: a traceback, or an error of several lines. scratch: for copies."""
    folder = scratch / case.folder.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case.folder, folder, copy_function=_link)
    _write(folder / case.file, _changed(_read(case.folder / case.file), case))
    try:
        for name, reader in _readers(case.file).items():
            if problem := _problem(reader, folder):
                return f"{name}: {case}: {problem}"
    finally:
        shutil.rmtree(folder)
    return None


def _problem(reader: Callable[[Path], object], folder: Path) -> str | None:
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            reader(folder)
    except LowbitError as error:
        message = str(error)
        return None if message and "\n" not in message and len(message) < 2_000 else f"says {message[:300]!r}"
    except Exception:
        return traceback.format_exc()
    return None


def _readers(file: str) -> dict[str, Callable[[Path], object]]:
    if file == "job.json":
        return {"job": lambda folder: Job(folder.with_name("job"), {"tokens": "1"}).close()}
    if file == "data.jsonl":
        return {"data": lambda folder: list(shuffled(str(folder / file), 0).documents)}
    if file == "README.md":
        return {"card": _card}
    if file == "lowbit_report.json":
        return {"card": _card, "page": _page, "verify": _verify, "half": converted_dtype}
    if file == "lowbit_manifest.json":
        return {"verify": _verify}
    return {"inspect": summarize, "config": load_config, "verify": _verify, "card": _card}


def _verify(folder: Path) -> None:
    for check in static_checks(folder):
        assert "\n" not in check.detail and len(check.detail) < 2_000, check.detail[:300]


def _card(folder: Path) -> str:
    return str(model_card(Facts.of(folder), "me/tiny"))


def _page(folder: Path) -> str:
    return render(load_report(folder), "tiny")


def _files(folder: Path) -> list[str]:
    if folder.name.endswith(".job"):
        return ["job.json"]
    names = [*_SIDE_BY_SIDE, "quantize_config.json", "generation_config.json", "model.safetensors.index.json", _HEADER]
    return [name for name in (*names, "data.jsonl") if (folder / name).is_file()]


def _read(file: Path):
    """The JSON in a file, in a header, or in front of a card."""
    if file.name == _HEADER:
        with file.open("rb") as opened:
            return json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    text = file.read_text(encoding="utf-8")
    return json.loads(text.split("---")[1] if file.suffix == ".md" else text)


def _write(file: Path, value) -> None:
    text = json.dumps(value)
    if file.name == _HEADER:
        data = file.read_bytes()
        rest = data[8 + struct.unpack("<Q", data[:8])[0] :]
        content = struct.pack("<Q", len(text)) + text.encode() + rest
    elif file.suffix == ".md":  # JSON is YAML
        content = f"---\n{text}\n---\n# A card\n".encode()
    else:
        content = text.encode()
    file.unlink(missing_ok=True)  # a link to the file of all cases
    file.write_bytes(content)


def _link(source: str, target: str) -> None:
    os.link(source, target)


def _places(value, path: tuple = ()) -> Iterator[tuple]:
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _places(item, (*path, key))


def _changed(value, case: Case):
    if not case.path:
        return {} if case.junk is MISSING else case.junk
    value = copy.deepcopy(value)
    *steps, last = case.path
    owner = value
    for step in steps:
        owner = owner[step]
    if case.is_key:
        owner[case.junk] = owner.pop(last)
    elif case.junk is MISSING:
        del owner[last]
    else:
        owner[last] = case.junk
    return value


def quiet() -> None:
    """What transformers logs of configs that make no sense."""
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
