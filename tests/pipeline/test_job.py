"""What survives a calibrated run that is stopped: killed anywhere, it goes on, and the result is the same to the byte."""

import json
import os
import random
import resource
import shutil
import sys
import threading
import time

import pytest
import torch
from folders import contents, edit_tensors, save_chat_model
from models import save_tiny
from runs import (
    IDS,
    assert_finished,
    ended,
    gptq,
    job_of,
    layer_files,
    names,
    run_quietly,
    start,
    state_of,
    stop_after_layers,
)

from lowbit.errors import InputError, LowbitError, OutputError, UsageError
from lowbit.pipeline.layers import LayeredModel

LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def expected(source):
    """The files of an uninterrupted run."""
    gptq(source, source.with_name("expected"))
    return contents(source.with_name("expected"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def unfinished(source, out, monkeypatch):
    """unfinished(layers, **options): a run to `out` that was stopped when so many layers were committed."""

    def run(layers, **options):
        stop_after_layers(monkeypatch, layers, lambda: gptq(source, out, **options))
        assert len(layer_files(out)) == layers and not out.exists()

    return run


@pytest.fixture
def loaded(monkeypatch):
    """Numbers of the layers that were loaded to be quantized, in order."""
    numbers, load = [], LayeredModel.load

    def load_and_tell(self, number, tensors):
        numbers.append(number)
        load(self, number, tensors)

    monkeypatch.setattr(LayeredModel, "load", load_and_tell)
    return numbers


# Killed


def assert_ends_well(source, out, expected) -> None:
    """The same run again, until it is done: that is also when the output was in place already."""
    (code,) = ended([start(run_quietly, source, out, {})])
    assert code == (1 if out.exists() and code == 1 else 0)
    assert_finished(out, expected)


def test_killed_at_any_time(source, out, expected):
    """kill -9, twenty times at random, mostly of runs that had been killed before."""
    started = time.perf_counter()
    assert ended([start(run_quietly, source, out, {})]) == [0]
    duration = time.perf_counter() - started
    moments, kills = random.Random(0), 0
    while kills < 20:
        shutil.rmtree(out)
        for _ in range(5):
            process = start(run_quietly, source, out, {})
            process.join(moments.uniform(0.05, 0.7) * duration)
            killed = process.is_alive()
            process.kill()
            process.join()
            kills += killed
            if not killed:
                break
        assert_ends_well(source, out, expected)


# What changes the file system; `open` for reading does not
_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def killed_before_operation(number, source, out) -> None:
    """A run that ends, as if killed, before it changes the file system for the `number`th time."""
    count = 0

    def hook(event, args):
        nonlocal count
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        opens = event == "open" and args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in _OPERATIONS or writes or opens) and str(out.parent) in str(args[0]):
            count += 1
            if count == number:
                os._exit(9)

    sys.addaudithook(hook)
    gptq(source, out)


def test_killed_between_any_two_operations(tmp_path):
    source = save_tiny(tmp_path / "model", hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=32)
    ids = IDS[:4, :8] % 32
    gptq(source, tmp_path / "expected", dataset=ids)
    expected, number, codes = contents(tmp_path / "expected"), 0, {9}
    while codes == {9}:
        number += 1
        out = tmp_path / f"runs{number}" / "out"
        out.parent.mkdir()
        codes = set(ended([start(killed_with, number, source, out, ids)]))
        if codes == {9}:
            again = ended([start(run_quietly, source, out, {"dataset": ids})])
            assert again == [0] or out.exists(), number
        assert_finished(out, expected)
    assert codes == {0} and number > 30
