#!/usr/bin/env python
"""What kernels execute for each weight, counted on the machine of tests/kernels/machine: PTX, memory, and the machine
code that ptxas makes of it, as often as that was executed. The predictions of the kernels' README rest on it.

    python scripts/kernel_counts.py [--only skinny] [--write]

--write: into scripts/benchmarks/results/kernel_counts.json, which tables.py renders.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "scripts" / "benchmarks" / "results" / "kernel_counts.json"
sys.path[:0] = [str(ROOT / part) for part in ("tests/kernels", "triton_kernels", "scripts", ".")]

from executed import counts, process, shipped_runs  # noqa: E402

GPU = "sm_90"
INPUTS = 4096
# Start of an id, rows of x
COUNTED = (
    *((f"skinny-w{bits}-{group}-sym-bf16-m8-n64", rows)
      for bits, group in ((4, "g128"), (3, "g128"), (2, "g128"), (8, "channel")) for rows in (1, 4)),
    *((f"skinny-w{bits}-g128-asym-bf16-m8-n64", 1) for bits in (4, 3, 2)),
    *((f"skinny-w{bits}-g128-sym-bf16-m16-n64", 16) for bits in (4, 3, 2)),
    ("skinny-w2-g64-sym-bf16-m8", 1),
    ("skinny-w2-g64-sym-bf16-m16", 16),
    ("skinny-w2-g64-asym-bf16-m16", 16),
    ("skinny-w3-g128-sym-bf16-m32-n64", 32),
    ("gemm-w4-g128-sym-bf16-m64", 64),
    ("gemm-w4-g128-sym-bf16-m128", 128),
    ("gemm-w8-channel-sym-bf16-m128", 128),
    ("hopper-w4-g128-sym-bf16-m128", 128),
    ("hopper-w8-channel-sym-bf16-m128", 128),
    ("int8-w8-channel-sym-bf16-m8", 4),
    ("int8-w4-channel-sym-bf16-m8", 4),
    ("int8-w4-g128-sym-bf16-m128", 128),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PART")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    names = [name for name, gpu in shipped_runs.pairs() if gpu == GPU]
    chosen = [(next(n for n in names if n.startswith(part)), rows) for part, rows in COUNTED if options.only in part]
    rows = []
    with (
        tempfile.TemporaryDirectory() as cache,
        process.compiling_processes(cache, options.processes) as pool,
    ):
        triton = pool.submit(process.triton_version).result()
        jobs = [pool.submit(counts.count, name, GPU, count, INPUTS) for name, count in chosen]
        for job in jobs:
            rows.append(asdict(job.result()))
            print(json.dumps(rows[-1]), flush=True)
    if options.write:
        record = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "triton": triton, "inputs": INPUTS, "rows": rows}
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
