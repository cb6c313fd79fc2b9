"""Forward passes that stop where a weight is about to be used.

Quantizing a layer in its true order means: measure the inputs of its first linears, quantize them, measure the inputs
of the next ones as the quantized layer now computes them, and so on. Run naively, that is the layer once per step. A
`Walk` is a forward pass in a thread of its own that pauses at the first use of the weights of each `Stage` and goes on
when those weights have been replaced in place: every batch runs through the layer once. Only one walk moves at a time.

Nothing here knows an architecture: products are seen where torch executes them, and weights are known by their address.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowbit.torch_api import version_of

# function -> positions of the input and of the weight among its arguments
_PRODUCTS = {
    torch.nn.functional.linear: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.addmm: (1, 2),
}
_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


@dataclass(frozen=True)
class Stage:
    """Weights whose inputs are measured at the same point of a layer.

    parameters: their names; linears that multiply the same input, or the 3-D parameters of an experts module in the
    order of their use. experts: the name of that module, None for linears. joins: it is a single linear, and its output
    is added to the residual stream as it is.
    """

    parameters: tuple[str, ...]
    experts: str | None = None
    joins: bool = False


class Products(TorchFunctionMode):
    """Calls `seen(parameter, input)` before each product of an input with one of the weights at `addresses`, and
    follows the residual stream: first what the layer was given, then each sum that it enters. Where that is not known,
    the stream begins with the first sum that such a product enters.

    joining: the weights whose products were added to the stream while it was known.
    """

    def __init__(
        self, addresses: dict[int, str], seen: Callable[[str, torch.Tensor], None], stream: torch.Tensor | None = None
    ):
        self._addresses, self._seen, self.stream = addresses, seen, stream
        self._latest: tuple[str, torch.Tensor] | None = None
        self.joining: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        parameter = None
        if function in _PRODUCTS:
            first, second = _PRODUCTS[function]
            if len(args) > second and (parameter := self._addresses.get(args[second].data_ptr())) is not None:
                self._seen(parameter, args[first])
        result = function(*args, **(kwargs or {}))
        if parameter is not None:
            self._latest = parameter, result
        elif function in _SUMS and all(isinstance(a, torch.Tensor) and a.shape == result.shape for a in args[:2]):
            self._follow([a.data_ptr() for a in args[:2]], result)
        return result

    def _follow(self, operands: list[int], total: torch.Tensor) -> None:
        """A sum of tensors at the addresses `operands` was made."""
        parameter, product = self._latest or ("", None)
        joins = product is not None and product.data_ptr() in operands
        if self.stream is None:
            self.stream = total if joins else None
        elif self.stream.data_ptr() in operands:
            self.stream = total
            if joins:
                self.joining.add(parameter)


def addresses(parameters: dict[str, nn.Parameter]) -> dict[int, str]:
    """Where the matrices of the parameters start: one for each expert of a 3-D parameter."""
    return {
        matrix.data_ptr(): name
        for name, parameter in parameters.items()
        for matrix in (parameter if parameter.ndim == 3 else (parameter,))
    }


def find_stages(
    run: Callable[[], object], parameters: dict[str, nn.Parameter], hidden: torch.Tensor | None = None
) -> list[Stage]:
    """The stages of a layer in the order in which `run`, one forward pass through it, uses `parameters`.

    hidden: the hidden states that the layer is given, the residual stream at its beginning.
    """
    order: dict[object, list[str]] = {}
    kept = []  # inputs stay alive, or a later one could come to lie at the address of an earlier one

    def seen(parameter: str, x: torch.Tensor) -> None:
        kept.append(x)
        key = _experts_module(parameters, parameter) or (x.data_ptr(), version_of(x), x.shape[-1], x.numel())
        if not any(parameter in names for names in order.values()):
            order.setdefault(key, []).append(parameter)

    with torch.no_grad(), Products(addresses(parameters), seen, hidden) as mode:
        run()
    return [
        Stage(tuple(names), _experts_module(parameters, names[0]), len(names) == 1 and names[0] in mode.joining)
        for names in order.values()
    ]


def _experts_module(parameters: dict[str, nn.Parameter], name: str) -> str | None:
    return name.rpartition(".")[0] if parameters[name].ndim == 3 else None


class _Abandoned(BaseException):
    """Unwinds a paused forward pass that nobody waits for any more."""


class Walk:
    """One forward pass `run() -> output` of a layer, paused before each stage."""

    _current = threading.local()

    def __init__(
        self, run: Callable[[], torch.Tensor], stages: list[Stage], parameters: dict[str, nn.Parameter],
        hidden: torch.Tensor | None = None,
    ):  # fmt: skip
        self._run, self._output = run, None
        self._stage_of = {name: number for number, stage in enumerate(stages) for name in stage.parameters}
        self._stage_of_experts = {stage.experts: number for number, stage in enumerate(stages)}
        self._mode = Products(addresses(parameters), self._at_product, hidden)
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._reached = self._wanted = -1  # stage numbers
        self._arrival = None
        self._failure: BaseException | None = None
        self._abandoned = self._finished = False
        # a daemon: a walk that is never resumed must not keep the process from ending
        threading.Thread(target=self._main, name="lowbit-walk", daemon=True).start()

    def to(self, stage: int):
        """Go on to `stage`: its input [..., K], or the arguments (hidden states, expert indices, ...) that its experts
        module is called with. None if this batch does not use the weights of the stage."""
        if self._reached < stage and not self._finished:
            self._wanted = stage
            self._resume()
        return self._arrival if self._reached == stage else None

    @property
    def stream(self) -> torch.Tensor | None:
        """The residual stream where the pass is paused; None: not known."""
        return None if self._mode is None else self._mode.stream

    def to_end(self) -> torch.Tensor:
        """Go on to the end: what `run` returns."""
        self._wanted = len(self._stage_of)
        if not self._finished:
            self._resume()
        output, self._output = self._output, None
        return output

    def abandon(self) -> None:
        """Drop what the pass holds."""
        if not self._finished:
            self._abandoned = True
            self._resume()

    def _resume(self) -> None:
        self._go.release()
        self._paused.acquire()
        if self._failure is not None:
            raise self._failure

    def _main(self) -> None:
        self._go.acquire()
        Walk._current.walk = self
        try:
            with torch.no_grad(), self._mode:
                if not self._abandoned:
                    self._output = self._run()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again where the walk is waited for
            self._failure = error
        # nothing is held once it is through: not even by the cycle of a walk and its mode
        self._finished, self._arrival, self._run, self._mode, self._reached = True, None, None, None, -1
        self._paused.release()

    def _arrive(self, stage: int, arrival) -> None:
        if self._abandoned:
            raise _Abandoned
        self._reached = max(stage, self._reached)
        if stage < self._wanted:
            return
        self._arrival = arrival
        self._paused.release()
        self._go.acquire()
        self._arrival = None
        if self._abandoned:
            raise _Abandoned

    def _at_product(self, parameter: str, x: torch.Tensor) -> None:
        if self._stage_of[parameter] > self._reached:
            self._arrive(self._stage_of[parameter], x)

    @classmethod
    def at_experts(cls, name: str) -> Callable:
        """A forward pre-hook (with keywords) for the experts module `name`: walks that enter it pause there."""

        def hook(module, args, kwargs):
            walk = getattr(cls._current, "walk", None)
            if walk is not None and (stage := walk._stage_of_experts.get(name, -1)) > walk._reached:
                walk._arrive(stage, (*args, *kwargs.values()))

        return hook


class _Enough(Exception):
    """The input that was asked for has been seen."""


def expert_input(module, parameter: nn.Parameter, expert: int, hidden: torch.Tensor, routing: torch.Tensor):
    """What expert `expert` multiplies with its matrix of `parameter`, for tokens `hidden` [tokens, hidden_size]:
    the experts module is run with all of them routed there. routing: any expert indices, for their dtype."""
    found = []

    def seen(name: str, x: torch.Tensor) -> None:
        found.append(x)
        raise _Enough

    index = torch.full((len(hidden), 1), expert, dtype=routing.dtype, device=routing.device)
    weights = torch.ones(len(hidden), 1, dtype=hidden.dtype, device=hidden.device)
    try:
        with torch.no_grad(), Products({parameter[expert].data_ptr(): ""}, seen):
            module.forward(hidden, index, weights)
    except _Enough:
        pass
    return found[0].reshape(-1, found[0].shape[-1])
