"""Which products of a forward pass read the same input: q, k and v, gate and up, whatever else a model has.

Two products read the same input if they are given the same memory (storage, start and rows) at the same version, which
counts changes in place. So a tensor, its reshaped views and what `detach` gives are one input: layers reshape hidden
states between two linears, and multiply the same numbers all the same. A clone is another input, equal as it may be,
and so is a tensor that was changed in place between two products. Neither the address nor the id of a tensor is enough:
the meta device has no addresses, and both are given to another tensor once the first is gone.

Who multiplies is seen in two ways, by what a weight is. `Products` sees weights that torch multiplies, where that
happens, in whatever module; `module_calls` sees modules whose weights are packed, where they are called.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowbit.torch_api import place_of, version_of

# function -> (position, keyword) of the input and of the weight among its arguments
_PRODUCTS: dict[Callable, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
}


class SharedInputs:
    """Tells the inputs of a forward pass apart. Every tensor that was asked about is kept alive: the place and the id
    of another one cannot be the same by chance."""

    def __init__(self) -> None:
        self._numbers: dict[tuple, int] = {}
        self._kept: list[torch.Tensor] = []

    def number_of(self, x: torch.Tensor) -> int:
        """Number an input.

        Args:
            x: Any shape, dtype and device, also meta.

        Returns:
            A number, the same one for the same input. A tensor of inference mode gets a new one at each call, because
            such tensors do not count their changes: see `with_versions`.
        """
        self._kept.append(x)
        version = len(self._kept) if x.is_inference() else version_of(x)
        rows = x.shape[-1:], x.stride()[-1:], x.numel(), x.dtype
        return self._numbers.setdefault((place_of(x), rows, x.is_inference(), version), len(self._numbers))


@contextmanager
def with_versions() -> Iterator[None]:
    """No gradients, and tensors that count their changes, which those of inference mode do not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class Product:
    """An input [..., K], and the weight that it was multiplied with, as it was passed: a matrix, transposed or not."""

    name: str
    x: torch.Tensor
    weight: torch.Tensor


class Products(TorchFunctionMode):
    """Calls `seen(name, input)` before each product of an input with one of the `weights`.

    A weight is known by its memory, so that it is recognized transposed too.

    Args:
        weights: Name -> matrix [N, K] or [K, N], or the matrices of all experts [experts, N, K] or [experts, K, N].
        seen: Called with the name and with the input [..., K]. What it raises ends the forward pass.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], seen: Callable[[str, torch.Tensor], None]):
        super().__init__()
        self._weights = dict(weights)  # alive, or another tensor could take the place of one
        self._names = {place: name for name, weight in weights.items() for place in _matrices(weight)}
        self._seen = seen

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        product = None
        if function in _PRODUCTS:
            x, weight = (args[at] if at < len(args) else kwargs.get(keyword) for at, keyword in _PRODUCTS[function])
            if isinstance(weight, torch.Tensor) and (name := self._names.get(place_of(weight))) is not None:
                product = Product(name, x, weight)
                self._seen(name, x)
        result = function(*args, **kwargs)
        self.called(function, args, result, product)
        return result

    def called(self, function: Callable, args: tuple, result: Any, product: Product | None) -> None:
        """For subclasses: `function` returned `result`; `product` is None if it multiplied none of the weights."""


def _matrices(weight: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Where each matrix of a weight begins."""
    storage, start = place_of(weight)
    for number in range(len(weight) if weight.ndim == 3 else 1):
        yield storage, start + number * weight.stride(0)


@contextmanager
def module_calls(modules: Iterable[nn.Module], seen: Callable[[nn.Module, torch.Tensor], None]) -> Iterator[None]:
    """Call `seen(module, input)` before each call of one of the `modules`; the input is its first argument."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen(module, args[0] if args else next(iter(kwargs.values())))

    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
