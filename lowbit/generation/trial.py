"""Whether a model gives with the loop's cache what it gives without any, tried on a few tokens."""

import torch

from lowbit.errors import first_line

_PROMPT, _CHUNK, _PADDING = 5, 3, 2
_STEPS = 2  # with the cache as it is called, and as many as it is recorded
# Rounding of bfloat16 through the layers gives a relative error of about 0.01, a wrong mask or position 0.1 to 1
_LARGEST_ERROR = 0.05


def difference(model, step) -> str | None:
    """What is wrong with the logits of a fresh `Step` of two rows, None if they are those of the model alone: for a
    prompt in two chunks, one row of it padded, and for steps after it."""
    length = _PROMPT + 2 * _STEPS
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * length, device=model.device).view(2, length) * 7 % max(vocabulary // 2, 1) + 1
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    try:
        arguments = step.arguments(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), None, last_only=False)
        expected = model(**arguments | {"use_cache": False}).logits.float()
        for position, logits in _steps(step, ids, mask):
            error = (logits - expected[:, position]).norm() / expected[:, position].norm()
            if not error < _LARGEST_ERROR:
                return f"with a static cache its logits are others: {error:.0%} off in a trial"
    except Exception as error:  # code of the model's authors
        return f"a static cache does not work for it: {first_line(error)}"
    return None


def _steps(step, ids: torch.Tensor, mask: torch.Tensor):
    """(position, logits [2, V] after it)"""
    step.begin(ids[:, :_PROMPT], mask[:, :_PROMPT], seed=0)
    step.prefill(0, _CHUNK)
    yield _PROMPT - 1, step.prefill(_CHUNK, _PROMPT)
    for position in range(_PROMPT, ids.shape[1]):
        if position == _PROMPT + _STEPS:
            step.set_visible(step.length)
        step.feed(ids[:, position : position + 1])
        yield position, step.logits()
