"""A model folder, opened once: its tensors, the skeleton of the model they belong to, and which belongs to which.

Whatever asks what a folder holds asks here, so that no two parts of lowbit can answer differently.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.decoded import decoded
from lowbit.checkpoint.extras import judge
from lowbit.checkpoint.report_file import copied_tensors
from lowbit.discovery import CheckpointNames, find_sites, known_as, skeleton
from lowbit.errors import InputError
from lowbit.folders.locate import load_config
from lowbit.folders.stored import StoredWeights
from lowbit.transformers_api import ignored_if_unexpected

# Layers that predict further tokens, by the names of DeepSeek, Qwen, GLM, MiMo and others
_FURTHER = re.compile(r"(^|\.)(mtp|nextn)\w*\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class OpenedFolder:
    """A model folder and the model in it.

    Attributes:
        path: The folder.
        reader, stored: Its tensors, and which of them are quantized weights.
        config, model: The transformers config, and the model that it describes on the meta device.
        names, sites: What tensors are called in the model, and all matrices of it.

    Args:
        path: The folder.
        trust_remote_code: Whether code that comes with the model may run.
        read: What is to be seen of the folder: all that is stored, or what `decoded` makes of it.

    Raises:
        InputError: The folder cannot be read, or its config describes no model that can be built.
    """

    def __init__(
        self,
        path: Path,
        trust_remote_code: bool = False,
        read: Callable[[CheckpointReader], CheckpointReader] = lambda reader: reader,
    ):
        self.path = path
        self.reader = read(CheckpointReader(path))
        self.config = load_config(path, trust_remote_code, self.reader.tensors.values())
        self.model = skeleton(self.config, trust_remote_code, tensors=self.reader.tensors.values())
        self.names, self.sites = CheckpointNames(self.model), find_sites(self.model)
        self.stored = StoredWeights(self.reader, known_as(self.names, self.sites))

    @property
    def state(self) -> dict:
        """The parameters of the model by name."""
        return self.names.state

    def parameter_of(self, name: str) -> str:
        """The parameter that a stored tensor, or the base of a quantized weight, belongs to."""
        return self.parameters_of(name)[0]

    def parameters_of(self, name: str) -> list[str]:
        """All parameters that are made of it: several, if it is split while loading."""
        return parameters_of(name, self.names)

    @cached_property
    def _extras(self) -> tuple[dict[str, str], dict[str, str]]:
        return judge(self.reader, without_parameter(self.model, self.names, self.stored.plain))

    @cached_property
    def copied(self) -> frozenset[str]:
        """Tensors that the model has no parameter for and that may change its results, which the run that wrote the
        folder has copied all the same."""
        return copied_tensors(self.path) & self._extras[1].keys() if self._extras[1] else frozenset()

    @property
    def harmless(self) -> dict[str, str]:
        """Tensors that the model has no parameter for and that change no result, and what they are."""
        return self._extras[0]

    @property
    def refused(self) -> dict[str, str]:
        """Tensors that the model has no parameter for and that may change its results, and why."""
        return {name: reason for name, reason in self._extras[1].items() if name not in self.copied}

    def is_for_others(self, name: str) -> bool:
        """Whether a tensor that the model has no parameter for is passed over: see `unclaimed`."""
        return name in self.copied or is_for_others(self.model, name)

    @cached_property
    def for_others(self) -> set[str]:
        """Tensors, and bases of quantized weights, that the model has no parameter for and other programs may use."""
        weights = self.stored.weights
        quantized = [replace(next(iter(weight.tensors.values())), name=base) for base, weight in weights.items()]
        found = unclaimed(self.model, self.names, [*self.stored.plain, *quantized])
        return {name for name, for_others in found.items() if for_others or name in self.copied}

    def require_known(self) -> None:
        """Raise InputError for the tensors that `lowbit.load` refuses."""
        if self.refused:
            name, reason = next(iter(self.refused.items()))
            more = f" (and {len(self.refused) - 1} more such tensors)" if len(self.refused) > 1 else ""
            raise InputError(
                f"{name} is unknown to the model but in {self.path}: {reason}{more}; the checkpoint does not belong to "
                "its config"
            )


def parameters_of(name: str, names: CheckpointNames) -> list[str]:
    """The parameters that a stored tensor, or the base of a quantized weight, belongs to; what `names` makes of its
    name where there are none."""
    for candidate in (f"{name}.weight", name):
        found, direct = names.locate(candidate)
        if found in names.state:
            return [found] if direct else names.computed(candidate)
    return [names.locate(name)[0]]


def unclaimed(model, names: CheckpointNames, tensors: Iterable[TensorInfo]) -> dict[str, bool]:
    """Name of each of a checkpoint's `tensors` that `model` has no parameter for -> whether it is there for others:
    transformers passes over it by its name, or it is of a layer that predicts further tokens (MTP, NextN)."""
    found = {}
    for info in tensors:
        parameters = parameters_of(info.name, names)
        if names.state.keys().isdisjoint(parameters):
            found[info.name] = any(is_for_others(model, name) for name in {info.name, *parameters})
    return found


def is_for_others(model, name: str) -> bool:
    """Whether `name` says that a tensor or parameter, which the model does not have, is there for other programs."""
    if any(re.search(pattern, name) for pattern in ignored_if_unexpected(model)):
        return True
    return _predicts_further(name, model.config.get_text_config())


def _predicts_further(name: str, config) -> bool:
    """Whether a tensor is called as those of MTP modules are, or belongs to one of the layers that a config counts
    beyond those of the model."""
    if _FURTHER.search(name):
        return True
    layer = _LAYER.search(name)
    first, count = (getattr(config, key, None) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    if layer is None or type(first) is not int or type(count) is not int:
        return False
    return first <= int(layer[1]) < first + count


def without_parameter(model, names: CheckpointNames, tensors: Iterable[TensorInfo]) -> list[str]:
    """Names of those of a checkpoint's `tensors` that `model` has no parameter for, and that are not for others."""
    return [name for name, for_others in unclaimed(model, names, tensors).items() if not for_others]


def stored_weights(path: Path) -> StoredWeights:
    """The quantized weights of a folder, those in floating point of fewer bits decoded. The model is built only where
    the names of the files do not tell by which scheme a weight is quantized: a config may know it by the name or the
    class of its module. Raises InputError."""
    try:
        found = StoredWeights(decoded(CheckpointReader(path)))
    except InputError:
        return OpenedFolder(path, read=decoded).stored
    return OpenedFolder(path, read=decoded).stored if found.tells_classes_apart else found


def summarize(folder: Path) -> dict:
    """Parts of a checkpoint (each scheme, and what is not quantized) with parameters, bytes and bits per weight.
    encoded: the weights in floating point of eight or four bits, or of another tool's own kind."""
    stored = stored_weights(folder)
    reader = stored.reader
    parts, layers, encoded = defaultdict(lambda: [0, 0, 0]), [], []

    def add(part: str, parameters: int, nbytes: int) -> None:
        parts[part] = [a + b for a, b in zip(parts[part], (1, parameters, nbytes), strict=True)]

    for base, weight in stored.weights.items():
        shape = [weight.experts, *weight.shape] if weight.experts else list(weight.shape)
        scheme, order = weight.scheme.name, ", act-order" if weight.act_order else ""
        layers.append({"name": base, "scheme": scheme, "shape": shape, "bytes": weight.nbytes})
        add(scheme + order, math.prod(shape), weight.nbytes)
    for tensor in stored.plain:
        add(tensor.stored_as, tensor.numel, tensor.stored_bytes)
        if tensor.is_encoded:
            name, shape = tensor.name.removesuffix(".weight"), list(tensor.shape)
            encoded.append({"name": name, "scheme": tensor.stored_as, "shape": shape, "bytes": tensor.stored_bytes})
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    return {
        "architecture": (reader.config.get("architectures") or [reader.config.get("model_type") or "unknown"])[0],
        "format": CheckpointReader(folder).method,
        "files": len(reader.files),
        "parameters": totals[1],
        "bytes": totals[2],
        "bits_per_weight": 8 * totals[2] / max(totals[1], 1),
        "parts": [
            {"name": name, "tensors": count, "parameters": parameters, "bytes": nbytes,
             "bits_per_weight": 8 * nbytes / max(parameters, 1)}
            for name, (count, parameters, nbytes) in sorted(parts.items())
        ],
        "layers": layers,
        "encoded": encoded,
    }  # fmt: skip
