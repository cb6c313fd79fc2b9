"""Settings that a GGUF file says and transformers does not read: it takes the defaults of the class for them."""

import copy
from collections.abc import Mapping

import torch
from transformers import ROPE_INIT_FUNCTIONS

from lowbit.errors import InputError
from lowbit.formats.gguf import GENERAL_KEYS

# Llama 3's rule for rotary positions: what all its models have, and lengths that they may have been trained for. A file
# has no more of it than the factors that follow from it, in float32
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LENGTHS = tuple(2**power for power in range(6, 21))
_TOLERANCE = 1e-4


def with_all_settings(config, metadata: Mapping, architecture: str, factors: torch.Tensor | None):
    """The config with what else the file says.

    Args:
        config: As transformers reads it.
        metadata: Of the file.
        architecture: Its name there, with which keys of it begin.
        factors: float32 [head_dim / 2], by which frequencies of rotary positions are divided; None for none.

    Raises:
        InputError: Rotary positions are scaled in a way that no config says.
    """
    said = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    data = config.to_dict()
    changes = {
        attribute: said[key]
        for key, attribute in GENERAL_KEYS.items()
        if key in said and attribute in data and data[attribute] != said[key]
    }
    if changes:
        config = type(config).from_dict(data | changes)
    scaling = _scaling(said)
    if scaling is None and (factors is None or bool((factors == 1).all())):
        return config
    if "rope_theta" not in (config.rope_parameters or {}):
        raise InputError(f"its rotary positions are scaled, of which {architecture} has more than one kind")
    return _with_rope(config, scaling) if scaling is not None else _llama3(config, factors)


def _scaling(said: Mapping) -> dict | None:
    """The rope parameters that metadata tells, None for plain ones."""
    kind, names = said.get("rope.scaling.type", "none"), {"original_context_length": "original_max_position_embeddings"}
    if kind not in ("linear", "yarn"):
        return None
    found = {name: said.get(f"rope.scaling.{name}") for name in ("factor", *(names if kind == "yarn" else ()))}
    return {"rope_type": kind} | {names.get(name, name): value for name, value in found.items() if value is not None}


def _with_rope(config, changes: Mapping):
    return type(config).from_dict(config.to_dict() | {"rope_parameters": {**config.rope_parameters, **changes}})


def _llama3(config, factors: torch.Tensor):
    """The config of Llama 3's rule that these factors follow from."""
    count = len(factors)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(count).double() / count)
    for length in _LENGTHS:
        changes = {"factor": float(f"{factors.max():.6g}"), "original_max_position_embeddings": length}
        tried = _with_rope(copy.deepcopy(config), _LLAMA3 | changes)
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](tried, "cpu")[0].double()
        if len(frequencies) == count and torch.allclose(plain / factors.double(), frequencies, rtol=_TOLERANCE, atol=0):
            return tried
    raise InputError(
        "rope_freqs.weight scales its rotary positions in another way than Llama 3 does, which no config says"
    )
