"""Tables of what a GPU should take, from what the machine executed: results of scripts/kernel_counts.py."""

from rendering import markdown, measured, result

# Bytes per second that a copy reads and writes, as seen on such cards; both multiply bf16 at about this rate, and issue
# instructions for so many lanes per second
COPIES = {"H100": 3.0e12, "H200": 4.3e12}
FLOPS, LANES = 790e12, 132 * 128 * 1.755e9
INTEGER_LANES = LANES / 2  # of the pipe that shifts and masks
# Part of those that a good kernel reaches
REACHED = 0.85
LINEARS = {
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336),
    "70B qkv": (10240, 8192), "70B o": (8192, 8192), "70B gate_up": (57344, 8192), "70B down": (8192, 28672),
}  # fmt: skip
PREDICTED = {1: "skinny-w4-g128-sym-bf16-m8-n64", 64: "gemm-w4-g128-sym-bf16-m64", 128: "gemm-w4-g128-sym-bf16-m128"}
# Start of an id, rows of x
BUDGETS = (
    ("skinny-w4-g128-sym-bf16-m8", 1), ("skinny-w4-g128-asym-bf16-m8", 1), ("skinny-w4-g128-sym-bf16-m16", 16),
    ("skinny-w3-g128-sym-bf16-m8", 1), ("skinny-w3-g128-asym-bf16-m8", 1), ("skinny-w3-g128-sym-bf16-m16", 16),
    ("skinny-w3-g128-sym-bf16-m32", 32),
    ("skinny-w2-g128-sym-bf16-m8", 1), ("skinny-w2-g128-asym-bf16-m8", 1), ("skinny-w2-g128-sym-bf16-m16", 16),
    ("skinny-w2-g64-sym-bf16-m8", 1), ("skinny-w2-g64-sym-bf16-m16", 16), ("skinny-w2-g64-asym-bf16-m16", 16),
)  # fmt: skip
NOT_COUNTED = "Not yet counted: `python scripts/kernel_counts.py --write` does it."


def counted(start: str, rows: int) -> dict:
    return next(
        row for row in result("kernel_counts")["rows"]
        if row["configuration"].startswith(start) and row["rows"] == rows
    )  # fmt: skip


def predicted(n: int, k: int, rows: int, bits: float, instructions: float, copies: float) -> str:
    """Microseconds of a weight [n, k] of so many stored bits and instructions per weight, and over ideal bf16."""
    weights, activations = n * k, n + k
    multiplying = 2 * rows * weights / FLOPS
    reading = (weights * bits / 8 + 2 * rows * activations) / copies
    ours = max(max(reading, multiplying) / REACHED, weights * instructions / LANES)
    dense = max((2 * weights + 2 * rows * activations) / copies, multiplying)
    return f"{ours * 1e6:.1f} ({dense / ours:.1f}x)"


def gpu_predictions() -> str:
    """W4, groups of 128: the slowest of moving bytes, multiplying, and issuing instructions, as they were executed."""
    if not measured("kernel_counts"):
        return NOT_COUNTED
    found = {rows: counted(start, rows) for rows, start in PREDICTED.items()}
    rows = [
        [f"{name} {n}x{k}", *(predicted(n, k, m, row["bits"], row["issued"], copies)
                              for copies in COPIES.values() for m, row in found.items())]
        for name, (n, k) in LINEARS.items()
    ]  # fmt: skip
    columns = [f"{gpu}, {m} row{'s' * (m > 1)}" for gpu in COPIES for m in found]
    return markdown(["**predicted** us (over ideal bf16)", *columns], rows)


def issue_budget() -> str:
    """What the loop of few rows issues for a weight, and what an H200 can while it reads one at full bandwidth."""
    if not measured("kernel_counts"):
        return NOT_COUNTED
    n, k = LINEARS["8B gate_up"]
    rows = []
    for start, m in BUDGETS:
        row, shares = counted(start, m), []
        for count, lanes in (("loop", LANES), ("loop_integer", INTEGER_LANES)):
            most = row["bits"] / 8 / COPIES["H200"] * lanes
            shares.append(f"{row[count]:.2f} of {most:.2f}: {100 * row[count] / most:.0f} %")
        _, bits, group, sym, *_ = start.split("-")
        time = predicted(n, k, m, row["bits"], row["issued"], COPIES["H200"])
        rows.append(
            [f"{bits.upper()} {group} {sym}", "1 to 8" if m == 1 else str(m), *shares, f"{row['issued']:.2f}", time]
        )
    header = ["weight", "rows", "instructions of the loop", "shifts and masks", "with start and end"]
    return markdown([*header, f"**predicted** us, 8B gate_up {n}x{k} (over ideal bf16)"], rows)
