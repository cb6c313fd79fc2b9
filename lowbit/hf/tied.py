"""Output embeddings that are tied to a quantized input embedding: one table in the file, two layers that read it.

llm-compressor stores such a table once, under the name of the input embedding. transformers ties parameters by name: so
each packed tensor of the head is tied to the one of the embedding while the model loads, and both go their own way
after that, since a backend lays the head out in its own form.
"""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from lowbit.discovery import Site, head_beside, table_and_heads
from lowbit.errors import InputError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.foreign import StoredModel
from lowbit.hf.packed import QuantizedSite
from lowbit.numerics.scheme import Scheme
from lowbit.transformers_api import tie, tied_weights, untie


def tied_to_quantized(model: nn.Module, source: StoredModel, sites: Mapping[str, Site]) -> dict[str, QuantizedSite]:
    """What of `model` is tied to a quantized embedding, and quantized as that is: parameter -> QuantizedSite. From here
    on its tensors are tied to those of the embedding, unless the checkpoint has others for it.

    Raises InputError for a parameter that is tied to the embedding and is no linear.
    """
    quantized, found, names = source.sites, {}, {}
    stored = {source.names.locate(name)[0] for name, _ in source.tensors}
    for parameter, target in tied_weights(model).items():
        if target not in quantized or quantized[target].site.kind != "embedding" or parameter in stored:
            continue
        if parameter not in sites or sites[parameter].kind != "linear":
            raise InputError(f"{parameter} is tied to {target}, which is quantized, and is no linear that can be")
        found[parameter] = QuantizedSite(sites[parameter], quantized[target].scheme)
        for suffix in packed_format.suffixes(quantized[target].scheme):
            names[f"{sites[parameter].module}.{suffix}"] = f"{quantized[target].site.module}.{suffix}"
    if _has_embedding(quantized):
        tie(model, names)
    return found


def untie_from_table(model: nn.Module, sites: Mapping[str, Site], embeddings: Scheme) -> dict[str, QuantizedSite]:
    """The output embeddings that are tied to the input embedding, which is about to be quantized to `embeddings`:
    parameter -> QuantizedSite. From here on they are none. Raises UsageError for a table that cannot be quantized."""
    _, heads = table_and_heads(model, sites)
    if heads:
        untie(model)
    return {name: QuantizedSite(sites[name], head_beside(embeddings)) for name in heads}


def untie_quantized(model: PreTrainedModel, quantized: Mapping[str, QuantizedSite]) -> None:
    """What is loaded is saved as a model with a head of its own."""
    if _has_embedding(quantized):
        untie(model)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _has_embedding(quantized: Mapping[str, QuantizedSite]) -> bool:
    return any(found.site.kind == "embedding" for found in quantized.values())
