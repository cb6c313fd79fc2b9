"""Fixtures every test may use."""

import gc
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else
os.environ.setdefault("LOWBIT_CPU_LEVEL", "all")  # the kernels of every instruction set that the processor has
os.environ["LOWBIT_EXACT"] = "1"  # models are compared with others; what rounds inputs is tested where it says so

import random
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

# Read when a process loads OpenMP: threads that wait by spinning take the cores from whatever else is running
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read when a kernel is defined: before anything else imports triton, as transformers' models do
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import torch.utils.deterministic

torch.set_num_threads(1)  # a fixed order of sums, and no barriers to wait at beside other work


# A shell starts what runs in the background with Ctrl-C ignored, nohup with SIGHUP ignored, and processes that tests
# start and stop would inherit that. What has a handler here is as usual there.
for _number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# File -> seconds that its tests took. LOWBIT_RECORD_SECONDS=1 scripts/test.sh writes it anew
_SECONDS = Path(__file__).with_name("seconds.json")


def pytest_collection_modifyitems(config, items):
    """Groups that run on demand only are left out, and the others get their order."""
    if "sanitize" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("sanitize"):
                item.add_marker(pytest.mark.skip(reason="runs only with -m sanitize"))
    _longest_files_first(config, items)


def _longest_files_first(config, items):
    """With several processes the longest files come first, or the last one to run would be waited for. A file that
    nobody has timed may be the longest."""
    if hasattr(config, "workerinput"):
        seconds = json.loads(_SECONDS.read_text())
        items.sort(key=lambda item: -seconds.get(_file(item.nodeid), float("inf")))  # the order in a file stays


def pytest_terminal_summary(terminalreporter):
    if os.environ.get("LOWBIT_RECORD_SECONDS"):
        seconds = Counter()
        for report in (report for reports in terminalreporter.stats.values() for report in reports):
            if hasattr(report, "duration"):
                seconds[_file(report.nodeid)] += report.duration
        _SECONDS.write_text(json.dumps({file: round(s, 1) for file, s in seconds.most_common()}, indent=0) + "\n")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_collection_finish():
    """What is imported stays: `gc.collect`, which a calibrated run calls for each layer, need not walk through it."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def signal_handlers():
    """A command ignores signals when it is about to end; processes of later tests would inherit that."""
    names = (name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def nan_poison():
    """Uninitialised memory holds NaN (integers: their largest value), so an unwritten output cannot pass."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills only in this mode
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def no_threads():
    """no_threads(name): threads of that name end, be it a moment later. Those of torch, tqdm or pytest are nobody's
    business here, so nothing may count all threads."""

    def wait(name: str) -> None:
        mine = [thread for thread in threading.enumerate() if thread.name == name]
        for thread in mine:
            thread.join(60)
        stuck = [thread for thread in mine if thread.is_alive()]
        for thread in stuck:
            thread.name += " of a test that failed"  # no later test has to wait for it
        assert not stuck

    return wait


@pytest.fixture
def compiler():
    """For what only kernels in C give: their products, the recorded loop. `usefixtures("compiler")` skips it elsewhere;
    test_native.py sees to it that a machine with a compiler runs it."""
    from lowbit.backends import native

    if reason := native.available():
        pytest.skip(reason)


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine without a C compiler."""
    from lowbit.backends import native

    monkeypatch.setattr(native, "library", lambda: "there is no C compiler")
