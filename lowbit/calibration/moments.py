"""What a linear has to know of its inputs to be quantized well: second moments, summed over tokens.

Over the tokens that reach a linear, x is its input in the quantized model (the predecessors are quantized already) and
f the input that the same token has in the original model:

    hessian  [K, K] = mean of x x^T            the H of GPTQ, up to a factor of two
    missing  [N, K] = mean of (W f - W x) x^T  what the output lacks because the quantized stream has moved: GPTAQ's and
                                               Qronos' correction

`missing` is W D with D [K, K] = mean of (f - x) x^T, which several W share. For a single linear of few outputs it is
summed as it stands, which is less work. Then it holds more: where the output is added to a residual stream r, as it is
or through a norm, later layers see the sum of both, and what r lacks, r_f - r_x, is made up for here (`outputs`). (Mean
KL on the embedded model without it, with half and with all of it, one run each: W3 group 64 0.0089, 0.0084, 0.0083; W2
group 32 0.0374, 0.0368, 0.0342.)

Means over tokens, not over batches: batches of different length would weigh differently.

Sums are float32. Activations in bfloat16 are multiplied as they are, with no loss, on a CPU that has dot products of
that; all others, and on other machines, in float32.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from lowbit.calibration.outputs import Output
from lowbit.native.moments import add_outer, is_fast

# x^T x is symmetric: only block pairs on one side of the diagonal are multiplied, 9/16 of the work with 8 blocks
_BLOCKS = 8
# Multiplying thin blocks is slower than what symmetry saves
_SMALLEST_BLOCK = 256
# Tokens kept as they are, to measure output errors on, and whether what is made up for helps others
_SAMPLED, _SAMPLED_OF_A_BATCH = 256, 32
# At most this part of all tokens is left out to judge by
_LEFT_OUT = 8


@dataclass(frozen=True)
class _Sample:
    """Some tokens: x and f as they were added, [T, K]; counted, [T, K], what x counts for, and lacking, [T, N], what
    the output lacks there: None without a single output."""

    x: torch.Tensor
    f: torch.Tensor
    counted: torch.Tensor | None = None
    lacking: torch.Tensor | None = None

    def rows(self, chosen) -> "_Sample":
        return _Sample(*(None if part is None else part[chosen].clone() for part in vars(self).values()))

    @classmethod
    def joined(cls, samples: list["_Sample"]) -> "_Sample":
        parts = zip(*(vars(sample).values() for sample in samples), strict=True)
        return cls(*(None if several[0] is None else torch.cat(several) for several in parts))


@dataclass(frozen=True)
class Judge:
    """Some of the tokens of moments, to judge by what is solved from all of them.

    x: floating [T, K], inputs. lacking: floating [T, N], what the output lacks there. tokens: how many all are.
    """

    x: torch.Tensor
    lacking: torch.Tensor
    tokens: int


class Moments:
    """Sums over the tokens of one input of `in_features`: `add` batches, `merge` what other processes have seen, then
    `finish`; from there on `hessian` and `missing` are what the file says above.

    wanted: which of both; what is not stays None. output: if a single linear is meant: `missing` is that of it.
    """

    def __init__(
        self, in_features: int, device="cpu", wanted: Collection[str] = ("hessian", "missing"),
        output: Output | None = None,
    ):  # fmt: skip
        def zeros(rows):
            return torch.zeros(rows, in_features, dtype=torch.float32, device=device)

        self.tokens, self.in_features = 0, in_features
        self.hessian = zeros(in_features) if "hessian" in wanted else None
        self._output = output
        self._drift = zeros(in_features if output is None else len(output.weight)) if "missing" in wanted else None
        self._samples: list[_Sample] = []
        self._random = torch.Generator().manual_seed(0)
        self._thinned = 1  # every how many-th of them is kept by now

    def add(self, x: torch.Tensor, f: torch.Tensor | None = None, residual: torch.Tensor | None = None) -> None:
        """x, f: floating [tokens, K] of the quantized and of the original stream, row by row the same tokens.
        residual: floating [tokens, N], r_f - r_x."""
        if not len(x):
            return
        f = x if f is None else f
        if not is_fast(x, f):
            x, f = x.float(), f.float()
        self.tokens += len(x)
        counted, lacking = x, None
        if self._output is not None and (self._drift is not None or self._output.norm is not None):
            counted, lacking = self._output.of_inputs(x, f, residual)
        self._keep(_Sample(x, f, counted if lacking is not None else None, lacking))
        if self.hessian is not None:
            _add_square(self.hessian, counted)
        if self._drift is not None:
            _add_product(self._drift, f - x if lacking is None else lacking, counted)

    def _keep(self, sample: _Sample) -> None:
        length = len(sample.x)
        count = -(-length // (max(1, length // _SAMPLED_OF_A_BATCH) * self._thinned))
        # at random: of every eighth token, say, too many are the first of a sequence, which attends to nothing
        rows = torch.randperm(length, generator=self._random)[:count].sort()[0].to(sample.x.device)
        self._samples.append(sample.rows(rows))
        if sum(len(part.x) for part in self._samples) > 4 * _SAMPLED:
            self._samples = [_Sample.joined(self._samples).rows(slice(None, None, 2))]
            self._thinned *= 2

    def merge(self, sum_over_ranks) -> None:
        """Sum with other processes: `sum_over_ranks(tensor)` sums in place. Samples stay this process's own."""
        count = torch.tensor([float(self.tokens)], dtype=torch.float64)
        for tensor in (self.hessian, self._drift, count):
            if tensor is not None:
                sum_over_ranks(tensor)
        self.tokens = int(count)

    def finish(self) -> None:
        """All is added: `hessian` becomes the float32 [K, K] mean over tokens, in place."""
        for tensor in (self.hessian, self._drift):
            if tensor is not None:
                tensor.div_(max(self.tokens, 1))
        if self.hessian is not None:
            for rows, columns in _lower_blocks(len(self.hessian)):
                within = self.hessian[rows, rows]
                within.copy_(within.tril() + within.tril(-1).T)
                self.hessian[columns, rows] = self.hessian[rows, columns].T.clone()

    def missing(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor | None:
        """float32: the `rows` of [N, K], for a weight [N, K] that multiplies this input; None if it was not wanted."""
        if self._drift is None or self._output is not None:
            return None if self._drift is None else self._drift[rows]
        return weight[rows].float().to(self._drift.device) @ self._drift

    def judge(self, weight: torch.Tensor, all_of_ranks: Callable, rows: slice = slice(None)) -> Judge | None:
        """What `missing` of the same arguments is judged by, of the tokens of all processes: `all_of_ranks(object)`
        gives those of each. None where it was not wanted or no token is kept."""
        if self._drift is None:
            return None
        parts = [part for part in all_of_ranks(self._kept()) if part is not None]
        if not parts:
            return None
        kept = _Sample.joined(parts)
        step = max(-(-len(kept.x) // _SAMPLED), -(-len(kept.x) * _LEFT_OUT // self.tokens))
        kept, device = kept.rows(slice(None, None, step)), self._drift.device
        if kept.lacking is not None and kept.counted is not None:
            return Judge(kept.counted.to(device), kept.lacking[:, rows].to(device), self.tokens)
        x, f = kept.x.to(device).float(), kept.f.to(device).float()
        return Judge(x, (f - x) @ weight[rows].float().to(device).T, self.tokens)

    def _kept(self) -> _Sample | None:
        return _Sample.joined(self._samples) if self._samples else None

    def forget(self) -> None:
        """Keep no more than the samples."""
        self.hessian = self._drift = self._output = None

    @property
    def samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, f) of at most 256 tokens, evenly over what was added; none where this process added none."""
        if (kept := self._kept()) is None:
            none = torch.empty(0, self.in_features)
            return none, none
        step = -(-len(kept.x) // _SAMPLED)
        return kept.x[::step], kept.f[::step]


def _add_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a^T b to float32 sums [M, N]; a: [T, M], b: [T, N]."""
    if is_fast(a, b):
        add_outer(sums, a, b)
    else:
        sums.addmm_(a.T, b)


def _add_square(sums: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x to the lower triangle of float32 sums [K, K]; x: [T, K]."""
    if is_fast(x):
        add_outer(sums, x, x)
        return
    for rows, columns in _lower_blocks(len(sums)):
        sums[rows, columns].addmm_(x[:, rows].T, x[:, columns])


def _lower_blocks(size: int):
    """Slices (rows, columns) of blocks that cover the lower triangle."""
    width = max(-(-size // _BLOCKS), min(size, _SMALLEST_BLOCK))
    for start in range(0, size, width):
        rows = slice(start, min(start + width, size))
        yield rows, slice(0, rows.stop)
