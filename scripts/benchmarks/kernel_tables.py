"""Tables of what executed the kernels' machine code: results of scripts/kernel_execution.py and kernel_mutations.py."""

from rendering import markdown, measured, result

NAMES = {"drawn": "drawn shapes, all kernels", "decode": "decode loop, all operators", "tests": "tests/kernels"}


def kernel_execution() -> str:
    """A row for each kernel and GPU, a column for each triton."""
    if not measured("kernel_execution"):
        return "Not yet executed: `python scripts/kernel_execution.py --write` does it."
    records = result("kernel_execution")
    newest = next(iter(records))
    places = {
        version: {(row["kernel"], row["gpu"]): row for row in record["rows"]} for version, record in records.items()
    }
    rows = []
    for place, row in places[newest].items():
        cells = [f"{row['runs']} tests", "-", "-", "-"]
        if "configurations" in row:
            cells = [
                f"{row['configurations']} in {row['runs']} runs", f"{row['instructions'] / 1e6:.1f}",
                f"{100 * row['covered']:.0f} %", f"{row['worst']:.2f}",
            ]  # fmt: skip
        elif "launches" in row:
            executed = f"{row['operators']} operators in {row['launches']} launches"
            cells = [executed, f"{row['instructions'] / 1e6:.1f}", "-", "equal to the bit"]
        name = NAMES.get(row["kernel"]) or f"`{row['kernel']}`"
        rows.append([f"{name}, {row['gpu']}", *cells, *(_verdict(of.get(place)) for of in places.values())])
    header = [
        "kernel and GPU",
        "executed",
        "million instructions",
        "covered, at least",
        "largest error / allowed",
    ]
    header += [f"triton {version}" for version in records]
    faults = {fault for record in records.values() for row in record["rows"] for fault in row.get("faults", ())}
    notes = "\n\nKnown faults of a triton: " + "; ".join(sorted(faults)) + "." if faults else ""
    record = records[newest]
    return markdown(header, rows) + (
        f"{notes}\n\n{record['date']}, torch {record['torch']}, numpy {record['numpy']}; allowed are one rounding to "
        "the dtype of y and float32 sums; `python scripts/kernel_execution.py --write`"
    )


def _verdict(row: dict | None) -> str:
    if row is None:
        return "not run"
    if row["unknown"]:
        return f"{row['unknown']} wrong"
    if row.get("known"):
        return f"known fault in {row['known']} of {row['configurations']}"
    return "right"


def kernel_mutations() -> str:
    """What of damaged PTX the machine noticed."""
    if not measured("kernel_mutations"):
        return "Not yet damaged: `python scripts/kernel_mutations.py --write` does it."
    data = result("kernel_mutations")
    rows = [
        [f"`{row['configuration']}`, {row['gpu']}", f"{row['noticed']} of {row['synchronisation']}",
         str(row["equivalent"]), f"{row['other_noticed']} of {row['other']}"]
        for row in data["rows"]
    ]  # fmt: skip
    header = [
        "damaged in one place",
        "synchronisation: noticed",
        "of it listed: no change",
        "the rest: noticed",
    ]
    return (
        markdown(header, rows)
        + _sources(data.get("sources"))
        + (f"\n\n{data['date']}, triton {data['triton']}; `python scripts/kernel_mutations.py --write`")
    )


def _sources(data: dict | None) -> str:
    """The same of damaged sources, by file."""
    if data is None:
        return ""
    rows = [
        [f"`{row['file']}`", f"{row['synchronisation_noticed']} of {row['synchronisation']}", str(row["equivalent"]),
         f"{row['other_noticed']} of {row['other']}"]
        for row in data["rows"]
    ]  # fmt: skip
    header = ["source damaged in one place", "synchronisation: noticed", "listed: no change", "the rest: noticed"]
    return "\n\n" + markdown(header, rows)


_KINDS = ("integer", "float", "tensor core", "global memory", "shared memory")


def kernel_counts() -> str:
    """For each weight: instructions of PTX, and how well memory is used."""
    if not measured("kernel_counts"):
        return "Not yet counted: `python scripts/kernel_counts.py --write` does it."
    data = result("kernel_counts")
    rows = []
    for row in data["rows"]:
        inputs = [name for name in ("weight", "x", "meta", "scales") if name in row["sectors"]]
        repeats = [f"{name} {row['repeats'][name]:.1f}x" for name in inputs if name != "x"]
        rows.append(
            [f"`{row['configuration']}`", str(row["rows"]),
             *(f"{row['instructions'].get(kind, 0):.2f}" for kind in _KINDS), f"{row['wavefronts']:.2f}",
             f"{max(row['sectors'][name] for name in inputs):.2f}", ", ".join(repeats)]
        )  # fmt: skip
    header = ["configuration", "rows", *_KINDS, "wavefronts / fewest", "sectors / needed", "each word loaded"]
    return markdown(header, rows) + (
        f"\n\n{data['date']}, triton {data['triton']}, sm_90, {data['inputs']} inputs; PTX instructions of threads for "
        "each weight of a row tile, without moves, branches and waits, most of which ptxas takes away; "
        "`python scripts/kernel_counts.py --write`"
    )
