"""Are the kernels right on this GPU, and how fast beside what else runs here? See gpu_check.sh.

1. Ceilings of this very card: copying, and multiplying dense matrices.
2. Every kernel against float64, into outputs full of NaN, and 50 repeats that must be equal to the bit.
3. Times in CUDA graphs over rotating weights, of lowbit's kernels and of every peer in turn.
4. Whole models, where transformers is installed: gpu_end_to_end.py.

Writes gpu_check.json into --out. Exits with 1 if a result was wrong.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton
from gpu_peers import PEERS

from lowbit_kernels import gemm, gemm_hopper, launching, ops, reference, skinny
from lowbit_kernels.int8 import kernel as int8
from lowbit_kernels.int8.layout import Int8Layout
from lowbit_kernels.layout import Layout
from lowbit_kernels.tuning import select
from lowbit_kernels.tuning.timing import copies_for, microseconds
from lowbit_kernels.tuning.tune import packed as packed_as
from lowbit_kernels.tuning.tune import random_weight, seen

# Largest relative error: products are exact in float32, y is rounded once; beyond decoding, the scaled weight too
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
# (out_features, in_features) of the linears of Llama 3
SHAPES = {
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336),
    "70B qkv": (10240, 8192), "70B o": (8192, 8192), "70B gate_up": (57344, 8192), "70B down": (8192, 28672),
}  # fmt: skip
ROWS, FEW_ROWS = (1, 4, 16, 32, 64, 128, 512, 2048), (1, 4, 16)
# Processes that check at the same time: compiling is what takes long
PARTS = 8
TINY_SHAPES, TINY_ROWS = {"tiny": (64, 128)}, (1, 33)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"))
    parser.add_argument(
        "--seconds", type=float, default=440, help="what is not measured by then is left out, and named"
    )
    parser.add_argument("--tiny", action="store_true", help="a few small cases; also in triton's interpreter, on a CPU")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # one of PARTS, for main itself
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        print("no GPU here: --tiny with TRITON_INTERPRET=1 runs a few cases on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    started = time.perf_counter()
    if args.part is not None:
        (args.out / f"part-{args.part}.json").write_text(json.dumps(check_all(device, args.tiny, args.part)))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"facts": facts(device), "ceilings": ceilings(device)}
    print(json.dumps(result, indent=1), flush=True)
    result["correctness"] = check_in_parts(args.out, args.tiny, 0.5 * args.seconds)
    result["timings"], result["left_out"] = time_all(device, args.tiny, started + args.seconds)
    result["end_to_end"] = end_to_end(device, args.tiny)
    result["seconds"] = time.perf_counter() - started
    (args.out / "gpu_check.json").write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    wrong = [case for case in result["correctness"] if case["wrong"]]
    for case in wrong:
        print(f"WRONG {case['case']}: {case['wrong']}")
    print(
        f"{len(result['correctness'])} cases, {len(wrong)} wrong; {result['seconds']:.0f} s; {args.out}/gpu_check.json"
    )
    return 1 if wrong else 0


def end_to_end(device: torch.device, tiny: bool) -> dict:
    """What gpu_end_to_end.measure gives, or {"reason"}."""
    try:
        import gpu_end_to_end
    except ImportError as error:
        return {"reason": f"{error.name} is not installed"}
    try:
        return gpu_end_to_end.measure(device, tiny)
    except Exception as error:  # what was measured before is still to be written
        return {"reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def facts(device: torch.device) -> dict:
    def output(*command):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = output("git", "describe", "--always", "--dirty")
        clocks = output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,driver_version", "--format=csv")
    except FileNotFoundError:
        commit = clocks = None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": select.gpu_of(device).name,
        "commit": commit,
        "clocks": clocks,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def ceilings(device: torch.device) -> dict:
    """Bytes per second read and written by a copy, and operations per second of a bf16 product, at their best."""
    large = device.type == "cuda"
    source = torch.empty(2**30 if large else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us, _ = microseconds([lambda: target.copy_(source)] * 4, device)
    size = 8192 if large else 128
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product_us, _ = microseconds([lambda: a @ b] * 4, device)
    return {"copy_bytes_per_s": 2 * source.numel() / copy_us * 1e6, "bf16_flops": 2 * size**3 / product_us * 1e6}


def correctness_cases(tiny: bool, capability: tuple[int, int]):
    """(layout, rows, kernel, config): odd sizes, every width, group, symmetry and dtype, every kernel.

    capability: of the GPU.
    """
    most_warps = launching.most_warps(capability)
    shape = (72, 256) if tiny else (1000, 4096)
    for bits in (4,) if tiny else (4, 2, 3, 8):
        for group_size in (128,) if tiny else (128, 32, 64, 256, -1):
            for sym in (False,) if tiny else (True, False):
                for dtype in (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float16):
                    layout = Layout(bits, group_size, sym, dtype, *shape)
                    for rows in (1,) if tiny else (1, 7, 16, 17, 32):
                        for programs in (512, 16) if bits == 2 else (512,):  # few of two bits have long iterations
                            yield layout, rows, "skinny", skinny.default_config(layout, rows, programs, capability)
                    for rows in (33,) if tiny else (33, 129, 512):
                        yield layout, rows, "gemm", gemm.default_config(layout, rows, most_warps)
                        yield layout, rows, "dense", select.Dense(2**20)
                        if not tiny:
                            yield layout, rows, "hopper", gemm_hopper.Config()
    for bits in (4,) if tiny else (4, 8):
        for group_size in (128,) if tiny else (128, 64, 256, -1):
            for dtype in (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float16):
                layout = Int8Layout(bits, group_size, dtype, *shape)
                for rows in (33,) if tiny else (1, 7, 16, 33, 129, 512):
                    yield layout, rows, "int8", int8.default_config(layout, rows, most_warps=most_warps)


def check_in_parts(out: Path, tiny: bool, seconds: float) -> list[dict]:
    """What all parts found. One that crashes, or is not through in time, is a wrong result."""
    parts = range(1 if tiny else PARTS)
    command = [sys.executable, __file__, "--out", str(out), *(["--tiny"] if tiny else [])]
    running = [subprocess.Popen([*command, "--part", str(part)]) for part in parts]
    results, deadline = [], time.perf_counter() + seconds
    for part, process in zip(parts, running, strict=True):
        try:
            code = process.wait(max(1.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"not through after {seconds:.0f} s"
        path = out / f"part-{part}.json"
        if code == 0:
            results += json.loads(path.read_text())
        else:
            results.append({"case": f"part {part}", "wrong": f"ended with {code}"})
        path.unlink(missing_ok=True)
    return results


def check_all(device: torch.device, tiny: bool, part: int) -> list[dict]:
    """Every PARTS-th case."""
    results = []
    cases = list(correctness_cases(tiny, select.gpu_of(device).capability))
    for layout, rows, kernel, config in cases[part :: 1 if tiny else PARTS]:
        weight = random_weight(layout, device)
        packed = packed_as(weight, layout)
        x = torch.randn(rows, layout.in_features, device=device).to(layout.dtype)
        if kernel == "hopper" and gemm_hopper.refusal(layout, config, x):
            continue
        entry = {"case": f"{kernel} {select.key(layout, rows)} rows {rows}", "config": asdict(config), "wrong": None}
        try:
            entry["error"], entry["wrong"] = check(x, weight, packed, layout, select.Choice(kernel, config, ""))
        except Exception as error:  # a kernel that does not compile or launch is a result too
            entry["wrong"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        results.append(entry)
    return results


def check(x, weight, packed, layout: Layout, choice: select.Choice) -> tuple[float, str | None]:
    """(relative error, what is wrong or None)"""
    exact = seen(x, layout).double() @ reference.dequantize(*weight, layout.bits).double().T
    # what is not initialised is full of NaN: an element that is not written shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    first = ops.run(x, *packed, layout, None, choice)
    torch.use_deterministic_algorithms(False)
    error = float((first.double() - exact).norm() / exact.norm())
    allowed = ROUNDING[layout.dtype] * (1 if choice.kernel in ("skinny", "int8") else 2)
    if not error <= allowed:
        return error, f"relative error {error:.2e}, allowed {allowed:.2e}"
    for repeat in range(50 if x.is_cuda else 1):
        if not torch.equal(ops.run(x, *packed, layout, None, choice), first):
            return error, f"repeat {repeat} differs"
    return error, None


def variants(layout: Layout, rows: int, gpu: select.Gpu):
    """What lowbit could run: the choice of its tables or rule first, then what else might win."""
    chosen = select.choose(layout, rows, torch.device("cuda") if gpu.name != "interpreter" else torch.device("cpu"))
    yield chosen
    if chosen.kernel == "int8":
        return
    if rows > select.SKINNY_ROWS and gpu.capability == (9, 0):
        for config in (gemm_hopper.Config(64), gemm_hopper.Config(128), gemm_hopper.Config(256, 3)):
            if config.block_m <= 2 * rows:
                yield select.Choice("hopper", config, "variant")
    if rows >= 512:
        yield select.Choice("dense", select.Dense(), "variant")
    if rows <= select.SKINNY_ROWS and chosen.kernel == "skinny":
        for split in {max(1, chosen.config.split // 2), chosen.config.split * 2} - {chosen.config.split}:
            yield select.Choice("skinny", skinny.Config(**{**asdict(chosen.config), "split": split}), "variant")


def time_all(device: torch.device, tiny: bool, deadline: float) -> tuple[list[dict], list[str]]:
    shapes, rows_of, large = (TINY_SHAPES, TINY_ROWS, "tiny") if tiny else (SHAPES, ROWS, "8B gate_up")
    results, left_out = [], []
    cases = [(f"w4 {name}", Layout(4, 128, True, torch.bfloat16, *shape), rows_of) for name, shape in shapes.items()]
    for bits, some in () if tiny else ((8, rows_of), (3, FEW_ROWS), (2, FEW_ROWS)):
        cases.append((f"w{bits} {large}", Layout(bits, 128, True, torch.bfloat16, *shapes[large]), some))
    cases.append((f"w8a8 {large}", Int8Layout(8, -1, torch.bfloat16, *shapes[large]), (rows_of[-1] if tiny else 4096,)))
    for name, layout, rows_of in cases:
        if time.perf_counter() > deadline:
            left_out.append(name)
            continue
        results += time_shape(layout, name, rows_of, device, deadline)
    return results, left_out


def time_shape(layout: Layout, name: str, rows_of, device: torch.device, deadline: float) -> list[dict]:
    weight = random_weight(layout, device)
    packed = packed_as(weight, layout)
    stored = sum(part.nbytes for part in packed)
    weights = [packed, *(tuple(p.clone() for p in packed) for _ in range(copies_for(stored, device) - 1))]
    results, peers_of_shape = [], make_peers(weight, layout, device)
    for rows in rows_of:
        if time.perf_counter() > deadline:
            break
        x = torch.randn(rows, layout.in_features, device=device).to(layout.dtype)
        wanted = reference.linear(seen(x, layout), *weight, layout.bits)
        times = {}
        for choice in variants(layout, rows, select.gpu_of(device)):
            calls = [partial(ops.run, x, *pair, layout, None, choice) for pair in weights]
            label = f"{choice.kernel} {' '.join(f'{k}={v}' for k, v in asdict(choice.config).items())}"
            times[label] = measured(calls, x, wanted, 2e-2, device)
        peers = {}
        for peer, made in peers_of_shape.items():
            peers[peer] = {"reason": made} if isinstance(made, str) else (
                measured([partial(run, x) for run in made], x, wanted, PEERS[peer][1], device)
            )  # fmt: skip
        results.append({"shape": name, "out_features": layout.out_features, "in_features": layout.in_features,
                        "rows": rows, "bits": layout.bits, "stored_bytes": stored,
                        "lowbit": times, "peers": peers})  # fmt: skip
        print(line(results[-1]), flush=True)
    return results


def make_peers(weight, layout: Layout, device: torch.device) -> dict[str, list | str]:
    """peer -> functions of x, each with a copy of the weight of its own, or why it cannot run here."""
    made = {}
    for peer, (make, _) in PEERS.items():
        size = layout.out_features * layout.in_features * (2 if peer == "cublas" else layout.bits / 8)
        try:
            made[peer] = [make(*weight, layout) for _ in range(copies_for(int(size), device))]
        except Exception as error:  # not installed, or not for this layout
            made[peer] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return made


def measured(calls, x, wanted, largest: float | None, device: torch.device) -> dict:
    """{"us", "spread", "error"}, or {"reason"} if it failed or computed something else."""
    try:
        error = float((calls[0]().float() - wanted).norm() / wanted.norm())
        if largest is not None and not error <= largest:
            return {"reason": f"relative error {error:.2e}"}
        us, spread = microseconds(calls, device)
    except Exception as failure:  # another kernel's time is still worth having
        return {"reason": f"{type(failure).__name__}: {str(failure).strip()[:200]}"}
    return {"us": us, "spread": spread, "error": error}


def best(times: dict) -> tuple[str, float] | None:
    ran = {name: entry["us"] for name, entry in times.items() if "us" in entry}
    return min(ran.items(), key=lambda item: item[1]) if ran else None


def against_best_peer(entry: dict) -> float:
    """How many times faster lowbit's first choice is than the fastest peer; below 1 it loses."""
    mine, peer = next(iter(entry["lowbit"].values())), best(entry["peers"])
    return peer[1] / mine["us"] if "us" in mine and peer else 0.0


def line(entry: dict) -> str:
    name, mine = next(iter(entry["lowbit"].items()))
    variant, peer, dense = best(entry["lowbit"]), best(entry["peers"]), entry["peers"]["cublas"]
    if "us" not in mine:
        return f"{entry['shape']:16} {entry['rows']:5}  {mine['reason']}"
    rate = entry["stored_bytes"] / mine["us"] / 1e6
    over = f"{dense['us'] / mine['us']:6.2f}x" if "us" in dense else "     -"
    return (f"{entry['shape']:16} {entry['rows']:5} {mine['us']:9.1f} us {rate:6.2f} TB/s {over} cublas  "
            f"best peer {peer[0] if peer else '-'} {against_best_peer(entry):.2f}x  {name}"
            + (f"; {variant[0]} {variant[1]:.1f} us" if variant[0] != name else ""))  # fmt: skip


def show(result: dict) -> None:
    """One line for each row of the table, those that lose against a peer first."""
    copy, flops = result["ceilings"]["copy_bytes_per_s"] / 1e12, result["ceilings"]["bf16_flops"] / 1e12
    print(f"\n{result['facts']['device']}: copies {copy:.2f} TB/s, multiplies {flops:.0f} TFLOP/s in bf16")
    for entry in sorted(result["timings"], key=against_best_peer):
        print(line(entry))
    for name in result["left_out"]:
        print(f"left out, no time: {name}")
    whole = result["end_to_end"]
    if "reason" in whole:
        print(f"whole models not measured: {whole['reason']}")
    else:
        from gpu_end_to_end import lines

        print("\n".join(lines(whole)))


if __name__ == "__main__":
    sys.exit(main())
