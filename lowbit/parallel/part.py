"""What one process has of a weight that several share."""

from dataclasses import dataclass

import torch

# Dimensions of a weight [N, K] = [out_features, in_features], or of that of experts [E, N, K]
EXPERTS, OUTPUTS, INPUTS = -3, -2, -1


@dataclass(frozen=True)
class Part:
    """The `rank`-th of `size` equal parts; where the whole is `pieces` equal pieces side by side (2: gate and up of
    experts), that part of each of them."""

    rank: int
    size: int
    pieces: int = 1

    def length(self, whole: int) -> int:
        return whole // self.size

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """[..., L, ...] -> [..., L / size, ...], along `dim`; a view where there is one piece."""
        parts = [self._one(piece, dim) for piece in tensor.chunk(self.pieces, dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _one(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        length = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * length, length)
