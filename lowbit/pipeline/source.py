"""A quantized model folder, as conversions read it."""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import CheckpointNames, Site, find_sites, named_in_config, skeleton
from lowbit.errors import InputError
from lowbit.pipeline.exits import ExitSource
from lowbit.qweight import QuantWeight
from lowbit.scheme import Scheme
from lowbit.sources import load_config, resolve
from lowbit.stored import StoredWeight, StoredWeights


class QuantizedFolder:
    """A quantized folder, opened: what it stores, the skeleton of its model, and which of its sites weights belong to.

    Raises InputError if there is nothing quantized in it.
    """

    def __init__(self, model: str | Path, revision: str | None = None, trust_remote_code: bool = False):
        self.folder = resolve(model, revision)
        self.reader = CheckpointReader(self.folder)
        self.stored = StoredWeights(self.reader)
        if not self.stored.weights:
            raise InputError(f"{self.folder} holds no quantized weights: expected a quantized model")
        self.config = load_config(self.folder, trust_remote_code)
        self.model = skeleton(self.config, trust_remote_code, tensors=self.reader.tensors.values())
        self._names, self._sites = CheckpointNames(self.model), find_sites(self.model)

    def site(self, name: str) -> Site | None:
        """Of the tensor set `name`."""
        found = self._sites.get(self._names.locate(f"{name}.weight")[0])
        return found or self._sites.get(self._names.locate(name)[0])

    def is_stored_transposed(self, site: Site, name: str) -> bool:
        """Whether transformers expects the matrices of the tensor `name` as [in_features, out_features]."""
        in_memory = tuple(self._names.state[site.parameter].shape)
        return site.transposed != self._names.turns(name, in_memory)

    def in_config(self, default: Scheme) -> tuple[dict[str, Scheme], list[str]]:
        """What a config of this model has to name."""
        weights = self.stored.weights
        schemes = {site.parameter: w.scheme for base, w in weights.items() if (site := self.site(base))}
        tensors = [(base if w.experts else f"{base}.weight", 2) for base, w in weights.items()]
        tensors += [(info.name, len(info.shape)) for info in self.stored.plain]
        return named_in_config(self.model, self._names, self._sites, schemes, tensors, default)

    def as_exit(self) -> ExitSource:
        """What exits to other tools take of it. Raises InputError for experts that are stored as one tensor."""
        config = copy.copy(self.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return ExitSource(
            folder=self.folder,
            config=config,
            skeleton=self.model,
            quantized={base: _meta(weight) for base, weight in self.stored.weights.items()},
            dense={info.name: info for info in self.stored.plain},
            read=lambda base: self.stored.quantized(self.stored.weights[base])[0],
            tensor=self.reader.tensor,
        )


def _meta(weight: StoredWeight) -> QuantWeight:
    if weight.experts:
        raise InputError(f"{weight.base}: its experts are stored as one tensor, which no exit takes apart")
    qweight = QuantWeight.meta(*weight.shape, weight.scheme, weight.dtype)
    if not weight.act_order:
        return qweight
    return replace(qweight, g_idx=torch.empty(weight.shape[1], dtype=torch.int32, device="meta"))
