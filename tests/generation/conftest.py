"""Tiny quantized models, and a stand-in for CUDA graphs."""

import pytest
import torch
from models import save_tiny
from tape import Tapes

import lowbit


@pytest.fixture(scope="session")
def quantized_model(tmp_path_factory):
    """quantized_model(name, **overrides): a tiny model in 4 bits, float32. Made once for each set of arguments."""
    made = {}

    def get(name: str, **overrides):
        key = (name, *sorted(overrides.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            save_tiny(folder / "dense", name, **overrides)
            lowbit.quantize(folder / "dense", folder / "quantized", group_size=16)
            made[key] = lowbit.load(folder / "quantized", dtype=torch.float32)
        return made[key]

    return get


@pytest.fixture
def tapes():
    return Tapes()
