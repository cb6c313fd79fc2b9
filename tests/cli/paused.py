"""`lowbit` in a process of its own that waits in a certain call of a quantizer, however fast or busy the machine is.

The process is forked: it has imported what the test has, which takes a fresh one seconds."""

import os
import shutil
import signal
import sys
import time
import traceback

from lowbit.cli.main import main
from lowbit.quantizers import get_quantizer


class Forked:
    """As much of subprocess.Popen as the tests of signals need. returncode: None before `communicate`."""

    def __init__(self, run):
        """run(): ends by SystemExit."""
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            _run_as_a_process(run, out_end, err_end)
        os.close(out_end)
        os.close(err_end)
        self.stdout, self.stderr = open(out, encoding="utf-8"), open(err, encoding="utf-8")  # noqa: SIM115

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """What it still writes, little enough for a pipe to hold."""
        with self.stdout, self.stderr:
            err, out = self.stderr.read(), self.stdout.read()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return out, err


def _run_as_a_process(run, out: int, err: int) -> None:
    """With streams and signals as a shell gives them. Does not return."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        run()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start_paused(*arguments, method: str, call: int, again: bool = False) -> Forked:
    """`lowbit` with these arguments, waiting in the `call`th call of the quantizer `method`. again: it gets a Ctrl-C
    whenever it removes a folder after that."""
    quantizer, calls = get_quantizer(method), call
    quantize, rmtree = quantizer.quantize, shutil.rmtree

    def paused(*given):
        nonlocal calls
        calls -= 1
        if calls == 0:
            print("paused", file=sys.stderr, flush=True)
            time.sleep(3600)
        return quantize(*given)

    def cleaning(*given, **options):
        if again and calls <= 0:
            print("Ctrl-C while it cleans up", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGINT)
        rmtree(*given, **options)

    def run():
        quantizer.quantize, shutil.rmtree = paused, cleaning
        sys.argv = ["lowbit", *map(str, arguments)]
        main()

    process, before = Forked(run), []
    while (line := process.stderr.readline()) != "paused\n":
        before.append(line)
        assert line, (before, process.communicate(), process.returncode)
    return process
