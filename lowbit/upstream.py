"""Names of other packages that their documentation does not promise: any release may take them away.

`transformers_api` and `torch_api` list those that lowbit uses, and nothing else may spell them (tests/test_layers.py).
A name is looked up when it is used, so that a release without it costs only what needs it, and says so in one line.
"""

import importlib
from dataclasses import dataclass
from importlib.metadata import version

from lowbit.errors import LowbitError


class MissingNameError(LowbitError):
    """The installed release of another package lacks a name that lowbit uses."""


@dataclass(frozen=True)
class UpstreamName:
    """One undocumented name.

    path: "package.module:name" of what is imported, "package.Class.name" of an attribute of its instances.
    purpose: what it is needed for, completing "lowbit needs it to ...".
    tested: the releases of the package that have it.
    """

    path: str
    purpose: str
    tested: str

    def imported(self):
        """What the name stands for. Raises MissingNameError."""
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise self.missing() from None

    def of(self, owner: object):
        """The attribute of this name. Raises MissingNameError."""
        name = self.path.rpartition(".")[2]
        try:
            return getattr(owner, name)
        except AttributeError:
            raise self.missing() from None

    def missing(self) -> MissingNameError:
        package = self.path.partition(".")[0]
        return MissingNameError(
            f"{package} {version(package)} has no {self.path.replace(':', '.')}, which lowbit needs to {self.purpose}: "
            f"install a release of {package} that lowbit was tested with ({self.tested})"
        )
