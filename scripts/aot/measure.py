"""Compile a kernel for a target and put what its machine code says into a few numbers."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aot import hazard, ptx, sass
from aot.shipped import Call, Shipped, call

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
SHARED_LIMIT = {
    "sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB,
    "sm_120": 99 * KIB, "gfx942": 64 * KIB,
}  # fmt: skip
SLACK = 1.1  # instructions per weight may grow by this before --check fails
# HMMA.16816, IMMA.16832: 16 rows of W, 8 of x; HGMMA.64x128x16: 64 and 128, over the threads of four warps
WARP_SHAPE = re.compile(r"^[HI]MMA\.16(8)(\d+)")
GROUP_SHAPE = re.compile(r"^[HIQ]GMMA\.64x(\d+)x(\d+)")


def compiled(call: Call, target: str):
    names = [*call.function.arg_names]
    types = {name: call.types.get(name, "constexpr").partition(":")[0] for name in names}
    multiples = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in call.types.items()
        if kind.endswith(":16") or (kind.startswith("*") and not kind.endswith(":1"))
    }
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", target, 64)
    constants = call.constants | ({"PTX": nvidia} if "PTX" in names else {})
    source = ASTSource
    if call.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return triton.compile(source(call.function, types, constants, multiples), target=gpu, options=call.options)


def tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([BIN / name, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def weights_per_thread(code: list[sass.Instruction], block_m: int) -> float:
    """Weights that the tensor-core instructions of `code` use up, per thread: each is multiplied by block_m rows."""
    products = 0.0
    for instruction in code:
        if found := WARP_SHAPE.match(instruction.op):
            products += 16 * 8 * int(found.group(2)) / 32
        elif found := GROUP_SHAPE.match(instruction.op):
            products += 64 * int(found.group(1)) * int(found.group(2)) / 128
    return products / block_m


def measure(call: Call, target: str, bits: int, block_m: int) -> dict[str, Any]:
    result = compiled(call, target)
    program = sass.parse(tool("nvdisasm", "-c", cubin=result.asm["cubin"]))
    usage = tool("cuobjdump", "-res-usage", cubin=result.asm["cubin"])
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loop = program.hot_loop()
    weights = weights_per_thread(loop, block_m) if block_m else 0
    return {
        "registers": numbers["REG"],
        "local_bytes": numbers["STACK"] + numbers["LOCAL"],
        "spills": sass.count(program.code, "LDL", "STL"),
        "loop_spills": sass.count(loop, "LDL", "STL"),
        "shared_bytes": result.metadata.shared,
        "tensor_core": dict(Counter(i.op.split(".")[0] for i in loop if i.op.startswith(sass.TENSOR_CORE))),
        "load_bytes": ptx.load_widths(result.asm["ptx"], call.pointers),
        "shared_stores": sass.count(loop, "STS"),
        "shared_store_bytes": sass.moved(loop, "STS"),
        "weight_bytes": weights * bits / 8,
        "instructions_per_weight": round(len(loop) / weights, 3) if weights else None,
        "logic_per_weight": round(sass.count(loop, *sass.LOGIC) / weights, 3) if weights else None,
        "register_wgmmas": len(hazard.register_wgmmas(program)),
        "hazards": [f"{h.victim} {h.what} of {h.wgmma}" for h in hazard.check(program)],
        "early_arrivals": hazard.early_arrivals(program),
        "unfenced_copies": ptx.unfenced_copies(result.asm["ptx"]),
    }


def compiles(call: Call, target: str, multiplies: bool) -> str:
    """ "yes", or why not, in a few words. What runs on AMD but would be slow is no either."""
    try:
        result = compiled(call, target)
    except Exception as error:  # whatever a compiler throws is the answer
        return (str(error).strip().splitlines() or [type(error).__name__])[-1][:120]
    if result.metadata.shared > SHARED_LIMIT[target]:
        return f"needs {result.metadata.shared} bytes of shared memory, has {SHARED_LIMIT[target]}"
    if "amdgcn" in result.asm:
        if multiplies and "v_mfma" not in result.asm["amdgcn"]:
            return "without matrix instructions"
        if spills := int(re.search(r"\.vgpr_spill_count:\s+(\d+)", result.asm["amdgcn"]).group(1)):
            return f"spills {spills} registers"
    return "yes"


def report(shipped: Shipped, also: bool = False) -> dict[str, Any]:
    made = call(shipped)
    record = {target: measure(made, target, shipped.bits, shipped.block_m) for target in shipped.targets}
    if also and shipped.also:
        record["compiles"] = {target: compiles(made, target, shipped.multiplies) for target in shipped.also}
    return record


def problems(shipped: Shipped, record: dict[str, Any], target: str, before: dict[str, Any] | None) -> list[str]:
    """What is wrong with a measured kernel. before: what was recorded of it, if anything."""
    found = []
    # a value that is put aside around the loop costs nothing; it is recorded, and there may not be more of them
    if record["loop_spills"] or record["spills"] > (before["spills"] if before else 0):
        found.append(f"spills: {record['loop_spills']} loads and stores in the hot loop, {record['spills']} in all")
    if record["shared_bytes"] > SHARED_LIMIT[target]:
        found.append(f"{record['shared_bytes']} bytes of shared memory, {target} has {SHARED_LIMIT[target]}")
    if shipped.multiplies and not record["tensor_core"]:
        found.append("no tensor-core instruction in the hot loop")
    if (widths := record["load_bytes"].get("weight", [16])) != [16]:
        found.append(f"loads {widths} bytes of weight at a time, expected 16")
    if record["weight_bytes"] and record["shared_store_bytes"] >= record["weight_bytes"] / 2:
        found.append(
            f"stores {record['shared_store_bytes']} bytes to shared memory for {record['weight_bytes']:g} of weights: "
            "do weights take that way?"
        )
    found += [f"hazard: {hazard}" for hazard in record["hazards"]]
    if record["unfenced_copies"]:
        found.append("cp.async feeds wgmma without fence.proxy.async: the tensor cores may read old x")
    found += [f"arrives before all warps are through: {arrival}" for arrival in record["early_arrivals"]]
    now, then = record["instructions_per_weight"], before and before["instructions_per_weight"]
    if now and then and now > SLACK * then:
        found.append(f"{now} instructions per weight, recorded {then}")
    return found
