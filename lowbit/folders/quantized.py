"""A quantized model folder, as conversions read it."""

import math
from collections import Counter
from pathlib import Path

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.decoded import DecodedTensor, decoded
from lowbit.discovery import Site, named_in_config
from lowbit.errors import InputError
from lowbit.folders.locate import resolve
from lowbit.folders.opened import OpenedFolder, is_for_others
from lowbit.numerics.scheme import Scheme


class QuantizedFolder(OpenedFolder):
    """A quantized folder, opened, to be written as another one. Floating-point encodings are decoded already.

    Raises InputError if there is nothing quantized in it, or something that the model has no place for: what is written
    of it could not be loaded.
    """

    def __init__(self, model: str | Path, revision: str | None = None, trust_remote_code: bool = False):
        super().__init__(resolve(model, revision), trust_remote_code, decoded)
        self.folder = self.path
        if not self.count:
            raise InputError(f"{self.folder} holds no quantized weights: expected a quantized model")
        self.require_known()

    @property
    def encoded(self) -> list[DecodedTensor]:
        """The weights that were stored in floating point of fewer bits."""
        return [info for info in self.reader.tensors.values() if isinstance(info, DecodedTensor)]

    @property
    def count(self) -> int:
        """How many weights are quantized."""
        return len(self.stored.weights) + len(self.encoded)

    @property
    def usual(self) -> Scheme:
        """The scheme of most weights in a format of lowbit."""
        return Counter(weight.scheme for weight in self.stored.weights.values()).most_common(1)[0][0]

    @property
    def parameters(self) -> int:
        """How many numbers the model has, those of quantized weights counted once."""
        quantized = sum(math.prod(w.shape) * max(w.experts, 1) for w in self.stored.weights.values())
        return quantized + sum(info.numel for info in self.kept)

    @property
    def format(self) -> str:
        """What they are stored in, for people."""
        return self.reader.method or f"{CheckpointReader(self.path).method} (floating point)"

    @property
    def kept(self) -> list[TensorInfo]:
        """The tensors that are not quantized and belong to the model, or are there for other programs by their name;
        all else beside them is left out."""
        left = self.harmless.keys() | {info.name for info in self.beside}
        return [info for info in self.stored.plain if info.name not in left]

    @property
    def beside(self) -> list[TensorInfo]:
        """Tensors of nobody that a run has copied: no folder but that with its report may hold them."""
        known = {name for name in self.for_others if is_for_others(self.model, name)}
        return [info for info in self.stored.plain if info.name in self.copied & self.for_others - known]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out, a line for each kind."""
        counts = Counter(self.harmless.values())
        if self.beside:
            counts["no module of the model"] = len(self.beside)
        return tuple(f"left out: {count} tensors of {meaning}" for meaning, count in counts.items())

    def site(self, name: str) -> Site | None:
        """Of the tensor set `name`."""
        found = self.sites.get(self.names.locate(f"{name}.weight")[0])
        return found or self.sites.get(self.names.locate(name)[0])

    def is_stored_transposed(self, site: Site, name: str) -> bool:
        """Whether transformers expects the matrices of the tensor `name` as [in_features, out_features]."""
        in_memory = tuple(self.names.state[site.parameter].shape)
        return site.transposed != self.names.transposes(name, in_memory)

    def in_config(self, default: Scheme) -> tuple[dict[str, Scheme], list[str]]:
        """What a config of this model has to name."""
        weights = {base: w for base, w in self.stored.weights.items() if base not in self.for_others}
        schemes = {site.parameter: w.scheme for base, w in weights.items() if (site := self.site(base))}
        tensors = [(base if w.experts else f"{base}.weight", 2) for base, w in weights.items()]
        tensors += [(info.name, len(info.shape)) for info in self.kept]
        exceptions, ignored = named_in_config(self.model, self.names, self.sites, schemes, tensors, default)
        others = {base: self.stored.weights[base].scheme for base in self.for_others & self.stored.weights.keys()}
        return exceptions | {base: scheme for base, scheme in others.items() if scheme != default}, ignored
