"""Forward passes that stop where a weight is about to be used.

Quantizing a layer in its true order means: measure the inputs of its first linears, quantize them, measure the inputs
of the next ones as the quantized layer now computes them, and so on. Run naively, that is the layer once per step. A
`StagedPass` is a forward pass in a thread of its own that pauses at the first use of the weights of each `Stage` and
goes on when those weights have been replaced in place: every batch runs through the layer once. Only one pass moves at
a time.

Nothing here knows an architecture: products are seen where torch executes them, and which of them read the same input
is for `discovery.shared_inputs` to say. What is followed here besides is the residual stream: not who reads a tensor,
but which sums it enters.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.discovery.shared_inputs import Product, Products, SharedInputs, with_versions
from lowbit.torch_api import place_of

_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


@dataclass(frozen=True)
class Stage:
    """Weights whose inputs are measured at the same point of a layer.

    parameters: their names; linears that multiply the same input, or the 3-D parameters of an experts module in the
    order of their use. experts: the name of that module, None for linears. joins: it is a single linear, and its output
    is added to the residual stream. through: the module that lies between, which gives the output's own shape (a norm);
    None: the output is added as it is.
    """

    parameters: tuple[str, ...]
    experts: str | None = None
    joins: bool = False
    through: str | None = None


class ResidualStream(Products):
    """Products of the `weights`, and the residual stream around them: first `stream`, what the layer was given, then
    each sum that it enters. Where that is not known, the stream begins with the first sum that such a product enters.

    joining: the weights whose products were added to the stream while it was known, and the name of the module that
    made the summand of a product, None if that is the product itself.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        seen: Callable[[str, torch.Tensor], None],
        stream: torch.Tensor | None = None,
    ):
        super().__init__(weights, seen)
        self.stream = stream
        self.joining: dict[str, str | None] = {}
        self._latest: tuple[str, torch.Tensor] | None = None
        self._passed: tuple[str, torch.Tensor] | None = None  # a module that took the latest product in, what it gave

    def module_ran(self, name: str, x: object, output: object) -> None:
        """A module was called with `x` and gave `output`."""
        if self._latest is None or not isinstance(x, torch.Tensor) or not isinstance(output, torch.Tensor):
            return
        if place_of(x) == place_of(self._latest[1]) and x.shape == output.shape:
            self._passed = name, output

    def called(self, function: Callable, args: tuple, result: Any, product: Product | None) -> None:
        if product is not None:
            self._latest, self._passed = (product.name, result), None
        elif function in _SUMS and all(isinstance(a, torch.Tensor) and a.shape == result.shape for a in args[:2]):
            self._follow([place_of(a) for a in args[:2]], result)

    def _follow(self, operands: list[tuple[int, int]], total: torch.Tensor) -> None:
        """Follow the stream into the sum `total` of tensors at the places `operands`."""
        name, product = self._latest or ("", None)
        joins = product is not None and place_of(product) in operands
        through = None
        if not joins and self._passed is not None:
            joins, through = place_of(self._passed[1]) in operands, self._passed[0]
        if self.stream is None:
            self.stream = total if joins else None
        elif place_of(self.stream) in operands:
            self.stream = total
            if joins:
                self.joining[name] = through


def find_stages(
    run: Callable[[], object],
    parameters: dict[str, nn.Parameter],
    hidden: torch.Tensor | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> list[Stage]:
    """Find the stages of a layer.

    Args:
        run: One forward pass through it.
        parameters: Name -> weight, in any order.
        hidden: The hidden states that the layer is given, the residual stream at its beginning.
        modules: Name -> module, those of the layer: outputs are followed through one that takes nothing else.

    Returns:
        The stages in the order in which the pass uses the parameters.
    """
    order: dict[object, list[str]] = {}
    inputs = SharedInputs()

    def seen(name: str, x: torch.Tensor) -> None:
        key = _experts_module(parameters, name) or inputs.number_of(x)
        if not any(name in names for names in order.values()):
            order.setdefault(key, []).append(name)

    with with_versions(), ResidualStream(parameters, seen, hidden) as mode, _calls(modules or {}, mode.module_ran):
        run()

    def stage(names: list[str]) -> Stage:
        joins = len(names) == 1 and names[0] in mode.joining
        through = mode.joining[names[0]] if joins else None
        return Stage(tuple(names), _experts_module(parameters, names[0]), joins, through)

    return [stage(names) for names in order.values()]


@contextmanager
def _calls(modules: Mapping[str, nn.Module], ran: Callable[[str, object, object], None]) -> Iterator[None]:
    """Call `ran(name, input, output)` after each call of one of the modules with a single argument."""

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            given = (*args, *kwargs.values())
            if len(given) == 1:
                ran(name, given[0], output)

        return hook

    hooks = [module.register_forward_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _experts_module(parameters: dict[str, nn.Parameter], name: str) -> str | None:
    return name.rpartition(".")[0] if parameters[name].ndim == 3 else None


class _Abandoned(BaseException):
    """Unwinds a paused forward pass that nobody waits for any more."""


class StagedPass:
    """One forward pass `run() -> output` of a layer, paused before each stage."""

    _current = threading.local()

    def __init__(
        self,
        run: Callable[[], torch.Tensor],
        stages: list[Stage],
        parameters: dict[str, nn.Parameter],
        hidden: torch.Tensor | None = None,
    ):
        self._run: Callable[[], torch.Tensor] | None = run
        self._output: torch.Tensor | None = None
        self._stage_of = {name: number for number, stage in enumerate(stages) for name in stage.parameters}
        self._stage_of_experts = {stage.experts: number for number, stage in enumerate(stages)}
        self._mode: ResidualStream | None = ResidualStream(parameters, self._at_product, hidden)
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._reached = self._wanted = -1  # stage numbers
        self._arrival = None
        self._failure: BaseException | None = None
        self._abandoned = self._finished = False
        # a daemon: a pass that is never resumed must not keep the process from ending
        threading.Thread(target=self._main, name="lowbit-staged-pass", daemon=True).start()

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
        StagedPass._current.staged = self
        try:
            with torch.no_grad(), self._mode:
                if not self._abandoned:
                    self._output = self._run()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again where the pass is waited for
            self._failure = error
        # nothing is held once it is through: not even by the cycle of a pass and its mode
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
        """A forward pre-hook (with keywords) for the experts module `name`: passes that enter it pause there."""

        def hook(module, args, kwargs):
            staged = getattr(cls._current, "staged", None)
            if staged is not None and (stage := staged._stage_of_experts.get(name, -1)) > staged._reached:
                staged._arrive(stage, (*args, *kwargs.values()))

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
        with torch.no_grad(), Products({"": parameter[expert]}, seen):
            module.forward(hidden, index, weights)
    except _Enough:
        pass
    return found[0].reshape(-1, found[0].shape[-1])
