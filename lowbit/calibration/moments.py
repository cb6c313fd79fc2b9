"""What a linear has to know of its inputs to be quantized well: second moments, summed over tokens.

Over the tokens that reach a linear, x is its input in the quantized model (the predecessors are quantized already) and
f the input that the same token has in the original model:

    hessian  [K, K] = mean of x x^T          the H of GPTQ, up to a factor of two
    drift    [K, K] = mean of (f - x) x^T    how far the quantized stream has moved: GPTAQ's and Qronos' correction

Means over tokens, not over batches: batches of different length would weigh differently.
"""

import torch

# x^T x is symmetric: only block pairs on one side of the diagonal are multiplied, 9/16 of the work with 8 blocks
_BLOCKS = 8
# Multiplying thin blocks is slower than what symmetry saves
_SMALLEST_BLOCK = 256
# Tokens kept as they are, to measure output errors on
_SAMPLED, _SAMPLED_OF_A_BATCH = 256, 32


class Moments:
    """Sums over the tokens of one input of `in_features`: `add` batches, `merge` what other processes have seen, then
    `finish`; from there on `hessian` and `drift` are what the file says above."""

    def __init__(self, in_features: int, device="cpu", drift: bool = True):
        def zeros():
            return torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

        self.tokens = 0
        self.hessian = zeros()
        self.drift = zeros() if drift else None
        self._samples: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._thinned = 1  # every how many-th of them is kept by now

    def add(self, x: torch.Tensor, f: torch.Tensor | None = None) -> None:
        """x, f: floating [tokens, K] of the quantized and of the original stream, row by row the same tokens."""
        if not len(x):
            return
        x = x.float()
        f = x if f is None else f.float()
        self.tokens += len(x)
        for rows, columns in _lower_blocks(x.shape[1]):
            self.hessian[rows, columns].addmm_(x[:, rows].T, x[:, columns])
        self._keep(x, f)
        if self.drift is not None:
            self.drift.addmm_((f - x).T, x)

    def _keep(self, x: torch.Tensor, f: torch.Tensor) -> None:
        step = max(1, len(x) // _SAMPLED_OF_A_BATCH) * self._thinned
        self._samples.append((x[::step].clone(), f[::step].clone()))
        if sum(len(part) for part, _ in self._samples) > 4 * _SAMPLED:
            x, f = (torch.cat(parts) for parts in zip(*self._samples, strict=True))
            self._samples, self._thinned = [(x[::2].clone(), f[::2].clone())], 2 * self._thinned

    def merge(self, sum_over_ranks) -> None:
        """Sum with other processes: `sum_over_ranks(tensor)` sums in place. Samples stay this process's own."""
        count = torch.tensor([float(self.tokens)], dtype=torch.float64)
        for tensor in (self.hessian, self.drift, count):
            if tensor is not None:
                sum_over_ranks(tensor)
        self.tokens = int(count)

    def finish(self) -> None:
        """All is added: `hessian` and `drift` become float32 [K, K] means over tokens, in place."""
        for tensor in (self.hessian, self.drift):
            if tensor is not None:
                tensor.div_(max(self.tokens, 1))
        for rows, columns in _lower_blocks(len(self.hessian)):
            self.hessian[columns, rows] = self.hessian[rows, columns].T.clone()

    @property
    def samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, f) of at most 256 tokens, evenly over what was added; none where this process added none."""
        if not self._samples:
            none = self.hessian.new_empty(0, len(self.hessian))
            return none, none
        x, f = (torch.cat(parts) for parts in zip(*self._samples, strict=True))
        step = -(-len(x) // _SAMPLED)
        return x[::step], f[::step]


def _lower_blocks(size: int):
    """Slices (rows, columns) of blocks that cover the lower triangle."""
    width = max(-(-size // _BLOCKS), min(size, _SMALLEST_BLOCK))
    for start in range(0, size, width):
        rows = slice(start, min(start + width, size))
        yield rows, slice(0, rows.stop)
