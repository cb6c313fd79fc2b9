#!/usr/bin/env python
"""What the machine code of our kernels says, on a machine without a GPU.

    python scripts/kernel_report.py                   measure every shipped configuration, print a table
    python scripts/kernel_report.py --check           compare with tests/kernels/aot_report.json, exit 1 on a problem
    python scripts/kernel_report.py --write           write what was measured there
    ... --triton FOLDER [FOLDER ...]                  with the triton in each of these folders, one process each
    ... --only skinny-w4 hopper                       configurations whose id holds one of these

Every configuration of scripts/aot/shipped.py is compiled for sm_80 and sm_90 and disassembled: registers, spills,
shared memory, widths of global loads, tensor-core instructions and instructions per weight of the hot loop, stores to
shared memory, registers that are touched while a wgmma may still use them (scripts/aot/hazard.py), and copies that a
wgmma may read too early (scripts/aot/ptx.py). Some are compiled for other GPUs too, which says that a compiler takes
them and no more.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "tests" / "kernels" / "aot_report.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is recorded")
    parser.add_argument("--write", action="store_true", help="record what is measured")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="of the ids of configurations")
    parser.add_argument("--triton", nargs="+", default=[], metavar="FOLDER", help="folders that hold a triton package")
    parser.add_argument("--list", action="store_true", help="print the ids and compile nothing")
    options = parser.parse_args()
    if options.triton:
        return max(with_triton(folder) for folder in options.triton)
    # interpreted kernels are no longer compiled, and triton reads this when it is imported
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT / "triton_kernels"))
    return run(options)


def with_triton(folder: str) -> int:
    """This very command line, with the triton in `folder`."""
    arguments = sys.argv[1:]
    start = arguments.index("--triton")
    end = next((i for i in range(start + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, *arguments[:start], *arguments[end:]]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode


def run(options: argparse.Namespace) -> int:
    from aot import shipped

    chosen = list(shipped.find(options.only))
    if not chosen:
        print(f"no configuration has any of {', '.join(options.only)} in its id; --list prints them")
        return 2
    if options.list:
        print(*(one.id for one in chosen), sep="\n")
        return 0

    import triton
    from aot import measure

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    everything = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    recorded = everything.get(triton.__version__, {})
    print(f"triton {triton.__version__}")
    if options.check and not recorded:
        print(f"nothing recorded for it in {RECORDED.name}: checking what needs no record")
    measured, failed = {}, 0
    for one in chosen:
        if version < one.since:
            continue
        record = measure.report(one, also=not options.check)
        measured[one.id] = record
        for target in one.targets:
            print(f"{one.id:<64} {target} {line(record[target])}", flush=True)
            if options.check:
                before = recorded.get(one.id, {}).get(target)
                wrong = measure.problems(one, record[target], target, before)
                if recorded and before is None:
                    wrong.append(f"not in {RECORDED.name}: look at the figures, then --write")
                failed += bool(wrong)
                for problem in wrong:
                    print(f"    PROBLEM {problem}")
        for target, answer in record.get("compiles", {}).items():
            print(f"{one.id:<64} {target} compiles: {answer}")
    if options.write:
        everything[triton.__version__] = (recorded if options.only else {}) | measured
        RECORDED.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")
    return 1 if failed else 0


def line(record: dict) -> str:
    tensor = " ".join(f"{name}x{number}" for name, number in record["tensor_core"].items()) or "-"
    loads = " ".join(f"{name}:{'/'.join(map(str, widths))}" for name, widths in record["load_bytes"].items())
    hazards = f"{len(record['hazards'])} of {record['register_wgmmas']}"
    return (
        f"instr/w {record['instructions_per_weight']} logic/w {record['logic_per_weight']} regs {record['registers']} "
        f"spills {record['spills']} shared {record['shared_bytes']} {tensor} sts {record['shared_stores']} "
        f"hazards {hazards} loads {loads}"
    )


if __name__ == "__main__":
    sys.exit(main())
