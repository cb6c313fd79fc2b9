"""What was measured for an allocation, kept: another budget for the same model takes seconds.

One JSON file for each model, data and method, in the cache folder. A file that is damaged, or not of this user alone,
is as good as none: everything is measured again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.errors import InputError
from lowbit.guards.reading import read_json
from lowbit.guards.records import record
from lowbit.guards.safe_files import distrust, make_private, write_whole
from lowbit.numerics.scheme import Scheme
from lowbit.system.cache import cache_root

logger = logging.getLogger("lowbit")


@dataclass
class Measured:
    """costs: module -> name of a scheme -> nats per token. divergences: key of an allocation (`key_of`) -> its
    KL and the standard error of that."""

    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    divergences: dict[str, list[float]] = field(default_factory=dict)


def key_of(schemes: Mapping[str, Scheme]) -> str:
    """A name for what is quantized to what."""
    return _digest(sorted((module, scheme.name) for module, scheme in schemes.items()))


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """What is known of one model: `measured`, read when it is made.

    Args:
        identity: All that the figures depend on, as JSON has it.
    """

    def __init__(self, identity: object):
        folder = Path(os.path.abspath(cache_root() / "allocation"))
        self._file = folder / f"{_digest(identity)}.json"
        self.measured = Measured()
        make_private(folder)
        if self._file.exists() and not distrust(folder) and not distrust(self._file):
            try:
                self.measured = record(Measured, read_json(self._file), str(self._file))
            except InputError as error:
                logger.warning("what was measured before is measured again: %s", error)

    def save(self) -> None:
        """Keep what is known now. A cache that cannot be written is none: nothing but time is lost."""
        try:
            write_whole(self._file, json.dumps(asdict(self.measured)))
        except OSError as error:
            logger.warning("%s cannot be written, and will be measured again: %s", self._file, error.strerror or error)
