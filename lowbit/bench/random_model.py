"""Models of given shapes with random weights, made tensor by tensor in the form in which they run: no dense copy of a
quantized model, no file."""

import torch
from torch import nn

from lowbit.discovery import choose, skeleton
from lowbit.errors import InputError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.layers.experts import QuantizedExperts, finish_experts, quantize_experts
from lowbit.layers.inputs import choose_inputs
from lowbit.layers.linear import LowbitLinear
from lowbit.layers.shared_product import share_products
from lowbit.numerics.scheme import Recipe, Scheme

# Values do not change how long a product takes: this many random ones, over and over
_BLOCK = 2**22


def dense_model(config, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> nn.Module:
    """A model of transformers with random weights."""
    return _filled(_without_weights(config, dtype), torch.device(device))


def quantized_model(
    config,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    lm_head: Scheme | None = None,
    exact: bool | None = None,
) -> nn.Module:
    """The same with random codes in what a Recipe of `scheme` quantizes, prepared for `backend` or the first that can.
    lm_head: of the output embedding, which is not tied then; by default it stays dense. exact: see `choose_inputs`. As
    `lowbit.load` does, linears that share an input share a product.

    Raises BackendError where `backend` cannot run a layer.
    """
    model = _without_weights(config, dtype)
    chosen, left = choose(model, Recipe(scheme))
    sites = list(chosen.values())
    if lm_head is not None:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        sites.append((left[f"{head}.weight"][0], lm_head.fitted(config.get_text_config().hidden_size)))
    for site, fitted in sites:
        owner_name, _, leaf = site.parameter.rpartition(".")
        owner = model.get_submodule(owner_name)
        if site.kind == "experts":
            quantize_experts(owner, leaf, fitted, dtype)
            finish_experts(owner, leaf)
            continue
        with torch.device("meta"):
            layer = LowbitLinear(site.in_features, site.out_features, fitted, owner.bias is not None, dtype, backend)
        layer.transposed = site.transposed
        model.set_submodule(site.module, layer)
    _filled(model, torch.device(device))
    share_products(model)
    for module in model.modules():
        if isinstance(module, LowbitLinear):
            module.prepare()
        elif isinstance(module, QuantizedExperts):
            module.prepare(backend)
    choose_inputs(model, exact)
    return model


def stored_bytes(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a quantized weight ([experts,] out_features, in_features) in a checkpoint."""
    *experts, out_features, in_features = shape
    tensors = packed_format.shapes(scheme, out_features, in_features).values()
    one = sum(torch.Size(size).numel() * (stored or dtype).itemsize for size, stored in tensors)
    return one * torch.Size(experts).numel()


def weight_bytes(config, scheme: Scheme | None, dtype: torch.dtype) -> int:
    """Bytes of all weights of such a model, from its shapes alone. scheme: None for a dense one."""
    model = skeleton(config)
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if scheme is None:
        return total
    for site, fitted in choose(model, Recipe(scheme))[0].values():
        shape = (*([site.experts] if site.experts else []), site.out_features, site.in_features)
        total += stored_bytes(fitted, shape, dtype) - torch.Size(shape).numel() * dtype.itemsize
    return total


def check_memory(config, scheme: Scheme | None, dtype: torch.dtype, available: int) -> None:
    """Raise InputError if the weights do not fit into `available` bytes."""
    needed = weight_bytes(config, scheme, dtype)
    if needed > available:
        what = "unquantized" if scheme is None else scheme.name
        raise InputError(
            f"the weights take {needed / 1e9:.1f} GB {what}, and {available / 1e9:.1f} GB are free: pass --layers N to "
            f"run fewer than {config.num_hidden_layers} layers"
        )


def _without_weights(config, dtype: torch.dtype) -> nn.Module:
    """Parameters on the meta device, computed buffers (frequencies of positions) where they are computed."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = skeleton(config, device=None, dtype=dtype).eval()
    model.tie_weights()  # it makes every parameter anew
    return model


def _filled(model: nn.Module, device: torch.device) -> nn.Module:
    generator = torch.Generator(device).manual_seed(0)
    words = torch.randint(-(2**31), 2**31 - 1, (_BLOCK,), dtype=torch.int32, device=device, generator=generator)
    values = torch.randn(_BLOCK, device=device, generator=generator) * 0.02
    made = {}  # parameters that are tied stay one
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.is_meta:
                if id(parameter) not in made:
                    tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    made[id(parameter)] = nn.Parameter(_fill(tensor, words, values), requires_grad=False)
                setattr(module, name, made[id(parameter)])
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, buffer.to(device))
    return model


def _fill(tensor: torch.Tensor, words: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 1 and tensor.is_floating_point():  # norms
        return tensor.fill_(1.0)
    if tensor.dtype == torch.int64:  # shapes, which are read from files only
        return tensor.zero_()
    block = values if tensor.is_floating_point() else words
    for part in tensor.view(-1).split(_BLOCK):
        part.copy_(block[: part.numel()])
    return tensor
