"""In what layers are computed: the dtype, and the batches of samples."""

import torch

from lowbit.torch_api import cpu_has_bf16_products

# Tokens in one forward pass: enough for matrix products to run at full speed
_BATCH_TOKENS = 4096


def rows_of_batches(samples: int, seqlen: int) -> list[int]:
    """How many of the samples go through a layer together: of each batch."""
    rows = max(1, _BATCH_TOKENS // seqlen)
    return [min(rows, samples - start) for start in range(0, samples, rows)]


def compute_dtype(config, device: torch.device) -> torch.dtype:
    """What layers compute in: the model's dtype where the hardware multiplies it, else float32."""
    stored = getattr(config, "dtype", None) or torch.float32
    if device.type != "cpu":
        return stored
    return stored if stored == torch.bfloat16 and cpu_has_bf16_products() else torch.float32
