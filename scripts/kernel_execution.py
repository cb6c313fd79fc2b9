#!/usr/bin/env python
"""Execute the kernels' machine code (PTX) without a GPU, and compare with float64.

    python scripts/kernel_execution.py                    everything below, with the triton that is installed
    python scripts/kernel_execution.py --only hopper      configurations whose id holds one of these
    ... --gpu sm_90 --seeds 5 --drawn 200                 one GPU, more seeds and shapes
    ... --parts shipped drawn                             not the kernel tests
    ... --triton FOLDER [FOLDER ...]                      with the triton in each of these folders too
    ... --write                                           into scripts/benchmarks/results/kernel_execution.json,
                                                          where rows that were not run stay

Runs every shipped configuration on its smallest telling shape, shapes that are drawn, the decode loop, and
tests/kernels on the machine of tests/kernels/machine. TRITON_CACHE_DIR keeps what is compiled.
`python scripts/benchmarks/tables.py` then renders the table of triton_kernels/README.md.
Exits with 1 if anything is wrong but what a release of triton is known to get wrong.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / part) for part in ("tests/kernels", "triton_kernels", "scripts", ".")]
RESULT = ROOT / "scripts" / "benchmarks" / "results" / "kernel_execution.json"
# The order of rows
KERNELS = [
    "skinny", "gemm", "hopper", "int8", "quantize", "quantize_normed", "dequantize", "gptq_columns", "gptq_descend",
    "drawn", "decode", "tests",
]  # fmt: skip
TESTS = ("test_skinny.py", "test_gemm.py", "test_int8.py", "test_quantize_rows.py")
GPUS = ("sm_80", "sm_90")
PARTS = ("shipped", "drawn", "decode", "tests")
sys.path[:0] = PATHS

from executed import decode_runs, drawn_runs, process, shipped_runs  # noqa: E402
from executed.known_faults import known_fault, version_of  # noqa: E402
from executed.shipped_runs import Result  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", default=GPUS, choices=GPUS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="of the ids of configurations")
    parser.add_argument("--seeds", type=int, default=3, help="of each configuration")
    parser.add_argument("--drawn", type=int, default=60, help="shapes for each GPU")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--triton", nargs="+", default=[], metavar="FOLDER", help="folders that hold a triton package")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    wrong = 0
    for folder in [None, *options.triton]:
        version, record = run_with(folder, options)
        wrong += sum(row["unknown"] for row in record["rows"])
        if options.write:
            write(version, record)
    return 1 if wrong else 0


def write(version: str, record: dict) -> None:
    """Newest triton first."""
    everything = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    before = everything.get(version, {}).get("rows", [])
    rows = {(row["kernel"], row["gpu"]): row for row in [*before, *record["rows"]]}
    ordered = sorted(rows.values(), key=lambda row: (KERNELS.index(row["kernel"]), row["gpu"]))
    everything[version] = record | {"rows": ordered}
    everything = dict(sorted(everything.items(), key=lambda item: version_of(item[0]), reverse=True))
    RESULT.write_text(json.dumps(everything, indent=1) + "\n")


def run_with(folder: str | None, options: argparse.Namespace) -> tuple[str, dict]:
    """Everything with one triton: its version, and what is recorded of it."""
    with tempfile.TemporaryDirectory() as temporary:
        cache = os.environ.get("TRITON_CACHE_DIR", temporary)
        with process.compiling_processes(cache, options.processes, folder) as pool:
            version = pool.submit(process.triton_version).result()
            rows = shipped(pool, version, options) if "shipped" in options.parts else []
            rows += drawn(pool, version, options) if "drawn" in options.parts else []
            rows += decode(pool, options) if "decode" in options.parts else []
        rows += [tests(gpu, folder, cache) for gpu in options.gpu] if "tests" in options.parts else []
    import numpy
    import torch

    versions = {"torch": torch.__version__, "numpy": numpy.__version__, "python": sys.version.split()[0]}
    return version, {"date": datetime.now(UTC).strftime("%Y-%m-%d"), **versions, "rows": rows}


def shipped(pool: ProcessPoolExecutor, version: str, options: argparse.Namespace) -> list[dict]:
    """A row for each kernel and GPU."""
    pairs = [
        (name, gpu)
        for name, gpu in shipped_runs.pairs()
        if gpu in options.gpu and any(part in name for part in options.only)
    ]
    jobs = [
        pool.submit(shipped_runs.run_shipped, name, gpu, shipped_runs.seed_of(name, gpu) + seed)
        for name, gpu in pairs
        for seed in range(options.seeds)
    ]
    results = collected(jobs)
    kernels = dict.fromkeys((shipped_runs.find(name).kernel, gpu) for name, gpu in pairs)
    return [
        row(kernel, gpu, [r for r in results if (shipped_runs.find(r.case).kernel, r.gpu) == (kernel, gpu)], version)
        for kernel, gpu in kernels
    ]


def drawn(pool: ProcessPoolExecutor, version: str, options: argparse.Namespace) -> list[dict]:
    jobs = [pool.submit(drawn_runs.run_drawn, gpu, seed) for gpu in options.gpu for seed in range(options.drawn)]
    results = collected(jobs)
    return [row("drawn", gpu, [r for r in results if r.gpu == gpu], version) for gpu in options.gpu]


def decode(pool: ProcessPoolExecutor, options: argparse.Namespace) -> list[dict]:
    """A step with every operator, captured and replayed."""
    jobs = {
        gpu: [pool.submit(decode_runs.run_decode, gpu, seed) for seed in range(options.seeds)] for gpu in options.gpu
    }
    rows = []
    for gpu, of_gpu in jobs.items():
        results = [job.result() for job in of_gpu]
        for problem in [problem for result in results for problem in result.problems][:10]:
            print(f"decode loop on {gpu}: {problem}", flush=True)
        rows.append({
            "kernel": "decode", "gpu": gpu, "runs": len(results), "operators": results[0].operators,
            "launches": sum(r.launches for r in results), "instructions": sum(r.instructions for r in results),
            "unknown": sum(bool(r.problems) for r in results),
            "cpu_seconds": round(sum(r.cpu_seconds for r in results), 1),
        })  # fmt: skip
    return rows


def collected(jobs: list) -> list[Result]:
    """Results as they come, wrong ones printed."""
    results = []
    for job in as_completed(jobs):
        results.append(job.result())
        if results[-1].problems:
            print(results[-1].report(most=2), flush=True)
    print(f"{len(results)} runs, {sum(bool(r.problems) for r in results)} of them with problems", flush=True)
    return results


def row(kernel: str, gpu: str, results: list[Result], version: str) -> dict:
    """known: configurations with faults that triton is known for; unknown: runs with any other problem."""
    known, unknown = {}, 0
    for result in results:
        fault = known_fault(None if kernel == "drawn" else shipped_runs.find(result.case), gpu, version)
        others = [problem for problem in result.problems if fault is None or not fault.explains(problem)]
        unknown += bool(others)
        if result.problems and not others:
            known[result.case] = fault.name
    return {
        "kernel": kernel, "gpu": gpu, "configurations": len({r.case for r in results}), "runs": len(results),
        "launches": sum(r.launches for r in results), "instructions": sum(r.instructions for r in results),
        "opcodes": len({opcode for r in results for opcode in r.opcodes}),
        "worst": round(max(r.worst for r in results), 3), "covered": round(min(r.covered for r in results), 3),
        "known": len(known), "faults": sorted(set(known.values())), "unknown": unknown,
        "cpu_seconds": round(sum(r.cpu_seconds for r in results), 1),
    }  # fmt: skip


def tests(gpu: str, folder: str | None, cache: str) -> dict:
    """The kernel tests on the machine, in a process of their own."""
    paths = os.pathsep.join([*([folder] if folder else []), *PATHS, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "LOWBIT_MACHINE_GPU": gpu, "TRITON_CACHE_DIR": cache}
    files = [str(ROOT / "tests" / "kernels" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "executed.plugin", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    print(f"tests/kernels on {gpu}: {counts}", *failed[:10], sep="\n", flush=True)
    return {
        "kernel": "tests", "gpu": gpu, "runs": sum(counts.values()), "passed": counts.get("passed", 0),
        "unknown": counts.get("failed", 0) + counts.get("error", 0),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
