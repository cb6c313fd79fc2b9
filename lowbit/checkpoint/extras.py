"""Tensors that other writers put beside those of the model, and what they mean: the one table of what may be there.

A checkpoint is loaded whole or not at all, and a tensor that the model has no parameter for would be lost. Some lose
nothing: they repeat what the config says, or their values change no result. Everything else is refused by its name.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lowbit.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class Extra:
    """A kind of tensor that a model can do without.

    Attributes:
        pattern: Regex of how its name ends, from the start of a word of it.
        meaning: What it is, for people.
        harmless: Whether a tensor with these values changes no result.
        otherwise: What one that does would do, for the error.
    """

    pattern: str
    meaning: str
    harmless: Callable[[torch.Tensor], bool] = lambda tensor: True
    otherwise: str = ""


def _zero(tensor: torch.Tensor) -> bool:
    return not tensor.any()


def _ordered(g_idx: torch.Tensor) -> bool:
    return bool((g_idx.diff() >= 0).all())


EXTRAS = (
    Extra(
        r"rotary\w*\.(inv_freq|(cos|sin)_cached)|rotary\w*\.original_inv_freq|rope\.freqs",
        "frequencies of rotary positions, which follow from the config",
    ),
    Extra(r"position_ids", "numbers of positions"),
    Extra(
        r"(attn|attention)\.(masked_)?bias",
        "causal masks",
        lambda tensor: tensor.ndim in (0, 4) or _zero(tensor),
        "a bias of attention that the model does not add",
    ),
    Extra(
        r"([kvqp]|kv|[kv]_cache|prob|output)_(scale|zero_point)",
        "scales of a quantized key-value cache, which servers use and lowbit keeps in floating point",
    ),
    Extra(r"bias|\w+_bias", "biases of zero", _zero, "a bias that is not zero, which the model does not add"),
    Extra(
        r"\w+_zero_point",
        "zero points of symmetric weights",
        _zero,
        "zero points that are not zero, of a scheme that has none",
    ),
    Extra(r"(weight_)?g_idx", "groups in natural order", _ordered, "groups in act-order, of a format that has none"),
)


def judge(reader: CheckpointReader, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Tell tensors that a model has no parameter for apart.

    Args:
        reader: The checkpoint; the values of tensors that may be harmless are read. Of one whose headers alone are
            known they are taken for harmless.
        names: Those tensors.

    Returns:
        (name -> meaning of those that change no result, name -> what is wrong with all others).
    """
    harmless, refused = {}, {}
    for name in names:
        kind = next((extra for extra in EXTRAS if re.search(rf"(^|\.)({extra.pattern})$", name)), None)
        if kind is None:
            refused[name] = "the model has no such parameter"
        elif not isinstance(reader, CheckpointReader) or kind.harmless(reader.tensor(name)):
            harmless[name] = kind.meaning
        else:
            refused[name] = kind.otherwise
    return harmless, refused
