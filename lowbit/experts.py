"""Fused experts whose matrices stay quantized, for any experts module of transformers.

transformers keeps the experts of a layer as 3-D parameters `gate_up_proj` and `down_proj` and indexes them by expert in
its eager forward. So the forward stays as its authors wrote it: only the parameter is replaced, by `ExpertWeights`, an
object that dequantizes the matrix of an expert when it is indexed. The packed tensors are parameters of the same module
under the names that transformers merges per-expert checkpoint tensors into: `gate_up_proj_packed`, ...
"""

import torch
from torch import nn

from lowbit.formats import compressed_tensors as packed_format
from lowbit.grid import dequantize
from lowbit.qweight import QuantWeight
from lowbit.scheme import Scheme


def packed_name(parameter: str, suffix: str) -> str:
    """gate_up_proj, weight_scale -> gate_up_proj_scale"""
    return parameter + suffix.removeprefix("weight")


class ExpertWeights:
    """Stands in for a 3-D expert parameter: `weights[e]` is the dense matrix of expert e, laid out as before."""

    # transformers leaves what it takes for loaded out of its weight initialisation
    _is_hf_initialized = True

    def __init__(
        self, module: nn.Module, parameter: str, scheme: Scheme, shape: tuple[int, int, int], transposed: bool, dtype
    ):
        # the dict rather than the module: it follows .to() and deepcopy, and makes no module its own child
        self._tensors = module._parameters
        self.parameter, self.scheme, self.transposed, self.dtype = parameter, scheme, transposed, dtype
        self.experts, self.out_features, self.in_features = shape

    def tensors(self) -> dict[str, torch.Tensor]:
        return {s: self._tensors[packed_name(self.parameter, s)] for s in packed_format.suffixes(self.scheme)}

    def quantized(self, expert: int) -> QuantWeight:
        tensors = {suffix: tensor[expert] for suffix, tensor in self.tensors().items()}
        return packed_format.unpack_weight(tensors, self.scheme, self.out_features, self.in_features)

    def __getitem__(self, expert) -> torch.Tensor:
        return self._dense(int(expert), None)

    def _dense(self, expert: int, dtype: torch.dtype | None) -> torch.Tensor:
        weight = dequantize(self.quantized(expert), dtype)
        return weight.T if self.transposed else weight

    def __len__(self) -> int:
        return self.experts

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
        return torch.stack([self._dense(expert, dtype) for expert in range(self.experts)])


def quantize_experts(module: nn.Module, parameter: str, scheme: Scheme, dtype: torch.dtype, merged: int = 1) -> None:
    """Give an experts module the packed parameters (uninitialised) and the `ExpertWeights` of a 3-D parameter.

    merged: how many checkpoint tensors of an expert are laid side by side in the parameter (2 for gate and up); their
    `weight_shape`s are merged the same way. The dense parameter stays until `finish_experts`, for a loader to fill.
    """
    dense = module._parameters[parameter]
    experts, rows, columns = dense.shape
    out_features, in_features = (columns, rows) if module.is_transposed else (rows, columns)
    for suffix, (shape, stored) in packed_format.shapes(scheme, out_features, in_features).items():
        if suffix == "weight_shape":
            shape = (2 * merged,)
        tensor = torch.empty((experts, *shape), dtype=stored or dtype, device=dense.device)
        module.register_parameter(packed_name(parameter, suffix), nn.Parameter(tensor, requires_grad=False))
    weights = ExpertWeights(
        module, parameter, scheme, (experts, out_features, in_features), module.is_transposed, dtype
    )
    module.__dict__.setdefault("_expert_weights", {})[parameter] = weights
    # the other implementations multiply with the whole parameter at once; the eager one takes expert after expert
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"


def pack_experts(
    weights: torch.Tensor, scheme: Scheme, transposed: bool, merged: int, quantize
) -> dict[str, torch.Tensor]:
    """Quantize a dense 3-D parameter with `quantize(matrix [N, K]) -> QuantWeight`; packed tensors by suffix."""
    packed = [packed_format.pack(quantize(w.T.contiguous() if transposed else w)) for w in weights]
    stacked = {suffix: torch.stack([part[suffix] for part in packed]) for suffix in packed[0]}
    shapes = stacked["weight_shape"].clone()
    shapes[:, 0] //= merged
    stacked["weight_shape"] = shapes.repeat(1, merged)
    return stacked


def finish_experts(module: nn.Module, parameter: str) -> None:
    """Drop the dense parameter; from here on the name gives the `ExpertWeights`."""
    del module._parameters[parameter]
    module.__dict__[parameter] = module._expert_weights[parameter]


def expert_weights(module: nn.Module) -> dict[str, ExpertWeights]:
    """The quantized parameters of a module by name; empty if it is not a quantized experts module."""
    return module.__dict__.get("_expert_weights", {})


def restore_experts(module: nn.Module, dtype: torch.dtype) -> None:
    """Back to dense 3-D parameters."""
    for parameter, weights in expert_weights(module).items():
        dense = weights.dequantize(dtype)
        for suffix in packed_format.suffixes(weights.scheme):
            del module._parameters[packed_name(parameter, suffix)]
        module.__dict__.pop(parameter, None)
        module.register_parameter(parameter, nn.Parameter(dense, requires_grad=False))
    module.__dict__.pop("_expert_weights", None)
