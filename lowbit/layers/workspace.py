"""Memory for the codes of weights on their way from a checkpoint into the layout of a backend."""

import math

import torch

from lowbit.backends import get_backend
from lowbit.numerics.qweight import QuantWeight


class Workspace:
    """Holds the codes of one weight after another: with fresh memory for each, the system would spend more time on
    giving and taking pages than unpacking takes."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def codes(self, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Uint8 of `shape`, contiguous and of any content: those that were asked for before are no longer needed."""
        count = math.prod(shape)
        if self._memory.numel() < count or self._memory.device != device:
            self._memory = torch.empty(count, dtype=torch.uint8, device=device)
        return self._memory[:count].view(shape)

    def prepare(self, backend: str, qweight: QuantWeight) -> dict[str, torch.Tensor]:
        """The buffers that a backend makes of a weight, none of them in this memory."""
        buffers = get_backend(backend).prepare(qweight)
        place = self._memory.untyped_storage().data_ptr()
        kept = [name for name, buffer in buffers.items() if buffer.untyped_storage().data_ptr() == place]
        if kept and self._memory.numel() == qweight.codes.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)
            return buffers
        return buffers | {name: buffers[name].clone() for name in kept}
