"""Kill `lowbit quantize` at random moments and run it again: the output must be the same, and nothing left over.

    python scripts/kills.py [--kills 200] [--minutes 60] [--seed 0] [--model reference] [--keep]

Runs of rtn and gptq alternate. Each is killed by TERM, HUP, INT or KILL, up to five times in a row, then left to end.
The output is compared byte by byte with that of a run nobody killed; of the report all but times, memory and the
command. A few such kills are in tests/quantization/test_killed.py; this is for hundreds of them. Exit code 1 at the
first difference, with the folder kept.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # a fork of one thread, and sums in one order

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
METHODS = {
    "rtn": ["--scheme", "W4A16-G128"],
    "gptq": [
        "--scheme",
        "W4A16-G128",
        "--method",
        "gptq",
        "--num-samples",
        "2",
        "--seqlen",
        "32",
        "--option",
        "sweeps=0",
    ],
}
# What differs between two runs of the same command
_VARYING = ("seconds", "peak_memory", "expected_peak", "date", "command")


def start(arguments: list[str], log: Path) -> int:
    """`lowbit` with these arguments in a process of its own, forked from this one, which has imported it."""
    if child := os.fork():
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in SIGNALS[:-1]:  # nohup, and a shell that starts this in the background, ignore some of them
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["lowbit", *arguments]
    from lowbit.cli.main import main

    main()
    sys.exit(0)  # through the callers of this function, as the end of any process: what cleans up at exit does so


def end(child: int, within: float | None = None, number: int | None = None) -> int:
    """The exit code of a process, which gets the signal `number` after `within` seconds if it has not ended."""
    deadline = time.monotonic() + within if within is not None else None
    while deadline is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(child, number)
            break
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return {
        name: _report(path) if path.name == "lowbit_report.json" else path.read_bytes() for name, path in files.items()
    }


def _report(path: Path) -> bytes:
    def lasting(value):
        if isinstance(value, dict):
            return {key: lasting(part) for key, part in value.items() if key not in _VARYING}
        return [lasting(part) for part in value] if isinstance(value, list) else value

    return json.dumps(lasting(json.loads(path.read_text()))).encode()


class Difference(Exception):
    pass


class Kills:
    """Chains of killed runs in `work`. counts: kills by method and signal."""

    def __init__(self, work: Path, model: str, seed: int):
        self.work, self.random, self.counts, self.model = work, random.Random(seed), Counter(), model
        (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog and sleeps. " * 200)
        self.expected, self.seconds = {}, {}
        for method in METHODS:
            for _ in range(2):  # the first one compiles and imports
                started, out = time.monotonic(), work / f"expected-{method}" / "out"
                shutil.rmtree(out.parent, ignore_errors=True)
                out.parent.mkdir()
                if end(self._start(method, out)):
                    raise SystemExit(f"the run that nobody kills failed: see {work / 'log'}")
                self.seconds[method] = time.monotonic() - started
            self.expected[method] = contents(out)

    def _start(self, method: str, out: Path) -> int:
        options = METHODS[method] + (["--dataset", str(self.work / "text.txt")] if method == "gptq" else [])
        return start(["quantize", self.model, "-o", str(out), *options], self.work / "log")

    def chain(self, method: str, limit: int) -> None:
        """Kill a run and those that go on from it, `limit` times at most; then let one end, and compare."""
        out = self.work / "run" / "out"
        out.parent.mkdir()
        for _ in range(min(limit, self.random.randint(1, 5))):
            number = self.random.choice(SIGNALS)
            before, started = set(os.listdir(out.parent)), time.monotonic()
            code = end(self._start(method, out), self.random.uniform(0, self.seconds[method]), number)
            if code == 0:  # it was faster than others before it: how busy the machine is changes
                self.seconds[method] = min(self.seconds[method], time.monotonic() - started)
                break
            self.counts[method, number.name] += 1
            self._check_beside(method, number, out, before)
            if out.exists():
                break
        again = end(self._start(method, out))
        if again != 0 and not out.exists():
            raise Difference(f"{method}: the run after a kill ended with {again}")
        found = contents(out) if out.exists() else {}
        for name in sorted({*found, *self.expected[method]}):
            if found.get(name) != self.expected[method].get(name):
                raise Difference(f"{method}: {name} differs")
        if (left := sorted(os.listdir(out.parent))) != ["out"]:
            raise Difference(f"{method}: left over: {left}")
        shutil.rmtree(out.parent)

    def _check_beside(self, method: str, number: signal.Signals, out: Path, before: set[str]) -> None:
        """A run that is asked to end leaves nothing of its own but the layers that gptq has finished."""
        left = set(os.listdir(out.parent)) - before - {"out", ".out.job" if method == "gptq" else ""}
        if left and number != signal.SIGKILL:
            raise Difference(f"{method}: left by {number.name}: {sorted(left)}")

    @property
    def total(self) -> int:
        return self.counts.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long, however many there were")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    options = parser.parse_args()
    _import_everything()
    work, started = Path(tempfile.mkdtemp(prefix="lowbit-kills-")), time.monotonic()
    kills, chains = Kills(work, options.model, options.seed), 0
    try:
        while kills.total < options.kills and time.monotonic() - started < options.minutes * 60:
            kills.chain(list(METHODS)[chains % len(METHODS)], options.kills - kills.total)
            chains += 1
    except Difference as difference:
        raise SystemExit(f"after {kills.total} kills: {difference} (see {work})") from None
    if not options.keep:
        shutil.rmtree(work)
    by_method, by_signal = Counter(), Counter()
    for (method, number), count in kills.counts.items():
        by_method[method] += count
        by_signal[number] += count
    counted = ", ".join(f"{name} {count}" for name, count in [*sorted(by_method.items()), *sorted(by_signal.items())])
    print(
        f"{kills.total} kills ({counted}) of {chains} runs, seed {options.seed}: "
        f"all outputs byte-identical, nothing left over; {time.monotonic() - started:.0f} s"
    )


def _import_everything() -> None:
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401  what the embedded model is

    import lowbit.cli.commands.quantize
    import lowbit.quantization.run  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
