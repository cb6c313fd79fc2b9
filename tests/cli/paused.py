"""`lowbit` in a process of its own that waits in a certain call of a quantizer, however fast or busy the machine is."""

import os
import subprocess
import sys

from folders import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
_CODE = """
import os, shutil, signal, sys, time
from lowbit.cli.main import main
from lowbit.quantizers import get_quantizer

quantizer, calls, again = get_quantizer(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1) == "True"
quantize, rmtree = quantizer.quantize, shutil.rmtree

def paused(*arguments):
    global calls
    calls -= 1
    if calls == 0:
        print("paused", file=sys.stderr, flush=True)
        time.sleep(3600)
    return quantize(*arguments)

def cleaning(*arguments, **options):
    if again and calls <= 0:
        print("Ctrl-C while it cleans up", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
    rmtree(*arguments, **options)

quantizer.quantize, shutil.rmtree = paused, cleaning
main()
"""


def start_paused(*arguments, method: str, call: int, again: bool = False) -> subprocess.Popen:
    """`lowbit` with these arguments, waiting in the `call`th call of the quantizer `method`. again: it gets a Ctrl-C
    whenever it removes a folder after that."""
    command = [sys.executable, "-c", _CODE, method, str(call), str(again), *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = []
    while (line := process.stderr.readline()) != "paused\n":
        before.append(line)
        assert line, (before, process.wait())
    return process
