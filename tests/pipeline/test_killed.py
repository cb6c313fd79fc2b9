"""kill -9 and full disks: whatever ends a calibrated run, the same command makes the same output of it."""

import os
import random
import resource
import shutil
import sys
import time

import pytest
from folders import contents, read_json
from models import save_tiny
from runs import IDS, assert_finished, ended, run_alone, run_and_tell, start
from runs import quick_gptq as gptq

from lowbit.errors import OutputError


def test_killed_at_any_time(source, out, expected):
    """kill -9, twenty times at random, mostly of runs that had been killed before."""
    duration = 0.0
    for name in ("first", "second"):  # the first one starts the server
        started = time.perf_counter()
        assert ended([start(run_alone, source, out.with_name("timed") / name, {})]) == [0]
        duration = time.perf_counter() - started
    shutil.rmtree(out.with_name("timed"))
    moments, kills = random.Random(0), 0
    while kills < 20:
        for _ in range(5):
            process = start(run_alone, source, out, {})
            process.join(moments.uniform(0.05, 0.7) * duration)
            killed = process.is_alive()
            process.kill()
            process.join()
            kills += killed
            if not killed:
                break
        again = ended([start(run_alone, source, out, {})]) if killed else [0]
        assert again == [0] or out.exists()  # killed when the output was in place
        assert_finished(out, expected)
        shutil.rmtree(out)


# What changes the file system; `open` for reading does not
_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def killed_before_operation(number, source, out, options) -> None:
    """A run that ends, as if killed, before it changes the file system for the `number`th time."""
    count = 0

    def hook(event, args):
        nonlocal count
        writes = event == "open" and (set(args[1] or "") & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR))
        if (event in _OPERATIONS or writes) and str(out.parent) in str(args[0]):
            count += 1
            if count == number:
                os._exit(9)

    sys.addaudithook(hook)
    gptq(source, out, **options)


def test_killed_between_any_two_operations(tmp_path):
    """Then run again: the output is whole, and nothing is beside it."""
    source = save_tiny(tmp_path / "model", num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=32)
    options = {"dataset": IDS[:4, :8] % 32}
    gptq(source, tmp_path / "expected", **options)
    expected, number, codes = contents(tmp_path / "expected"), 0, [9]
    while codes == [9]:
        number += 1
        out = tmp_path / f"run{number}" / "out"
        out.parent.mkdir()
        codes = ended([start(killed_before_operation, number, source, out, options)])
        if out.exists():  # in place when the run was killed, or not killed: it is found
            with pytest.raises(OutputError, match="exists already"):
                gptq(source, out, **options)
        else:
            gptq(source, out, **options)
        assert_finished(out, expected)
    assert codes == [0] and number > 30


def without_space(limit, told, source, out, options) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_and_tell(told, source, out, options)


@pytest.mark.parametrize("limit", [900, 3000, 20_000, 100_000, 135_000])
def test_disk_full(source, out, expected, limit, tmp_path):
    """Samples, job.json, a layer, hidden states, the output: one line, and the run goes on when there is space."""
    assert ended([start(without_space, limit, tmp_path / "told", source, out, {"options": {"sweeps": 0}})]) == [1]
    told = read_json(tmp_path / "told")
    assert told["error"] == "OutputError" and "File too large" in told["message"] and "\n" not in told["message"]
    assert not out.exists() and not list(tmp_path.glob(".out.partial*"))
    (tmp_path / "told").unlink()
    gptq(source, out)
    assert_finished(out, expected)
