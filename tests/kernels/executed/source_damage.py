"""Damage to sources, read from source_damage.toml."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

_FOUND = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


@dataclass(frozen=True)
class Damage:
    """configuration: start of an id of scripts/aot/shipped.py. synchronisation: of threads, or with the next launch.
    equivalent: why nothing changes. noticed: of the decode loop, part of what it says."""

    name: str
    file: str
    before: str
    after: str
    configuration: str = ""
    gpu: str = "sm_90"
    synchronisation: bool = False
    equivalent: str | None = None
    noticed: str | None = None


DAMAGE = tuple(Damage(**entry) for entry in _FOUND["damage"])
DECODE_FAULTS = {entry["name"]: Damage(**entry) for entry in _FOUND["decode"]}
