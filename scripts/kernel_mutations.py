#!/usr/bin/env python
"""Would the machine notice a wrong kernel? Damage the PTX of configurations in one place at a time and execute it.

    python scripts/kernel_mutations.py                    every place of synchronisation, two of every other kind
    python scripts/kernel_mutations.py --only hopper      of the configurations below, those whose id holds this
    ... --each 5                                          at most so many places of a kind of synchronisation
    ... --write                                           into scripts/benchmarks/results/kernel_mutations.json

What goes unnoticed is printed. Of synchronisation that must be in tests/kernels/executed/equivalents.py, with a reason;
exits with 1 if anything is not. Of masks, shifts and addresses a person has to look: a predicate that holds for all
threads of a small shape may go.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "scripts" / "benchmarks" / "results" / "kernel_mutations.json"
sys.path[:0] = [str(ROOT / part) for part in ("tests/kernels", "triton_kernels", "scripts", ".")]

from executed import mutations, process, shipped_runs  # noqa: E402

# One of each way to synchronise: cp.async with mma.sync and with wgmma, TMA with mbarriers, shuffles
DAMAGED = (
    ("skinny-w4-g128-sym-bf16-m8-n64", "sm_80"),
    ("gemm-w4-g128-sym-bf16-m128", "sm_80"),
    ("int8-w4-channel-sym-bf16-m8", "sm_80"),
    ("quantize-bf16-k4096", "sm_80"),
    ("skinny-w4-g128-sym-bf16-m16-n128", "sm_90"),
    ("int8-w8-g128-sym-bf16-m128", "sm_90"),
    ("hopper-w4-g128-sym-bf16-m128", "sm_90"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PART")
    parser.add_argument("--each", type=int, default=10**6)
    parser.add_argument("--others", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    chosen = [(name, gpu) for name, gpu in full_names() if options.only in name]
    rows = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        process.compiling_processes(os.environ.get("TRITON_CACHE_DIR", temporary), options.processes) as pool,
    ):
        triton = pool.submit(process.triton_version).result()
        limits = options.each, options.seed, options.others
        jobs = {pair: pool.submit(mutations.damage, *pair, *limits) for pair in chosen}
        for (name, gpu), job in jobs.items():
            rows.append(summary(name, gpu, job.result()))
    if options.write:
        record = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "triton": triton, "rows": rows}
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(row["unexplained"] for row in rows) else 0


def full_names() -> list[tuple[str, str]]:
    pairs = shipped_runs.pairs()
    return [next(pair for pair in pairs if pair[0].startswith(part) and pair[1] == gpu) for part, gpu in DAMAGED]


def summary(name: str, gpu: str, verdicts: list[mutations.Verdict]) -> dict:
    """A row of the table; what was missed is printed."""
    synchronisation = [v for v in verdicts if v.synchronisation]
    other = [v for v in verdicts if not v.synchronisation]
    missed = [v for v in verdicts if v.noticed is None]
    unexplained = [v.mutant for v in missed if v.synchronisation and not v.equivalent]
    print(f"{name} on {gpu}: {len(verdicts) - len(missed)} of {len(verdicts)} noticed")
    for verdict in missed:
        why = verdict.equivalent or ("NOT EXPLAINED" if verdict.synchronisation else "look at it")
        print(f"  missed: {verdict.mutant}: {why}", flush=True)
    return {
        "configuration": name, "gpu": gpu, "synchronisation": len(synchronisation),
        "noticed": sum(v.noticed is not None for v in synchronisation),
        "equivalent": sum(v.noticed is None and v.equivalent is not None for v in synchronisation),
        "other": len(other), "other_noticed": sum(v.noticed is not None for v in other), "unexplained": unexplained,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
