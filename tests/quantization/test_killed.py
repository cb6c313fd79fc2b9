"""kill -9 and full disks: whatever ends a calibrated run, the same command makes the same output of it."""

import os
import random
import resource
import signal
import sys

import pytest
from folders import contents, read_json
from models import save_tiny
from runs import IDS, assert_finished, ended, run_and_tell, start
from runs import quick_gptq as gptq

from lowbit.errors import OutputError

pytestmark = pytest.mark.slow

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


def smallest(folder, **changes):
    """A model, and what to quantize it with."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
    return save_tiny(folder / "model", **sizes, **changes), {"dataset": IDS[:4, :8] % 32}


def test_killed_between_any_two_operations(tmp_path):
    """Then run again: the output is whole, and nothing is beside it."""
    source, options = smallest(tmp_path, num_hidden_layers=1)
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


def test_killed_again_and_again(tmp_path):
    """A run that goes on from a killed one is killed, too, wherever it is by then."""
    source, options = smallest(tmp_path, num_hidden_layers=3)
    gptq(source, tmp_path / "expected", **options)
    expected, operations, found = contents(tmp_path / "expected"), random.Random(0), 0
    for number in range(4):
        out = tmp_path / f"run{number}" / "out"
        out.parent.mkdir()
        for _ in range(5):
            codes = ended([start(killed_before_operation, operations.randint(1, 40), source, out, options)])
            assert codes == [9] or out.exists()
            found += bool(list(out.parent.glob(".out.job/job.json")))
            if out.exists():  # in place when the run was killed: the next one clears away what it left
                with pytest.raises(OutputError, match="exists already"):
                    gptq(source, out, **options)
                break
        else:
            gptq(source, out, **options)
        assert_finished(out, expected)
    assert found > 5  # a killed run had something to go on from


def killed_in_a_write(limit, source, out, options) -> None:
    """The system ends the process at byte `limit` of a file: what came before is written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    gptq(source, out, **options)


def without_space(limit, told, source, out, options) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_and_tell(told, source, out, options)


# Samples, job.json, a layer, hidden states, the output
each_file = pytest.mark.parametrize("limit", [900, 3000, 20_000, 100_000, 135_000])


@each_file
def test_killed_in_the_middle_of_a_file(source, out, expected, limit):
    assert ended([start(killed_in_a_write, limit, source, out, {})]) == [-signal.SIGXFSZ]
    assert not out.exists()
    gptq(source, out)
    assert_finished(out, expected)


@each_file
def test_disk_full(source, out, expected, limit, tmp_path):
    """One line, and the run goes on when there is space."""
    assert ended([start(without_space, limit, tmp_path / "told", source, out, {"options": {"sweeps": 0}})]) == [1]
    told = read_json(tmp_path / "told")
    assert told["error"] == "OutputError" and "File too large" in told["message"] and "\n" not in told["message"]
    assert not out.exists() and not list(tmp_path.glob(".out.partial*"))
    (tmp_path / "told").unlink()
    gptq(source, out)
    assert_finished(out, expected)
