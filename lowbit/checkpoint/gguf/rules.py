"""What transformers does to the tensors of a GGUF file on their way into a model, found by trying it.

Its rules are those of each architecture: rows of queries and keys in another order, norms that are shifted, experts
that are laid side by side. Some only move rows, which can be done to rows of packed blocks as well. Which, is seen from
what becomes of a tensor whose rows are numbered.

transformers has two kinds of rules: a processor of its older loader, and the conversions of its newer one, which reads
the architectures that it knows.
"""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from lowbit.checkpoint.gguf.header import Blocks


class Rules(ABC):
    """The rules for one file. names: of its tensors, as transformers knows them -> of the parameters that are made of
    them."""

    def __init__(self, names: Mapping[str, str]):
        self._names = dict(names)
        self._orders: dict[tuple, np.ndarray | None] = {}

    @abstractmethod
    def names_of(self, model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
        """What `names` is for a model on the meta device and a file with the tensors `stored`. Raises whatever
        transformers raises."""

    @abstractmethod
    def applied(self, tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The parameters that transformers makes of tensors of the file. Raises whatever its rules raise."""

    def parameter_of(self, name: str) -> str | None:
        """The parameter that a tensor of the file is part of; None where transformers has no use for it."""
        return self._names.get(name, self._names.get(name.removesuffix(".weight")))

    def order(self, parameter: str, sources: Sequence[Blocks], shape: tuple[int, ...]) -> np.ndarray | None:
        """Which rows of the file a parameter consists of.

        Args:
            parameter: Its name.
            sources: All that it is made of.
            shape: Its own, [..., values of a row].

        Returns:
            For each of its rows, its number among the rows of the sources one after the other; None where it is more
            than rows of them in some order.
        """
        if len(shape) < 2 or any(len(source.shape) < 2 or source.width != shape[-1] for source in sources):
            return None
        key = (re.sub(r"\d+", "#", parameter), shape, *(source.values for source in sources))
        if key not in self._orders:  # the same for all layers
            self._orders[key] = self._order(parameter, sources, shape)
        return self._orders[key]

    def _order(self, parameter: str, sources: Sequence[Blocks], shape: tuple[int, ...]) -> np.ndarray | None:
        numbered, total = {}, 0
        for source in sources:
            # from 1 on: what a rule adds, or leaves at 0, shows
            numbers = np.arange(total + 1, total + source.rows + 1, dtype=np.float64)
            numbered[source.name], total = numbers.reshape(*source.shape[:-1], 1), total + source.rows
        try:
            with np.errstate(all="ignore"):
                found = self.applied(numbered)[parameter]
        except Exception:  # a rule for tensors of one shape only
            return None
        if tuple(found.shape) != (*shape[:-1], 1):
            return None
        order = found.numpy().reshape(-1) - 1
        if not np.array_equal(np.sort(order), np.arange(total)):
            return None
        return order.astype(np.int64)


class _Processed(Rules):
    """Those of a processor, which says how each tensor is changed."""

    def __init__(self, architecture: str, config: Mapping, names: Mapping[str, str]):
        from lowbit.transformers_api import TENSOR_PROCESSORS, TensorProcessor

        super().__init__(names)
        self._rules = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(config))

    def names_of(self, model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
        from lowbit.transformers_api import get_gguf_hf_weights_map

        return get_gguf_hf_weights_map(model, self._rules)

    def applied(self, tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for name, values in tensors.items():
            result = self._rules.process(
                weights=values, name=name, tensor_key_mapping=self._names, parsed_parameters={"tensors": made}
            )
            if result.name is not None and (parameter := self.parameter_of(result.name)) is not None:
                made[parameter] = torch.from_numpy(np.ascontiguousarray(result.weights))
        return made


class _Converted(Rules):
    """Those of conversions, which rename tensors and compute parameters as for any other checkpoint."""

    def __init__(self, architecture: str, config: Mapping, names: Mapping[str, str]):
        from transformers import AutoConfig, WeightConverter

        from lowbit.transformers_api import WeightRenaming, get_gguf_conversion_mapping

        super().__init__(names)
        described = {name: value for name, value in config.items() if name != "quantization_config"}
        mapping = get_gguf_conversion_mapping(architecture, AutoConfig.for_model(**described))
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_source = {source: c for c in self._converters for source in c.source_patterns}

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(the parameter that a tensor is part of, the pattern of the converter that takes it or None)"""
        from lowbit.transformers_api import rename_source_key

        return rename_source_key(name, self._renamings, self._converters)

    def names_of(self, model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
        known = model.state_dict()
        found = {name: self._renamed(name)[0] for name in stored}
        return {name: parameter for name, parameter in found.items() if parameter in known}

    def applied(self, tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        sources: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, values in tensors.items():
            sources[self._names[name]][name] = torch.from_numpy(np.ascontiguousarray(values))
        return {parameter: self._converted(parameter, of_it) for parameter, of_it in sources.items()}

    def _converted(self, parameter: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """A parameter, made of all of its tensors by name."""
        sources = {self._renamed(name)[1]: [tensor] for name, tensor in tensors.items()}
        pattern = next(iter(sources))
        if pattern is None:
            return next(iter(tensors.values()))
        converter = self._by_source[pattern]
        patterns, targets = converter.source_patterns, converter.target_patterns
        made = {pattern: sources[pattern] for pattern in patterns if pattern in sources}
        for operation in converter.operations:
            made = operation.convert(made, source_patterns=patterns, target_patterns=targets, full_layer_name=parameter)
        part = next(iter(made.values()))
        return part[0] if isinstance(part, list) else part


def rules_of(architecture: str, config: Mapping, names: Mapping[str, str]) -> Rules:
    """The rules for a file.

    Args:
        architecture: What the file calls its architecture.
        config: The config of the model, as config.json has it.
        names: See `Rules`; empty where they are still to be found.
    """
    from lowbit.transformers_api import is_converted_gguf

    return (_Converted if is_converted_gguf(architecture) else _Processed)(architecture, config, names)
