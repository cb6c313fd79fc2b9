"""Bytes: what a step must read, what a model takes, and how many the machine moves in a second."""

import re
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lowbit.bench.random_model import stored_bytes
from lowbit.guards.safe_files import open_existing
from lowbit.layers.experts import expert_weights
from lowbit.layers.linear import LowbitLinear


def bytes_per_second(device: torch.device) -> float:
    """What reading a large tensor, or copying it, moves per second: the better of the two, the median of seven."""
    count = 2**28 if device.type == "cuda" else 2**25
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    seconds = {
        # a copy reads and writes
        2 * source.nbytes: _median_seconds(lambda: target.copy_(source), device),
        source.nbytes: _median_seconds(source.sum, device),
    }
    return max(moved / taken for moved, taken in seconds.items())


def _median_seconds(function, device: torch.device) -> float:
    taken = []
    for _ in range(8):
        _wait_for(device)
        started = time.perf_counter()
        function()
        _wait_for(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, and of the ones that a subclass of Tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def model_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; what several modules share counts once."""
    tensors = {id(t): t for m in model.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    return sum(map(tensor_bytes, tensors.values()))


def step_bytes(model: nn.Module, batch: int, context: int) -> float:
    """What a decoding step of `batch` sequences of `context` tokens must read: every weight but the embeddings, of
    which it takes a row, and the keys and values. Of experts, those that `batch` tokens are expected to go to.
    Quantized weights count as they are stored, however their backend lays them out."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)

    def expected(experts: int) -> float:
        return 1.0 if chosen is None else 1 - (1 - chosen / experts) ** batch

    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, LowbitLinear):
            total += stored_bytes(module.scheme, module.shape, module.dtype)
            continue
        if experts := expert_weights(module):
            dtype = model.dtype
            total += sum(expected(len(w)) * stored_bytes(w.scheme, w.shape, dtype) for w in experts.values())
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            total += tensor_bytes(tensor) * (expected(tensor.shape[0]) if tensor.ndim == 3 else 1)
    return total + cache_bytes(config, batch, context, model.dtype)


def cache_bytes(config, batch: int, context: int, dtype: torch.dtype) -> int:
    """Keys and values of `context` tokens in every layer; of a layer with a window, of those in it."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or context
    tokens = sum(min(context, window) if kind == "sliding_attention" else context for kind in kinds)
    return 2 * batch * tokens * heads * head_dim * dtype.itemsize


@contextmanager
def extra_memory(device: torch.device):
    """Yields a list that gets how many bytes more were held at some point inside than before; it stays empty where the
    system does not tell."""
    found = []
    before = _reset_peak(device)
    yield found
    if before is not None:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_memory("VmHWM")
        found.append(max(peak - before, 0))


def _reset_peak(device: torch.device) -> int | None:
    """Bytes held now, from where on the peak is counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        with open_existing(Path("/proc/self/clear_refs")) as file:
            file.write(b"5")
        return _process_memory("VmRSS")
    except OSError:
        return None


def _process_memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
