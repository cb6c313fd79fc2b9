"""Models whose weights several processes share: packed tensors are cut while they load, what is dense afterwards, and
what the parts compute is put together in the forward passes."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from transformers import ConversionOps, PreTrainedModel, WeightConverter

from lowbit.errors import UsageError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.packed import QuantizedSite
from lowbit.hf.shares import Share, Shares
from lowbit.layers.experts import QuantizedExperts, packed_name
from lowbit.layers.linear import LowbitLinear
from lowbit.parallel import EXPERTS, INPUTS, OUTPUTS, Part, Ranks


class CutPacked(ConversionOps):
    """Packed tensors of a weight -> those of this process."""

    def __init__(self, sites: Mapping[str, QuantizedSite], shares: Shares):
        self._suffixes: dict[str, tuple[str, str]] = {}  # full name -> (parameter, suffix)
        for name in shares.weights.keys() & sites.keys():
            found = sites[name]
            for suffix in packed_format.suffixes(found.scheme):
                full = packed_name(name, suffix) if found.site.kind == "experts" else f"{found.site.module}.{suffix}"
                self._suffixes[full] = name, suffix
        self._sites, self._shares = sites, shares

    def __deepcopy__(self, memo):
        return self  # transformers copies operations for every parameter; this one has no state of its own

    def convert(self, input_dict, full_layer_name=None, source_patterns=None, target_patterns=None, **kwargs):
        made = {}
        for key, tensor in input_dict.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            # the first operation is handed what was read under the pattern that it was found by
            target = target_patterns[0] if key in source_patterns else key
            made[target] = self.cut(full_layer_name.replace(target_patterns[0], target), tensor)
        return made

    def cut(self, full_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a packed tensor; others are given back as they are."""
        if full_name not in self._suffixes:
            return tensor
        name, suffix = self._suffixes[full_name]
        site, share = self._sites[name].site, self._shares.weights[name]
        shape = site.out_features, site.in_features
        return packed_format.part_of(suffix, tensor, self._sites[name].scheme, shape, share.dim, share.part)

    def in_conversions(self, conversions: list) -> list:
        """Those by which packed tensors load, each with this operation at its end, and new ones for the tensors that
        would load as they are. In transformers 5.17 a conversion of plain weights takes their packed tensors, too."""
        if not self._suffixes:
            return conversions
        for conversion in conversions:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [*conversion.operations, self]
        taken = {source for conversion in conversions for source in getattr(conversion, "source_patterns", ())}
        endings = {full.rpartition(".")[2] for full in self._suffixes}
        made = [WeightConverter(rf"\.{ending}$", f".{ending}", [self]) for ending in sorted(endings)]
        return conversions + [each for each in made if taken.isdisjoint(each.source_patterns)]


def cut_dense(model: PreTrainedModel, shares: Shares) -> None:
    """Let the weights that are dense, biases and the like be those of this process, and its forward passes give what
    those of one process give."""
    tied = model.get_input_embeddings().weight if model.get_input_embeddings() is not None else None
    for share in shares.weights.values():
        if share.site.kind == "experts":
            continue
        module = model.get_submodule(share.site.module)
        if not isinstance(module, LowbitLinear):
            _cut_linear(module, share, view=module.weight is tied)
        if (bias := dict(module.named_parameters(recurse=False)).get("bias")) is not None:
            module.bias = _cut_bias(bias, share)
        _join_linear(module, share, shares.ranks)
    for name in dict.fromkeys(s.site.parameter.rpartition(".")[0] for s in _experts(shares)):
        _divide_experts(model.get_submodule(name), shares.of_experts(name), shares.ranks)
    for name, part in shares.vectors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, _parameter(part.of(module.get_parameter(leaf), 0)))
    model.lowbit_ranks = shares.ranks  # type: ignore[assignment]  # a module has tensors and modules


def _experts(shares: Shares) -> list[Share]:
    return [share for share in shares.weights.values() if share.site.kind == "experts"]


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _cut_linear(module: nn.Module, share: Share, view: bool) -> None:
    """view: the weight is the table of an embedding, too: no copy of its part is made."""
    dim = share.dim if not share.site.transposed else {INPUTS: OUTPUTS, OUTPUTS: INPUTS}[share.dim]
    weight = share.part.of(module.get_parameter("weight").detach(), dim)
    module.weight = nn.Parameter(weight, requires_grad=False) if view else _parameter(weight)
    _, out_features, in_features = share.shape
    if share.site.transposed:
        module.nf, module.nx = out_features, in_features  # type: ignore[assignment]  # not all are tensors
    else:
        module.out_features, module.in_features = out_features, in_features  # type: ignore[assignment]


def _cut_bias(bias: nn.Parameter, share: Share) -> nn.Parameter:
    """[..., out_features]. Of products that are summed over processes, the first one adds the bias."""
    if share.dim == OUTPUTS:
        return _parameter(share.part.of(bias, -1))
    return _parameter(bias if share.part.rank == 0 else torch.zeros_like(bias))


def _join_linear(module: nn.Module, share: Share, ranks: Ranks) -> None:
    if share.dim == INPUTS:
        if share.whole_side:
            module.register_forward_pre_hook(partial(_cut_input, share.part))
        module.register_forward_hook(partial(_sum_output, ranks))
    elif share.whole_side:
        module.register_forward_hook(partial(_join_output, ranks))


def _cut_input(part: Part, module: nn.Module, args: tuple) -> tuple:
    return part.of(args[0], -1), *args[1:]


def _sum_output(ranks: Ranks, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    _refuse_gradients(output)
    return ranks.summed(output)


def _join_output(ranks: Ranks, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    _refuse_gradients(output)
    return ranks.joined(output)


def _refuse_gradients(output: torch.Tensor) -> None:
    if output.requires_grad:
        raise UsageError("a model that several processes share only runs: load it in one process to train it")


def _divide_experts(module: nn.Module, shares: Mapping[str, Share], ranks: Ranks) -> None:
    by_expert = any(share.dim == EXPERTS for share in shares.values())
    held = dict(module.named_parameters(recurse=False))
    for leaf, share in shares.items():
        dim = share.dim
        if share.site.transposed and dim != EXPERTS:
            dim = {INPUTS: OUTPUTS, OUTPUTS: INPUTS}[dim]
        if leaf in held:  # it is dense
            setattr(module, leaf, _parameter(share.part.of(held[leaf].detach(), dim)))
        bias = held.get(f"{leaf}_bias")
        if bias is not None:
            setattr(module, f"{leaf}_bias", _parameter(share.part.of(bias, 0)) if by_expert else _cut_bias(bias, share))
    if by_expert:
        count = next(iter(shares.values())).shape[0]
        module.num_experts = count  # type: ignore[assignment]  # a module has tensors and modules
        module.register_forward_pre_hook(partial(_own_experts, ranks.rank, count))
    module.register_forward_hook(partial(_sum_output, ranks))


def _own_experts(rank: int, count: int, module: nn.Module, args: tuple) -> tuple:
    """Of hidden states, the experts of each token and their weights: those of experts that are here, the others with
    a weight of 0."""
    hidden, experts, weights, *others = args
    elsewhere = experts // count != rank
    # products leave out what is beyond the last expert; a forward of their authors may look for each expert by number
    absent = count if isinstance(module, QuantizedExperts) and module.is_prepared else 0
    experts = torch.where(elsewhere, absent, experts % count)
    return hidden, experts, weights.masked_fill(elsewhere, 0), *others
