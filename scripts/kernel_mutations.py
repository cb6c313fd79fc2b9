#!/usr/bin/env python
"""Would the machine notice a wrong kernel? Damage kernels in one place at a time and execute them.

    python scripts/kernel_mutations.py                    PTX: every place of synchronisation, two of every other kind;
                                                          sources: everything in tests/kernels/executed/source_damage.py
    python scripts/kernel_mutations.py --only hopper      of the configurations below, those whose id holds this
    ... --parts sources                                   only these, or only ptx
    ... --each 5                                          at most so many places of PTX of a kind of synchronisation
    ... --write                                           into scripts/benchmarks/results/kernel_mutations.json

What goes unnoticed is printed. Of synchronisation in PTX that must be in tests/kernels/executed/equivalents.py, and
whatever goes unnoticed of sources in source_damage.py, with a reason; exits with 1 if anything is not. Of masks, shifts
and addresses in PTX a person has to look: a predicate that holds for all threads of a small shape may go.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "scripts" / "benchmarks" / "results" / "kernel_mutations.json"
sys.path[:0] = [str(ROOT / part) for part in ("tests/kernels", "triton_kernels", "scripts", ".")]

from executed import mutations, process, shipped_runs, source_mutations  # noqa: E402
from executed.source_damage import DAMAGE  # noqa: E402

PARTS = ("ptx", "sources")

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
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--each", type=int, default=10**6)
    parser.add_argument("--others", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        process.compiling_processes(os.environ.get("TRITON_CACHE_DIR", temporary), options.processes) as pool,
    ):
        now = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "triton": pool.submit(process.triton_version).result()}
        if "ptx" in options.parts:
            record |= now | {"rows": damaged_ptx(pool, options)}
        if "sources" in options.parts:
            record["sources"] = now | {"rows": damaged_sources(pool, options)}
    if options.write:
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    rows = [*record.get("rows", ()), *record.get("sources", {}).get("rows", ())]
    return 1 if any(row["unexplained"] for row in rows) else 0


def damaged_ptx(pool: ProcessPoolExecutor, options: argparse.Namespace) -> list[dict]:
    """A row for each configuration."""
    chosen = [(name, gpu) for name, gpu in full_names() if options.only in name]
    limits = options.each, options.seed, options.others
    jobs = {pair: pool.submit(mutations.damage, *pair, *limits) for pair in chosen}
    return [summary(name, gpu, job.result()) for (name, gpu), job in jobs.items()]


def damaged_sources(pool: ProcessPoolExecutor, options: argparse.Namespace) -> list[dict]:
    """A row for each file; what was missed is printed."""
    jobs = [pool.submit(source_mutations.run, one, options.seed) for one in DAMAGE if options.only in one.configuration]
    verdicts = [job.result() for job in jobs]
    for verdict in verdicts:
        if verdict.noticed is None:
            why = verdict.damage.equivalent or "NOT EXPLAINED"
            print(f"  missed: {verdict.damage.file}, {verdict.damage.name}: {why}", flush=True)
    rows = []
    for file in dict.fromkeys(verdict.damage.file for verdict in verdicts):
        of_file = [verdict for verdict in verdicts if verdict.damage.file == file]
        row = {"file": file}
        for kind, which in (("synchronisation", True), ("other", False)):
            found = [verdict.noticed is not None for verdict in of_file if verdict.damage.synchronisation is which]
            row |= {kind: len(found), f"{kind}_noticed": sum(found)}
        row["equivalent"] = sum(verdict.noticed is None and not verdict.unexplained for verdict in of_file)
        row["unexplained"] = [verdict.damage.name for verdict in of_file if verdict.unexplained]
        rows.append(row)
    return rows


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
