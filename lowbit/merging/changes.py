"""What an adapter makes of each parameter of a model, one matrix at a time."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.errors import InputError
from lowbit.merging.adapter import ADAPTER, is_stand_in


@dataclass(frozen=True)
class Part:
    """Which part of a parameter a tensor is: all of it, or some rows of one of its experts."""

    expert: int | None = None
    start: int = 0
    count: int | None = None

    @property
    def rows(self) -> slice:
        return slice(self.start, None if self.count is None else self.start + self.count)


@dataclass(frozen=True, eq=False)
class Replaced:
    """A parameter that the adapter holds whole: of `modules_to_save`, or a bias."""

    value: torch.Tensor
    is_tied = False  # by PEFT, to what it does to another parameter

    def apply(self, value: torch.Tensor, part: Part) -> torch.Tensor:
        """The parameter, or the part of it. Raises InputError, where it has another shape."""
        made = self.value if part.expert is None else self.value[part.expert][part.rows]
        if made.shape != value.shape:
            raise InputError(f"the adapter has {list(made.shape)} in place of a tensor of {list(value.shape)}")
        return made.detach().float()


@dataclass(frozen=True, eq=False)
class Merged:
    """A parameter of a module that PEFT has put a layer of its own on. layer: that one. leaf: "weight" or "bias"."""

    layer: Any
    leaf: str

    @property
    def is_tied(self) -> bool:
        return getattr(self.layer, "tied_adapter", None) is not None

    def apply(self, value: torch.Tensor, part: Part) -> torch.Tensor:
        """The merged parameter, float32 as it came in; PEFT merges all parameters of a module at once."""
        base = self.layer.get_base_layer()
        kept = dict(base.named_parameters(recurse=False))
        try:
            for name, stand_in in kept.items():
                given = value if name == self.leaf else stand_in.new_zeros(()).expand(stand_in.shape)
                base.register_parameter(name, nn.Parameter(given, requires_grad=False))
            self.layer.merge(safe_merge=True)
            return base.get_parameter(self.leaf).detach()
        finally:
            self.layer.merged_adapters.clear()
            for name, stand_in in kept.items():
                base.register_parameter(name, stand_in)


@dataclass(frozen=True, eq=False)
class Added:
    """The matrices of all experts, [experts, rows, columns], each of which the adapter adds a product to."""

    layer: Any
    is_tied = False

    def apply(self, value: torch.Tensor, part: Part) -> torch.Tensor:
        left, right, scaling = self.layer.get_delta_factors(ADAPTER)
        if part.expert is not None:
            return value + (left[part.expert][part.rows] @ right[part.expert]).mul_(scaling)
        for expert, matrix in enumerate(value):
            matrix += (left[expert] @ right[expert]).mul_(scaling)
        return value


Change = Replaced | Merged | Added


def changes_of(model: nn.Module, parameters: Iterable[str]) -> dict[str, list[Change]]:
    """Parameter name, as the model without an adapter has it -> what the adapter does to it, in this order.

    Args:
        model: As `put_on` gives it.
        parameters: The names of its parameters before.

    Raises:
        InputError: It changes what is no parameter of the model.
    """
    found: dict[str, list[Change]] = {name: [] for name in parameters}
    for name, change in [*_replaced(model), *_merged(model)]:
        if name in found:
            found[name].append(change)
        elif not isinstance(change, Replaced):  # of the adapter itself
            raise InputError(f"the adapter changes {name}, which is no parameter of the model")
    return {name: changes for name, changes in found.items() if changes}


def _replaced(model: nn.Module) -> Iterator[tuple[str, Change]]:
    from peft.utils import ModulesToSaveWrapper

    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[ADAPTER]
            yield from ((f"{name}.{leaf}", Replaced(value)) for leaf, value in saved.named_parameters())
    for name, value in model.named_parameters(remove_duplicate=False):
        if not is_stand_in(value):
            yield _plain(name), Replaced(value)


def _merged(model: nn.Module) -> Iterator[tuple[str, Change]]:
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for name, module in model.named_modules():
        name = _plain(name)
        if isinstance(module, ParamWrapper):
            yield f"{name}.{module.parameter_name}", _of_parameter(module, name)
        elif isinstance(module, LoraLayer | TrainableTokensLayer):
            yield f"{name}.weight", Merged(module, "weight")
            if any(getattr(module, "lora_bias", {}).values()):
                yield f"{name}.bias", Merged(module, "bias")


def _of_parameter(module: Any, name: str) -> Change:
    if module.num_experts == 1:
        return Merged(module, module.parameter_name)
    if not hasattr(module, "get_delta_factors"):
        raise InputError(f"the installed PEFT does not tell the experts of {name} apart: pip install -U peft")
    return Added(module)


def _plain(name: str) -> str:
    """The name of a module or parameter without what PEFT puts between."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", name)
