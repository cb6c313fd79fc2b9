"""What a run, or the plan of one, starts from: the checkpoint, its config, the model that they describe, the recipe."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowbit.checkpoint.untied import untied
from lowbit.discovery import CheckpointNames, find_sites, head_beside, skeleton, table_and_heads
from lowbit.numerics.scheme import Recipe


@dataclass(frozen=True)
class Source:
    """The tensors of a dense checkpoint, as a reader or as headers alone; its transformers config; the skeleton of the
    model that these describe; the recipe that it is quantized by."""

    reader: Any
    config: Any
    model: nn.Module
    recipe: Recipe


def opened(reader, config, recipe: Recipe, trust_remote_code: bool = False) -> Source:
    """What is quantized of the checkpoint behind `reader` by `recipe`.

    Readers look rows up in a table that is quantized, or multiply by it, and vLLM and transformers never both: where
    the input embedding is quantized, an output embedding that was tied to it becomes one of its own, in the scheme of
    `recipe.lm_head`, or else in 8 bits and the same groups: fewer cost a head much more than a table of rows.

    Raises:
        InputError: transformers cannot build the model.
        UsageError: The input embedding cannot be quantized: there is none, or it is tied to more than the output
            embedding.
    """
    model = skeleton(config, trust_remote_code, tensors=reader.tensors.values())
    if recipe.embeddings is None:
        return Source(reader, config, model, recipe)
    table, heads = table_and_heads(model, find_sites(model))
    if not heads:
        return Source(reader, config, model, recipe)
    reader, config = _untied(reader, config, model, table.parameter, heads[0])
    model = skeleton(config, trust_remote_code, tensors=reader.tensors.values())
    head = recipe.lm_head or head_beside(recipe.embeddings)
    return Source(reader, config, model, replace(recipe, lm_head=head))


def _untied(reader, config, model: nn.Module, table: str, head: str):
    """The same checkpoint and config, with the tensor `head` behind the one that becomes the parameter `table`."""
    parameters = {CheckpointNames(model).locate(name)[0]: name for name in reader.tensors}
    other = copy.copy(reader)
    if head not in parameters and table in parameters:
        other.tensors = untied(reader.tensors, parameters[table], head)
    config = copy.deepcopy(config)
    text = config.get_text_config()
    config.tie_word_embeddings = text.tie_word_embeddings = False
    inside = next((name for name, part in vars(config).items() if part is text), None)
    other.config = _untied_config(reader.config, inside)
    return other, config


def _untied_config(config: Mapping, inside: str | None) -> dict:
    """config.json of a model whose head is its own. inside: the key of the config of its language model."""
    made = {**config, "tie_word_embeddings": False}
    if inside is not None and isinstance(made.get(inside), Mapping):
        made[inside] = {**made[inside], "tie_word_embeddings": False}
    return made
