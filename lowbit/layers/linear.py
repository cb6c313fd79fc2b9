"""LowbitLinear: a linear layer whose weight stays quantized."""

from dataclasses import replace

import torch
from torch import nn

from lowbit.backends import EXACT, choose, get_backend, inputs_of, product_of
from lowbit.formats import compressed_tensors as packed_format
from lowbit.layers.workspace import Workspace
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.reference import linear as reference_linear
from lowbit.numerics.scheme import Scheme
from lowbit.torch_api import buffer_dict, parameter_dict
from lowbit.transformers_api import mark_loaded


class LowbitLinear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] quantized by `scheme`, and x too if it says so.

    It has two states. *Packed*: the tensors of a compressed-tensors checkpoint are its parameters (`weight_packed`,
    `weight_scale`, ... as `formats.compressed_tensors` names them), so that checkpoints load into it by name.
    *Prepared*: `prepare` has turned them into the buffers of a backend; `packed_tensors` gives the packed ones back,
    bit for bit.

    act_order: inputs belong to groups as a further tensor says, `weight_g_idx`. Backends know nothing of it: they get
    the inputs sorted by group, here.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool,
        dtype: torch.dtype,
        backend: str | None = None,
        act_order: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features, self.scheme, self.dtype = in_features, out_features, scheme, dtype
        self.wanted_backend = backend
        self.exact: bool | None = True  # False: inputs may be rounded, None: where that was measured to cost little
        self.inputs = EXACT  # what `inputs_of` says, once it is prepared
        self.transposed = False  # stands in for a Conv1D
        self.backend: str | None = None
        self.shared = None  # the product that it has in common with others (lowbit.layers.shared_product)
        self.packed_shapes = packed_format.shapes(scheme, out_features, in_features)
        if act_order:
            self.packed_shapes["weight_g_idx"] = ((in_features,), torch.int32)
        for name, (shape, stored) in self.packed_shapes.items():
            self._set_packed(name, torch.empty(shape, dtype=stored or dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_quantized(
        cls, qweight: QuantWeight, bias: torch.Tensor | None = None, backend: str | None = None
    ) -> "LowbitLinear":
        with torch.device("meta"):
            layer = cls(
                qweight.in_features,
                qweight.out_features,
                qweight.scheme,
                bias is not None,
                qweight.scales.dtype,
                backend,
                act_order=qweight.g_idx is not None,
            )
        for name, tensor in _pack(qweight).items():
            layer._set_packed(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer.prepare()

    def __getattr__(self, name):
        # Some models look at `linear.weight` (its dtype, or to fold it into another product): it is made when asked for
        if name == "weight" and "weight" not in parameter_dict(self):
            weight = self.dequantize()
            return mark_loaded(weight)  # or transformers would "initialise" this copy when it loads a model
        return super().__getattr__(name)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _set_packed(self, name: str, tensor: torch.Tensor) -> None:
        # register_parameter would ask __getattr__ for a `weight` first
        parameter_dict(self)[name] = nn.Parameter(tensor, requires_grad=False)

    def add_placeholder(self, weight: torch.Tensor) -> None:
        """A dense `weight` parameter, as the slot that a loader fills with what it then quantizes."""
        self._set_packed("weight", weight)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors a compressed-tensors checkpoint holds for this layer, and weight_g_idx where there is one."""
        if self.backend is None:
            return {name: getattr(self, name).detach() for name in self.packed_shapes}
        return _pack(self.quantized_weight())

    def quantized_weight(self, codes: torch.Tensor | None = None) -> QuantWeight:
        """codes: uint8 [out_features, in_features], contiguous, where those of a packed weight are put (default: fresh
        memory)."""
        if self.backend is None:
            return packed_format.unpack_weight(self.packed_tensors(), self.scheme, *self.shape, codes)
        qweight = get_backend(self.backend).restore(self._prepared(), self.scheme, self.prepared_shape)
        qweight = qweight.rows(self.start, self.start + self.out_features)
        return qweight if self.order is None else qweight.in_input_order(self.order)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[out_features, in_features] in `dtype` (default: the layer's)."""
        return dequantize(self.quantized_weight(), dtype or self.dtype)

    def _prepared(self) -> dict[str, torch.Tensor]:
        buffers = buffer_dict(self)
        return {name: buffers[name] for name in self._prepared_names}

    def prepare(self, workspace: Workspace | None = None) -> "LowbitLinear":
        """Choose the backend for the device the layer is on and lay the weight out for it. Does nothing if done."""
        if self.backend is not None or self.weight_scale.device.type == "meta":
            return self
        workspace = workspace or Workspace()
        codes = workspace.codes(self.shape, self.device)
        qweight, order = self.quantized_weight(codes).in_group_order()
        backend = self.best_backend()
        self.lay_out(backend, workspace.prepare(backend, qweight), order)
        if self.shared is not None:
            self.shared.join()
        return self

    def lay_out(
        self,
        backend: str,
        buffers: dict[str, torch.Tensor],
        order: torch.Tensor | None,
        shape: tuple[int, int] | None = None,
        start: int = 0,
    ) -> None:
        """Run on the buffers of a backend. shape: of the weight in them, whose rows from `start` on are this layer's
        (default: no others are in it)."""
        if self.backend is None:
            self.dtype = self.weight_scale.dtype
            for name in self.packed_shapes:
                delattr(self, name)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self._prepared_names, self.backend = tuple(buffers), backend
        self.prepared_shape, self.start = shape or self.shape, start
        self.choose_inputs(self.exact)

    def choose_inputs(self, exact: bool | None) -> None:
        """Say whether inputs are multiplied as they are (True), may be rounded (False), or are rounded where that was
        measured to cost little (None)."""
        self.exact = exact
        if self.backend is not None:
            self.inputs = inputs_of(self.backend, self.scheme, exact)
            self.run = product_of(self.backend, self.inputs)  # looked up once: torch.compile does not trace imports

    @property
    def device(self) -> torch.device:
        return self.weight_scale.device if self.backend is None else next(iter(self._prepared().values())).device

    def best_backend(self) -> str:
        """The one that `prepare` lays the packed weight out for."""
        return choose(self.scheme, self.device, self.weight_scale.dtype, self.shape, self.wanted_backend)

    def unprepare(self) -> "LowbitLinear":
        """Back to the packed state."""
        if self.backend is not None:
            if self.shared is not None:
                self.shared.split()
            packed = self.packed_tensors()
            for name in (*self._prepared_names, "order"):
                delattr(self, name)
            self.backend = None
            for name, tensor in packed.items():
                self._set_packed(name, tensor)
        return self

    def _apply(self, fn, recurse=True):
        # A backend's layout belongs to one device and dtype: .to() and .half() move the packed tensors instead
        was_prepared = self.backend is not None
        self.unprepare()
        super()._apply(fn, recurse)
        self.dtype = self.weight_scale.dtype
        return self.prepare() if was_prepared else self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.backend is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, tensor in self.packed_tensors().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args, **kwargs):
        was_prepared = self.backend is not None
        self.unprepare()
        super()._load_from_state_dict(*args, **kwargs)
        if was_prepared:
            self.prepare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared is not None and self.shared.joined:
            return self.shared.take(self, x)
        return self.multiply(x, self.bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in_features] by all rows of the prepared weight, [..., prepared_shape[0]]."""
        if self.backend is None:  # never prepared: weights that accelerate moves in and out of every call
            bias = None if bias is None else bias.to(x.dtype)
            return reference_linear(x, self.quantized_weight(), bias)
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        if self.order is not None:
            rows = rows[:, self.order]
        y = self.run(rows, self._prepared(), self.scheme, self.prepared_shape, bias)
        return y.view(*x.shape[:-1], self.prepared_shape[0]).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, backend={self.backend}"
        )


def _pack(qweight: QuantWeight) -> dict[str, torch.Tensor]:
    if qweight.g_idx is None:
        return packed_format.pack(qweight)
    return {**packed_format.pack(replace(qweight, g_idx=None)), "weight_g_idx": qweight.g_idx}
