"""Which argument each global load of a kernel reads, and how many bytes at a time: from the PTX, where addresses still
lead back to the parameter they were computed from (in SASS they do not)."""

import re
from collections import defaultdict

POINTER = re.compile(r"\.param \.u64 \.ptr\s.*?\b(\w+_param_\d+)")
PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[(\w+)")
LOAD = re.compile(r"ld\.global(?P<options>[\w.:]*)\s+\{?(?P<registers>[^}\[]*)\}?,\s*\[\s*(?P<address>%\w+)")
COPY = re.compile(
    r"cp\.async\.\w+\.shared\.global[\w.:]*\s+\[[^\]]*\],\s*\[\s*(?P<address>%\w+)[^\]]*\],\s*(?P<bytes>\w+)"
)
MOVES = re.compile(r"^\s*(?:@!?%\w+ )?[\w.]+\s+(?P<to>%\w+),\s*(?P<operands>%[^\[\]{}]*);")
REGISTER = re.compile(r"%\w+")
TYPE_BYTES = re.compile(r"\.[busf](\d+)$")


def unfenced_copies(ptx: str) -> bool:
    """Does cp.async feed wgmma without fence.proxy.async? The copies write shared memory through the generic proxy, and
    the tensor cores, which read it through the asynchronous one, may then see what was there before (PTX ISA 8.6)."""
    return bool(COPY.search(ptx)) and "wgmma.mma_async" in ptx and "fence.proxy.async" not in ptx


def load_widths(ptx: str, pointers: list[str]) -> dict[str, list[int]]:
    """Bytes a lane moves per load, by the name of the argument; `pointers` are the pointer arguments in order. A load
    whose address cannot be followed (warp-specialised workers get theirs through shared memory) is under `?`."""
    parameters = dict(zip(POINTER.findall(ptx), pointers, strict=False))  # Triton appends scratch pointers of its own
    holds = {register: parameters[name] for register, name in PARAMETER.findall(ptx) if name in parameters}
    made_from = defaultdict(set)
    for line in ptx.splitlines():
        if found := MOVES.match(line):
            made_from[found["to"]].update(REGISTER.findall(found["operands"]))

    def sources(address: str) -> set[str]:
        names, seen, open_ = set(), {address}, [address]
        while open_:
            register = open_.pop()
            if register in holds:
                names.add(holds[register])
            open_ += made_from[register] - seen
            seen |= made_from[register]
        return names

    widths = defaultdict(set)
    for line in ptx.splitlines():
        if found := LOAD.search(line):
            size = int(TYPE_BYTES.search(found["options"]).group(1)) // 8 * len(REGISTER.findall(found["registers"]))
        elif found := COPY.search(line):
            size = int(found["bytes"], 0)
        else:
            continue
        for name in sources(found["address"]) or {"?"}:
            widths[name].add(size)
    return {name: sorted(sizes) for name, sizes in sorted(widths.items())}
