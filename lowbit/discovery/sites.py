"""The weight matrices of a model, found from its modules: no table of architectures.

A `Site` is one weight matrix: that of an `nn.Linear`, of GPT-2's `Conv1D` (stored transposed), of the input embedding
(a row for each token), or a fused 3-D parameter of an experts module (one matrix per expert). Sites are found on a
model without data and then matched to checkpoint names through the same renaming rules that transformers applies when
it loads.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call


@dataclass(frozen=True)
class Site:
    """A weight matrix of a model: `parameter` is its name in the model, `module` the name that configs know it by."""

    parameter: str
    kind: str  # "linear", "conv1d", "experts" or "embedding"
    out_features: int  # of an embedding, its rows
    in_features: int
    transposed: bool = False  # stored as [in_features, out_features]
    experts: int = 0
    routed: bool = False  # experts that are called with hidden states, the experts of each token and their weights
    is_head: bool = False  # the output embedding

    @property
    def module(self) -> str:
        return self.parameter.removesuffix(".weight")

    @property
    def part(self) -> dict[str, bool]:
        """What `Recipe.asked_for` has to know of it."""
        return {"is_head": self.is_head, "is_embedding": self.kind == "embedding"}

    @property
    def class_name(self) -> str:
        """The class of modules by which a config means it."""
        return "Embedding" if self.kind == "embedding" else "Linear"

    @property
    def names(self) -> tuple[str, ...]:
        """What a recipe or a config may call it. Fused experts are also known by the names of their unfused linears."""
        if self.kind != "experts":
            return (self.module,)
        owner, _, leaf = self.parameter.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj")}.get(leaf, (leaf,))
        return (self.parameter, owner, *(f"{owner}.0.{part}" for part in parts))


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every weight matrix of the model that a format could hold, by parameter name, in module order."""
    from transformers import Conv1D

    sites, head, embedding = {}, head_of(model), embedding_of(model)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if _is_linear(module):
            sites[prefix + "weight"] = Site(
                prefix + "weight", "linear", module.out_features, module.in_features, is_head=module is head
            )
        elif module is embedding:
            rows, columns = module.weight.shape
            sites[prefix + "weight"] = Site(prefix + "weight", "embedding", rows, columns)
        elif isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            sites[prefix + "weight"] = Site(prefix + "weight", "conv1d", columns, rows, transposed=True)
        elif parameters := expert_parameters(module):
            transposed, routed = _is_transposed(module, list(parameters.values())), hasattr(module, "is_transposed")
            for leaf, parameter in parameters.items():
                experts, rows, columns = parameter.shape
                out_features, in_features = (columns, rows) if transposed else (rows, columns)
                sites[prefix + leaf] = Site(
                    prefix + leaf, "experts", out_features, in_features, transposed, experts, routed
                )
    return sites


def _is_linear(module: nn.Module) -> bool:
    """An nn.Linear, or a subclass of it that computes the same: tried on a small weight."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    x, weight = torch.arange(6.0, device="cpu").view(2, 3), torch.arange(12.0, device="cpu").view(4, 3).sin()
    parameters = {"weight": weight} | ({} if module.bias is None else {"bias": torch.arange(4.0, device="cpu")})
    try:
        with torch.no_grad():
            return torch.allclose(functional_call(module, parameters, (x,)), nn.functional.linear(x, **parameters))
    except Exception:  # whatever else it wants, it is more than a linear
        return False


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters of a module that holds experts: one that counts as many of them, by whatever name, as their
    first dimension is long."""
    kind = type(module).__name__.lower()
    counts = {value for name, value in vars(module).items() if "expert" in name + kind and type(value) is int}
    found = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return found if counts & {p.shape[0] for p in found.values()} else {}


def _is_transposed(module: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Whether experts are stored as [in_features, out_features]. transformers marks most; elsewhere the last parameter
    tells, which puts out what the first one takes in."""
    first, last = parameters[0], parameters[-1]
    by_shape = first.shape[1] == last.shape[2] and first.shape[2] != last.shape[1]
    return getattr(module, "is_transposed", by_shape)


# What modules that work by heads have one of
_OF_HEADS = ("head_dim", "qk_head_dim", "v_head_dim", "num_heads")


def heads_in(model: nn.Module, site: Site, outputs: bool) -> int:
    """How many heads of attention the outputs of a linear are for, or its inputs come from; 0 outside of attention."""
    parent = model.get_submodule(site.module.rpartition(".")[0])
    if site.kind == "experts" or not any(hasattr(parent, name) for name in _OF_HEADS):
        return 0
    length, size = site.out_features if outputs else site.in_features, getattr(parent, "head_dim", None)
    if isinstance(size, int) and size and length % size == 0:
        return length // size
    return getattr(model.config.get_text_config(), "num_attention_heads", 0)  # type: ignore[operator, union-attr]


def head_of(module: nn.Module) -> nn.Module | None:
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


def embedding_of(model: nn.Module) -> nn.Embedding | None:
    """The input embedding: what turns token ids into hidden states. None, where a model has none that is a table."""
    try:
        found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # what transformers raises for a model that it does not know them of
        return None
    return found if isinstance(found, nn.Embedding) else None
