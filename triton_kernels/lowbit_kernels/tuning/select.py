# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs y = x @ W^T and with which configuration: an exact entry of a table, else a rule.

Tables are JSON files, one per GPU: those shipped in tuned/, and the user's own in the platform's cache folder, which
`tune.py` writes and which win. A table is never made by running a model: what is not in one follows the rule.
"""

import json
import logging
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
import triton

from lowbit_kernels import gemm, gemm_hopper, launching, skinny
from lowbit_kernels.int8 import kernel as int8
from lowbit_kernels.int8.layout import Int8Layout
from lowbit_kernels.layout import Layout

logger = logging.getLogger("lowbit_kernels")

# Rows are rounded up to one of these; beyond the last nothing changes any more
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Up to so many rows reading the weight takes longer than multiplying; from so many on, a dense copy pays for itself
SKINNY_ROWS, DENSE_ROWS = 32, 4096
# Folder of the user's tables, instead of the platform's cache folder
TABLES_VARIABLE = "LOWBIT_KERNELS_TABLES"


@dataclass(frozen=True)
class Dense:
    """Decode as many rows of the weight at a time as stay in the L2 cache, and multiply by the vendor's library.

    chunk: bytes of such a piece.
    """

    chunk: int = 16 * 2**20


CONFIGS = {
    "skinny": skinny.Config, "gemm": gemm.Config, "hopper": gemm_hopper.Config, "dense": Dense, "int8": int8.Config
}  # fmt: skip
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Choice:
    """kernel: a name in CONFIGS, config: of its class, reason: where this comes from."""

    kernel: str
    config: object
    reason: str


@dataclass(frozen=True)
class Gpu:
    """name as the driver has it; capability (9, 0) is Hopper; processors: streaming multiprocessors."""

    name: str
    capability: tuple[int, int]
    processors: int

    @property
    def slug(self) -> str:
        """What its table is called: "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu("interpreter", (8, 0), 4)
    facts = torch.cuda.get_device_properties(device)
    return Gpu(facts.name, (facts.major, facts.minor), facts.multi_processor_count)


def bucket(rows: int) -> int:
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


def key(layout: Layout | Int8Layout, rows: int) -> str:
    """What a table calls this case: "w4 g128 sym bf16 4096x14336 m16", out_features x in_features, rows; "w4a8 ..."
    where rows are quantized."""
    group = "row" if layout.groups == 1 else layout.group_size
    inputs = "a8" if isinstance(layout, Int8Layout) else ""
    symmetry = "sym" if layout.sym else "asym"
    shape = f"{layout.out_features}x{layout.in_features}"
    return f"w{layout.bits}{inputs} g{group} {symmetry} {_DTYPES[layout.dtype]} {shape} m{bucket(rows)}"


def choose(layout: Layout | Int8Layout, rows: int, device: torch.device) -> Choice:
    """The choice for x [rows, in_features] on `device`."""
    return _choose(layout, bucket(rows), device)


@lru_cache(maxsize=4096)
def _choose(layout: Layout, rows: int, device: torch.device) -> Choice:
    gpu = gpu_of(device)
    choice = _from_tables(layout, rows, gpu) or Choice(*rule(layout, rows, gpu), "by rule")
    _log(layout, rows, gpu, choice)
    return choice


def choose_for_experts(layout: Layout, rows: int, experts: int, device: torch.device) -> Choice:
    """The choice for x [rows, in_features] sorted by expert, `layout` that of one: always the decode kernel, which
    alone knows experts, for the rows that one has on average. More of them are several tiles."""
    return _choose_for_experts(layout, bucket(-(-rows // experts)), device)


@lru_cache(maxsize=4096)
def _choose_for_experts(layout: Layout, rows: int, device: torch.device) -> Choice:
    gpu = gpu_of(device)
    config = skinny.default_config(layout, rows, 4 * gpu.processors, gpu.capability)
    choice = Choice("skinny", config, "by rule for experts")
    _log(layout, rows, gpu, choice)
    return choice


def _log(layout: Layout, rows: int, gpu: Gpu, choice: Choice) -> None:
    logger.debug("%s on %s: %s %s, %s", key(layout, rows), gpu.name, choice.kernel, choice.config, choice.reason)


# (kernel, GPU) that a trial found wrong there: no rule chooses it any more
_distrusted: set[tuple[str, Gpu]] = set()


def distrust(kernel: str, gpu: Gpu) -> None:
    """Let no rule choose a kernel on this GPU, as a trial found it wrong there."""
    _distrusted.add((kernel, gpu))
    _choose.cache_clear()


def rule(layout: Layout | Int8Layout, rows: int, gpu: Gpu, without: tuple[str, ...] = ()) -> tuple[str, object]:
    """(kernel, config) where no table says anything. A start that nobody has measured yet.

    without: kernels that cannot run this x.
    """
    most_warps = launching.most_warps(gpu.capability)
    if isinstance(layout, Int8Layout):
        return "int8", int8.default_config(layout, rows, programs=4 * gpu.processors, most_warps=most_warps)
    if rows <= SKINNY_ROWS:
        return "skinny", skinny.default_config(layout, rows, 4 * gpu.processors, gpu.capability)
    if rows >= DENSE_ROWS:
        return "dense", Dense()
    if gpu.capability == (9, 0) and "hopper" not in without and ("hopper", gpu) not in _distrusted:
        config = gemm_hopper.default_config(layout, rows, programs=gpu.processors)
        if gemm_hopper.layout_refusal(layout, config) is None:
            return "hopper", config
    return "gemm", gemm.default_config(layout, rows, most_warps)


def refuse(config: object, gpu: Gpu) -> str | None:
    """Why a table's entry is not to be used, or None: it may have been made with another triton."""
    if isinstance(config, gemm.Config) and config.joined > 1 and not launching.JOINABLE:
        return f"triton {triton.__version__} miscompiles joined slices (triton issue 9433)"
    # the Hopper kernel has none: its x comes by TMA, which needs no fence
    if getattr(config, "warps", 1) > launching.most_warps(gpu.capability):
        return launching.compiler_limit(gpu.capability)
    return None


def _from_tables(layout: Layout, rows: int, gpu: Gpu) -> Choice | None:
    entry = table(gpu).get(key(layout, rows))
    if entry is None:
        return None
    try:
        config = CONFIGS[entry["kernel"]](**entry["config"])
        reason = refuse(config, gpu)
    except (KeyError, TypeError, ValueError) as error:  # of another version of this package
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        logger.info("the table entry for %s is passed over: %s", key(layout, rows), reason)
        return None
    return Choice(entry["kernel"], config, entry["from"])


@cache
def table(gpu: Gpu) -> dict[str, dict]:
    """key -> {"kernel", "config", "us", "from"} of all tables."""
    entries: dict[str, dict] = {}
    for origin, path in tables(gpu).items():
        entries |= {k: entry | {"from": origin} for k, entry in read_table(path).items()}
    return entries


def tables(gpu: Gpu) -> dict[str, Path]:
    """Where an entry comes from -> the file, which need not exist. The later one wins."""
    return {"shipped table": shipped_table(gpu), "tuned here": user_table(gpu)}


def shipped_table(gpu: Gpu) -> Path:
    return Path(__file__).parents[1] / "tuned" / f"{gpu.slug}.json"


def user_table(gpu: Gpu) -> Path:
    """Where `tune.py` writes: the folder that LOWBIT_KERNELS_TABLES names, or the platform's cache folder."""
    if os.environ.get(TABLES_VARIABLE):
        return Path(os.environ[TABLES_VARIABLE]) / f"{gpu.slug}.json"
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "lowbit_kernels" / f"{gpu.slug}.json"


def read_table(path: Path) -> dict[str, dict]:
    """key -> {"kernel", "config", "us"}; empty if there is no such file. A damaged one is reported and passed over."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise TypeError("entries are not objects")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("cannot read the kernel table %s (%s): delete it, or tune again", path, error)
        return {}
    return entries


def write_table(path: Path, gpu: Gpu, choices: dict[str, tuple[str, object, float]]) -> None:
    """Add key -> (kernel, config, microseconds) to the table at `path`, which is replaced at once."""
    entries = read_table(path) | {
        k: {"kernel": kernel, "config": asdict(config), "us": round(us, 2)}
        for k, (kernel, config, us) in choices.items()
    }
    text = json.dumps(
        {"device": gpu.name, "triton": triton.__version__, "entries": dict(sorted(entries.items()))}, indent=1
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tuned-") as folder:  # nobody knows its name beforehand
        made = Path(folder) / path.name
        made.write_text(text + "\n", encoding="utf-8")
        made.replace(path)
    forget()


def forget() -> None:
    """Read the tables anew: they, or the variable that names their folder, have changed."""
    table.cache_clear()
    _choose.cache_clear()
