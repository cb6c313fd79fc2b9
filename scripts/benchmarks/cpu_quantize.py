"""Data-free quantization against reading and rewriting the same file: time and peak memory.

    python scripts/benchmarks/cpu_quantize.py

Random bf16 checkpoint with the shapes of Llama-3.2-1B. Both sides flush their output to the disk. Peak memory is
that of a process that only quantizes.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import WORK, llama_1b, save, timed

SCHEMES = {"W4A16": {}, "W8A16": {"scheme": "W8A16"}, "W4A16_ASYM": {"scheme": "W4A16_ASYM"}}


def rewrite(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as output:
        while chunk := file.read(2**24):
            output.write(chunk)
        os.fsync(output.fileno())


def measure_once(source: str, output: str, options: dict) -> None:
    """In a process of its own: print seconds and peak memory as JSON."""
    import lowbit

    # start-up, importing transformers and the model's code, is not what is measured
    lowbit.quantize(source, output, dry_run=True, **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    report = lowbit.quantize(source, output, overwrite=True, **options)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_bytes": peak * 1024, "start_up_bytes": before * 1024,
                      "source_bytes": report.source_bytes, "output_bytes": report.output_bytes}))  # fmt: skip


def measure(source: Path, options: dict) -> dict:
    output = WORK / "quantized"
    runs = []
    for _ in range(3):
        command = [sys.executable, __file__, "--once", str(source), str(output), json.dumps(options)]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    shutil.rmtree(output)
    return sorted(runs, key=lambda run: run["seconds"])[1]


def main():
    if sys.argv[1:2] == ["--once"]:
        measure_once(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
        return
    source = llama_1b()
    copy = WORK / "copy.safetensors"
    rewriting = timed(lambda: rewrite(source / "model.safetensors", copy))
    copy.unlink()
    result = {"model": "Llama-3.2-1B shapes, random bf16", "rewrite_seconds": rewriting}
    for name, options in SCHEMES.items():
        run = measure(source, options)
        result[name] = {**run, "times_rewrite": run["seconds"] / rewriting}
    save("cpu_quantize", result)


if __name__ == "__main__":
    main()
