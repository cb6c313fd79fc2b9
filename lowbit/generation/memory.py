"""What running a model takes beside its weights: its cache, and what a forward pass holds at a time.

Nothing here knows an architecture: the model runs on the meta device, where tensors have sizes and no numbers, with the
cache that it would run with, and the sizes of all tensors that are alive at a time are added up.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from transformers import Cache, DynamicCache

from lowbit.discovery import find_sites
from lowbit.errors import InputError, first_line
from lowbit.generation.kv_int8 import in_int8
from lowbit.generation.loop import PREFILL_CHUNK
from lowbit.generation.steps.cache import FilledLayer, filled_cache, room, unusable
from lowbit.generation.steps.step import ForwardArguments
from lowbit.native.operators import dense_is_faster
from lowbit.numerics import dense
from lowbit.serving import fused_units
from lowbit.torch_api import TorchDispatchMode, place_of, tree_leaves


@dataclass(frozen=True)
class BesideWeights:
    """Bytes. cache: keys and values of all positions, and the state of recurrences. working: the most that a forward
    pass holds at a time: activations, logits, temporaries."""

    cache: int
    working: int


@dataclass(frozen=True)
class Load:
    """What is run: `batch` sequences of `context` tokens each, prompt and answer together.

    int8_cache: keys and values are kept in 8 bits. here: lowbit runs them on this machine; else an engine whose cache
    keeps no more than a sliding window reaches.
    """

    context: int
    batch: int = 1
    int8_cache: bool = False
    here: bool = True


def beside_weights(model, load: Load) -> BesideWeights:
    """What running a model takes beside its weights.

    Args:
        model: A skeleton on the meta device, in the dtype that it computes in.
        load: What is run.

    Raises:
        InputError: The model cannot run without numbers, or not with a cache in 8 bits.
    """
    failure: Exception | None = None
    ways: list[Callable[[Any, Load], BesideWeights]] = [_in_loop, _in_generate]
    for way in ways[: 1 if load.int8_cache else 2]:
        try:
            with (
                torch.no_grad(),
                _Kernels(_joined(model) if load.here else [], load.here and not torch.cuda.is_available()),
            ):
                return way(model, load)
        except Exception as error:  # a model without numbers fails anywhere
            failure = failure or error
    raise InputError(
        f"what running {type(model).__name__} takes cannot be told from its sizes "
        f"({first_line(failure) if failure else ''}): pass --size instead of --fit, without --context"
    )


def _in_loop(model, load: Load) -> BesideWeights:
    """As `Decoder` runs it: the prompt in chunks, then token by token, with a cache that is allocated once."""
    length = room(load.context) if load.here else load.context
    cache = filled_cache(model, load.batch, length)
    cache = in_int8(cache) if load.int8_cache else cache
    if (reason := unusable(cache)) is not None:
        raise InputError(reason)
    arguments, chunk = ForwardArguments(model), min(PREFILL_CHUNK, load.context)

    def run(start: int, end: int) -> None:
        for layer in cache.layers:
            if isinstance(layer, FilledLayer):
                layer.length = start
        _forward(model, arguments, load.batch, end - start, cache)

    run(0, chunk)  # allocates the cache
    held = _tensors_of(cache)
    prompt, step = (_Alive([*model.parameters(), *model.buffers(), *held]) for _ in range(2))
    with prompt:
        run(load.context - chunk, load.context)
    with step:
        run(length - 1, length)  # a step that is repeated sees all that the cache has room for
    # what repeats a step keeps its tensors, and another prompt may be read beside them
    return BesideWeights(_kept(cache, held, load), prompt.peak + step.total)


def _in_generate(model, load: Load) -> BesideWeights:
    """As `model.generate` runs it: the prompt at once, with a cache that grows."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    arguments, known = ForwardArguments(model), [*model.parameters(), *model.buffers()]
    with _Alive(known) as whole:
        _forward(model, arguments, load.batch, load.context - 1, cache)
        _forward(model, arguments, load.batch, 1, cache)
    size = sum(tensor.untyped_storage().nbytes() for tensor in _tensors_of(cache))
    return BesideWeights(size, max(whole.peak - size, 0))


def _forward(model, arguments: ForwardArguments, batch: int, tokens: int, cache: Cache) -> torch.Tensor:
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    # without a mask: transformers would look at its numbers. The masks that it makes of it have the same sizes
    given = arguments(ids, None, ids, cache, last_only=True)
    return model(**given).logits[:, -1].float()


def _kept(cache: Cache, held: list[torch.Tensor], load: Load) -> int:
    """Bytes of a cache; of a sliding window's layers, what the window reaches where no more is kept."""
    size = sum(tensor.untyped_storage().nbytes() for tensor in held)
    for layer in cache.layers:
        if not load.here and isinstance(layer, FilledLayer) and layer.window < layer.max_cache_len:
            whole = sum(tensor.untyped_storage().nbytes() for tensor in _tensors_in(vars(layer)).values())
            size -= whole - whole * layer.window // layer.max_cache_len
    return size


def _tensors_of(cache: Cache) -> list[torch.Tensor]:
    return [*_tensors_in([vars(layer) for layer in cache.layers]).values()]


def _tensors_in(values: Any) -> dict[int, torch.Tensor]:
    """Storage -> a tensor of it, of those in nested lists and dicts."""
    return {place_of(each)[0]: each for each in tree_leaves(values) if isinstance(each, torch.Tensor)}


class _Alive(TorchDispatchMode):
    """Adds up the tensors that are made and still alive.

    peak: the most bytes at a time. total: of all that were made. Tensors that are `known` do not count.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self._known = {place_of(tensor)[0] for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs: Mapping | None = None):
        result = operator(*args, **(kwargs or {}))
        for key, tensor in _tensors_in(result).items():
            if key not in self._known:
                self._count(key, tensor.untyped_storage())
        return result

    def _count(self, key: int, storage: torch.UntypedStorage) -> None:
        for gone in [each for each, (reference, _) in self._alive.items() if reference.expired()]:
            self.now -= self._alive.pop(gone)[1]
        if key not in self._alive:
            self._alive[key] = StorageWeakRef(storage), storage.nbytes()
            self.now += storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.now)


def _joined(model) -> list[list[torch.Tensor]]:
    """The weights of each group of linears that share one product."""
    units = fused_units(model, find_sites(model))
    modules = [[model.get_submodule(name) for name in unit] for unit in units if "experts" not in unit[0]]
    return [[each.weight for each in unit] for unit in modules if all(isinstance(each, nn.Linear) for each in unit)]


class _Kernels(TorchFunctionMode):
    """What takes the place of functions whose kernels hold less, or more, than their plain form on the meta device:
    attention keeps no scores, linears with one input share a product, and on CPUs products of many rows unpack a weight
    block by block (`numerics.dense`)."""

    def __init__(self, joined: list[list[torch.Tensor]], unpacks: bool):
        super().__init__()
        self._unpacks = unpacks
        # storage of a weight -> (its group, its number there); what the whole group is multiplied as
        self._groups = {
            place_of(w)[0]: (group, at) for group, weights in enumerate(joined) for at, w in enumerate(weights)
        }
        self._sizes = [[len(weight) for weight in weights] for weights in joined]
        self._whole = [weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1]) for weights in joined]
        self._parts: dict[int, dict[int, torch.Tensor]] = {}

    def __torch_function__(self, function, types, args=(), kwargs: Mapping | None = None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if function is torch.Tensor.__contains__:
            return False  # transformers looks for padding
        if function is torch.nn.functional.linear and len(args) > 1:
            return self._linear(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        group, at = self._groups.get(place_of(weight)[0], (None, 0))
        if group is None:
            return self._product(x, weight)
        parts = self._parts.setdefault(group, {})
        if at not in parts:
            parts.update(enumerate(self._product(x, self._whole[group]).split(self._sizes[group], -1)))
        return parts.pop(at)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._unpacks and dense_is_faster(rows):
            made = dense.product(rows, _blocks(weight, rows.dtype), len(weight), None)
            return made.view(*x.shape[:-1], len(weight))
        return x.new_empty(*x.shape[:-1], len(weight))


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Blocks of a weight as a kernel unpacks them: to float32, then to what the machine multiplies."""
    step = max(1, dense.BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        stop = min(start + step, len(weight))
        block = weight.new_empty(stop - start, weight.shape[1], dtype=torch.float32)
        yield start, stop, block.to(dense.gemm_dtype(dtype))
