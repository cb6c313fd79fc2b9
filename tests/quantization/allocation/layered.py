"""Small models of which one layer is in memory at a time."""

import torch

from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import skeleton
from lowbit.folders.locate import load_config
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.targets import steps_by_layer
from lowbit.quantization.plan import make_plan

SCHEME = Scheme(4, 16)


def opened(folder, ids, lm_head=None):
    """The model in a folder, and what would be quantized in each of its layers."""
    config, reader = load_config(folder), CheckpointReader(folder)
    built = skeleton(config, False, tensors=reader.tensors.values())
    model = LayeredModel(config, reader, ids, torch.float32, "cpu")
    plan = make_plan(reader, built, Recipe(SCHEME, lm_head=lm_head), "compressed-tensors")
    return model, steps_by_layer(plan, model)
