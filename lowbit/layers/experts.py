"""Fused experts whose matrices stay quantized, for any experts module of transformers.

transformers keeps the experts of a layer as 3-D parameters, `gate_up_proj` (or `up_proj`) and `down_proj`. Quantized, a
parameter is replaced by `ExpertWeights`, and the module's class by one that is a `QuantizedExperts` too. Like a
LowbitLinear, such a module has two states. *Packed*: the tensors of a checkpoint are its parameters, under the names
that transformers merges per-expert tensors into (`gate_up_proj_packed`, ...), and the eager forward of its authors
indexes `ExpertWeights` by expert, which dequantizes that matrix. *Prepared*: the buffers of a backend have taken their
place, and the forward multiplies the rows of all experts at once. What no backend can run stays packed.
"""

import logging
from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from lowbit.backends import EXACT, choose_for_experts, get_backend, inputs_of, product_of
from lowbit.formats import compressed_tensors as packed_format
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit.torch_api import buffer_dict, parameter_dict
from lowbit.transformers_api import experts_have_gate, gated, mark_loaded, normed

logger = logging.getLogger("lowbit")


def packed_name(parameter: str, suffix: str) -> str:
    """gate_up_proj, weight_scale -> gate_up_proj_scale"""
    return parameter + suffix.removeprefix("weight")


def stacked(parts: Iterable[dict[str, torch.Tensor]], count: int) -> dict[str, torch.Tensor]:
    """[count, ...] of each tensor. Beside the result there is one part at a time, if `parts` is lazy."""
    made: dict[str, torch.Tensor] = {}
    for number, part in enumerate(parts):
        for name, tensor in part.items():
            if name not in made:
                made[name] = tensor.new_empty(count, *tensor.shape)
            made[name][number] = tensor
    return made


class ExpertWeights:
    """Stands in for a 3-D expert parameter: `weights[e]` is the dense matrix of expert e, laid out as before.

    shape: (experts, out_features, in_features). backend: the name of that whose buffers hold them, None if packed.
    """

    def __init__(
        self, module: nn.Module, parameter: str, scheme: Scheme, shape: tuple[int, int, int], transposed: bool
    ):
        # the dicts rather than the module: they follow .to() and deepcopy, and make no module its own child
        self._parameters, self._buffers = parameter_dict(module), buffer_dict(module)
        mark_loaded(self)  # transformers leaves what it takes for loaded out of its weight initialisation
        self.parameter, self.scheme, self.transposed, self.shape = parameter, scheme, transposed, shape
        self.backend: str | None = None
        self.inputs = EXACT

    def choose_inputs(self, exact: bool | None) -> None:
        """See `LowbitLinear.choose_inputs`."""
        if self.backend is not None:
            self.inputs = inputs_of(self.backend, self.scheme, exact)
            # looked up once: torch.compile does not trace imports
            self.multiply = product_of(self.backend, self.inputs, "experts")

    def packed(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint by suffix, [experts, ...]."""
        if self.backend is None:
            suffixes = packed_format.suffixes(self.scheme)
            return {suffix: self._parameters[packed_name(self.parameter, suffix)] for suffix in suffixes}
        parts = (packed_format.pack(self.quantized(expert)) for expert in range(len(self)))
        # the shapes of what was merged were kept
        return stacked(parts, len(self)) | {"weight_shape": self._parameters[f"{self.parameter}_shape"]}

    def prepared(self) -> dict[str, torch.Tensor]:
        """The buffers of the backend, [experts, ...]."""
        return {name: self._buffers[f"{self.parameter}_{name}"] for name in self.buffer_names}

    def quantized(self, expert: int) -> QuantWeight:
        tensors = self.packed() if self.backend is None else self.prepared()
        tensors = {name: tensor[expert] for name, tensor in tensors.items()}
        if self.backend is None:
            return packed_format.unpack_weight(tensors, self.scheme, *self.shape[1:])
        return get_backend(self.backend).restore(tensors, self.scheme, self.shape[1:])

    def __getitem__(self, expert) -> torch.Tensor:
        return self._dense(int(expert), None)

    def _dense(self, expert: int, dtype: torch.dtype | None) -> torch.Tensor:
        weight = dequantize(self.quantized(expert), dtype)
        return weight.T if self.transposed else weight

    def __len__(self) -> int:
        return self.shape[0]

    # Some modules multiply with the whole parameter at once: there it is dense, for as long as that takes
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*(a.dequantize() if isinstance(a, cls) else a for a in args), **(kwargs or {}))

    def __getattr__(self, name):
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        return getattr(self.dequantize(), name)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The 3-D parameter as it was before quantization, up to its rounding."""
        return torch.stack([self._dense(expert, dtype) for expert in range(len(self))])


class QuantizedExperts(nn.Module):
    """What the class of an experts module gains when its parameters are quantized."""

    _expert_weights: dict[str, ExpertWeights]
    wanted_backend: str | None = None
    exact: bool | None = True
    loaded = False  # whether `prepare` was called: before, loaders look for the packed parameters

    @property
    def is_prepared(self) -> bool:
        return all(weights.backend is not None for weights in self._expert_weights.values())

    def prepare(self, wanted: str | None = None) -> "QuantizedExperts":
        """Lay the weights out for a backend, `wanted` or an error, else the first that can run them; after loading,
        and again after each move. Does nothing if done, or if there is no backend for all of them."""
        self.loaded, self.wanted_backend = True, wanted
        if self.is_prepared:
            return self
        has_gate = experts_have_gate(self)
        if has_gate is None or self._expert_weights.keys() != {"gate_up_proj" if has_gate else "up_proj", "down_proj"}:
            _warn_packed(type(self).__name__)
            return self
        chosen = {}
        for name, weights in self._expert_weights.items():
            scales = weights.packed()["weight_scale"]
            if scales.device.type == "meta":
                return self
            chosen[name] = choose_for_experts(weights.scheme, scales.device, scales.dtype, weights.shape, wanted)
        if None not in chosen.values():
            for name, backend in chosen.items():
                self._prepare(self._expert_weights[name], backend)
        return self

    def _prepare(self, weights: ExpertWeights, backend: str) -> None:
        run = get_backend(backend)
        buffers = stacked((run.prepare(weights.quantized(expert)) for expert in range(len(weights))), len(weights))
        for suffix in packed_format.suffixes(weights.scheme):
            if suffix != "weight_shape":
                delattr(self, packed_name(weights.parameter, suffix))
        for name, buffer in buffers.items():
            self.register_buffer(f"{weights.parameter}_{name}", buffer, persistent=False)
        weights.backend, weights.buffer_names = backend, tuple(buffers)
        weights.choose_inputs(self.exact)

    def choose_inputs(self, exact: bool | None) -> None:
        """See `LowbitLinear.choose_inputs`."""
        self.exact = exact
        for weights in self._expert_weights.values():
            weights.choose_inputs(exact)

    def unprepare(self) -> "QuantizedExperts":
        """Back to the packed state."""
        for weights in self._expert_weights.values():
            if weights.backend is not None:
                packed = weights.packed()
                for name in weights.buffer_names:
                    delattr(self, f"{weights.parameter}_{name}")
                weights.backend = None
                for suffix, tensor in packed.items():
                    parameter = nn.Parameter(tensor, requires_grad=False)
                    self.register_parameter(packed_name(weights.parameter, suffix), parameter)
        return self

    def _apply(self, fn, recurse=True):
        # A backend's layout belongs to one device and dtype: .to() and .half() move the packed tensors instead
        self.unprepare()
        super()._apply(fn, recurse)
        return self.prepare(self.wanted_backend) if self.loaded else self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for weights in self._expert_weights.values():
            for suffix, tensor in weights.packed().items():
                destination[prefix + packed_name(weights.parameter, suffix)] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, *args, **kwargs):
        self.unprepare()
        super()._load_from_state_dict(*args, **kwargs)
        if self.loaded:
            self.prepare(self.wanted_backend)

    def forward(self, *args, **kwargs):
        return (self._grouped_forward if self.is_prepared else super().forward)(*args, **kwargs)

    def _grouped_forward(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """What transformers' `grouped_mm_experts_forward` computes, with a backend's product.

        hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]. An index beyond the experts is one that
        expert parallelism has put on another machine, and adds nothing. Nothing waits for the GPU.
        """
        expert, order = top_k_index.flatten().sort()
        bounds = torch.arange(len(self._expert_weights["down_proj"]) + 1, dtype=expert.dtype, device=expert.device)
        start = torch.searchsorted(expert, bounds, out_int32=True)
        rows = hidden_states[order // top_k_index.shape[-1]]
        if self.has_gate:
            rows = gated(self, self._product("gate_up_proj", rows, start))
        else:
            rows = self.act_fn(self._product("up_proj", rows, start))
        rows = self._product("down_proj", rows, start)
        rows = normed(self, rows)
        rows = rows * top_k_weights.flatten()[order, None]
        rows = torch.empty_like(rows).index_copy_(0, order, rows)
        return rows.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _product(self, parameter: str, rows: torch.Tensor, expert_start: torch.Tensor) -> torch.Tensor:
        weights = self._expert_weights[parameter]
        bias = getattr(self, f"{parameter}_bias") if self.has_bias else None
        return weights.multiply(rows, weights.prepared(), expert_start, weights.scheme, weights.shape, bias)


@cache
def _warn_packed(name: str) -> None:
    logger.warning("%s multiplies its experts one by one, which takes longer: its own forward runs them", name)


@cache
def _quantized_class(experts_class: type) -> type:
    return type(f"Quantized{experts_class.__name__}", (QuantizedExperts, experts_class), {})


def quantize_experts(
    module: nn.Module,
    parameter: str,
    scheme: Scheme,
    dtype: torch.dtype,
    merged: int = 1,
    held: tuple[int, int, int] | None = None,
) -> None:
    """Give an experts module the packed parameters (uninitialised) and the `ExpertWeights` of a 3-D parameter.

    merged: how many checkpoint tensors of an expert are laid side by side in the parameter (2 for gate and up); their
    `weight_shape`s are merged the same way. held: (experts, out_features, in_features) of what this process has of it
    (default: all). The dense parameter stays until `finish_experts`, for a loader to fill.
    """
    dense = module.get_parameter(parameter)
    experts, rows, columns = dense.shape
    out_features, in_features = (columns, rows) if module.is_transposed else (rows, columns)
    experts, out_features, in_features = held or (experts, out_features, in_features)
    for suffix, (shape, stored) in packed_format.shapes(scheme, out_features, in_features).items():
        if suffix == "weight_shape":
            shape = (2 * merged,)
        tensor = torch.empty((experts, *shape), dtype=stored or dtype, device=dense.device)
        module.register_parameter(packed_name(parameter, suffix), nn.Parameter(tensor, requires_grad=False))
    if not isinstance(module, QuantizedExperts):
        module.__class__ = _quantized_class(type(module))
        module._expert_weights = {}
    shape = (experts, out_features, in_features)
    module._expert_weights[parameter] = ExpertWeights(module, parameter, scheme, shape, module.is_transposed)


def pack_experts(
    weights: torch.Tensor, scheme: Scheme, transposed: bool, merged: int, quantize
) -> dict[str, torch.Tensor]:
    """Quantize a dense 3-D parameter with `quantize(matrix [N, K]) -> QuantWeight`; packed tensors by suffix."""
    parts = (packed_format.pack(quantize(w.T.contiguous() if transposed else w)) for w in weights)
    merged_parts = stacked(parts, len(weights))
    shapes = merged_parts["weight_shape"].clone()
    shapes[:, 0] //= merged
    merged_parts["weight_shape"] = shapes.repeat(1, merged)
    return merged_parts


def finish_experts(module: nn.Module, parameter: str) -> None:
    """Drop the dense parameter; from here on the name gives the `ExpertWeights`."""
    delattr(module, parameter)
    module.__dict__[parameter] = module._expert_weights[parameter]


def expert_weights(module: nn.Module) -> dict[str, ExpertWeights]:
    """The quantized parameters of a module by name; empty if it is not a quantized experts module."""
    return module._expert_weights if isinstance(module, QuantizedExperts) else {}


def restore_experts(module: nn.Module, dtype: torch.dtype) -> None:
    """Back to dense 3-D parameters and the class it was."""
    if not isinstance(module, QuantizedExperts):
        return
    for parameter, weights in module.unprepare()._expert_weights.items():
        dense = weights.dequantize(dtype)
        for suffix in packed_format.suffixes(weights.scheme):
            delattr(module, packed_name(parameter, suffix))
        module.__dict__.pop(parameter, None)
        module.register_parameter(parameter, nn.Parameter(dense, requires_grad=False))
    del module._expert_weights
    module.__class__ = type(module).__bases__[1]
