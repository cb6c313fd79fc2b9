"""One decoding step of a small random model with every operator of the package, as tensors that stay where they are.

Layer one is dense: W4A16, gate_up fused. Layer two has W8A8 attention and experts. The head is W8A16. What is between
(norms, attention, router, the choice of the token) is plain torch. Products with 1024 inputs are split.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from executed.problems import DTYPES, Weight
from lowbit_kernels import layout, ops, reference
from lowbit_kernels.int8 import layout as int8_layout
from lowbit_kernels.int8 import ops as int8_ops

ROWS, HIDDEN, HEADS, HEAD, INNER, EXPERTS, CHOSEN, VOCABULARY = 3, 1024, 2, 32, 64, 3, 2, 60
QKV = (HEADS + 2) * HEAD
Matrix = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes, scales, zeros


@dataclass(frozen=True)
class Product:
    """A product with a quantized weight: by its operator, and by its definition in float32."""

    run: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]


def linear(weight: Weight, bias: bool = False) -> Product:
    matrix = weight.quantized()
    added = weight.normal(weight.out_features).to(torch.bfloat16) if bias else None
    packed, form = layout.pack(*matrix, weight.bits), form_of(weight)
    return Product(
        lambda x: ops.linear(x, *packed, added, *form),
        lambda x: reference.linear(x.float(), *matrix, weight.bits, bias=added),
    )


def gate_up(weight: Weight) -> Product:
    """weight: of gate; up is another one."""
    gate, up = weight.quantized(), weight.quantized()
    both = [g if g is None else layout.interleave_gate_up(g, u) for g, u in zip(gate, up, strict=True)]
    packed, form = layout.pack(*both, weight.bits), form_of(replace(weight, out_features=2 * weight.out_features))

    def plain(x: torch.Tensor) -> torch.Tensor:
        g, u = (reference.linear(x.float(), *matrix, weight.bits) for matrix in (gate, up))
        return nn.functional.silu(g) * u

    return Product(lambda x: ops.gate_up(x, *packed, *form), plain)


def experts(weight: Weight) -> Product:
    """Rows sorted by expert, each by the matrix of its expert."""
    matrices = [weight.quantized() for _ in range(EXPERTS)]
    parts = [layout.pack(*matrix, weight.bits) for matrix in matrices]
    packed, form = [torch.stack(tensors) for tensors in zip(*parts, strict=True)], form_of(weight)

    def plain(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        of_expert = zip(x.float().tensor_split(start[1:-1].long()), matrices, strict=True)
        return torch.cat([reference.linear(rows, *matrix, weight.bits) for rows, matrix in of_expert])

    return Product(lambda x, start: ops.experts(x, *packed, start, None, *form), plain)


def int8_linear(weight: Weight) -> Product:
    codes, scales, _ = weight.quantized()
    shape = int8_layout.Int8Layout(weight.bits, weight.group, torch.bfloat16, weight.out_features, weight.in_features)
    packed = int8_layout.pack(codes, scales, shape)
    form = weight.bits, weight.group, weight.out_features
    return Product(
        lambda x: int8_ops.int8_linear(x, *packed, None, None, None, None, *form),
        lambda x: reference.int8_linear(*reference.quantize_rows(x), codes, scales.float(), weight.bits),
    )


def form_of(weight: Weight) -> tuple:
    return weight.bits, weight.group, weight.sym, DTYPES[weight.dtype], weight.out_features


def norm(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x.float(), x.shape[-1:]).to(torch.bfloat16)


class DecodeStep:
    """A RepeatableStep (lowbit.generation.steps.graph). small: experts and the head alone.

    Static: tokens int64 [ROWS], position int64 [1], the caches bf16 [ROWS, length, HEAD] of a layer, logits float32
    [ROWS, VOCABULARY].
    """

    length = 8

    def __init__(self, generator: torch.Generator, small: bool = False):
        self.filled, self.small = 0, small

        def weight(out_features: int, in_features: int, bits: int = 4, group: int = 128, sym: bool = True) -> Weight:
            return Weight(bits, group, sym, "bf16", ROWS, out_features, in_features, generator=generator)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(torch.bfloat16)

        self.embedding, self.router = normal(VOCABULARY, HIDDEN), normal(EXPERTS, HIDDEN)
        attention_out, down = weight(HIDDEN, HEADS * HEAD, group=64), weight(HIDDEN, INNER, group=64)
        self.qkv = [linear(weight(QKV, HIDDEN), bias=True), int8_linear(weight(QKV, HIDDEN, 8, -1))]
        self.attention_out = [linear(attention_out), linear(attention_out)]
        self.gate_up, self.down = gate_up(weight(INNER, HIDDEN)), linear(down)
        self.experts_in, self.experts_out = experts(weight(INNER, HIDDEN)), experts(down)
        self.head = linear(weight(VOCABULARY, HIDDEN, 8, -1))
        self.caches = [[torch.zeros(ROWS, self.length, HEAD, dtype=torch.bfloat16) for _ in "kv"] for _ in range(2)]
        self.tokens, self.position = torch.arange(1, ROWS + 1), torch.zeros(1, dtype=torch.long)
        self.places = torch.arange(self.length)
        self.logits = torch.zeros(ROWS, VOCABULARY)
        self.multiply: Callable[..., torch.Tensor] = lambda product, *args: product.run(*args)

    def set_visible(self, visible: int) -> None:
        """Attention always sees the whole cache."""

    def begin(self) -> None:
        """Start over with the first tokens. What the caches hold stays, and is not seen."""
        self.tokens.copy_(torch.arange(1, ROWS + 1))
        self.position.zero_()

    def plainly(self) -> None:
        """The same step in float32, by the definitions of the products."""
        self.multiply = lambda product, *args: product.plain(*args).to(torch.bfloat16)
        self()
        self.multiply = lambda product, *args: product.run(*args)

    def __call__(self) -> None:
        x = self.embedding[self.tokens]
        if not self.small:
            x = x + self._attention(0, norm(x))
            x = x + self._dense(norm(x))
            x = x + self._attention(1, norm(x))
        x = x + self._mixture(norm(x))
        self.logits.copy_(self.multiply(self.head, norm(x)))
        self.tokens.copy_(self.logits.argmax(-1))
        self.position.add_(1)

    def _attention(self, number: int, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.multiply(self.qkv[number], x).split([HEADS * HEAD, HEAD, HEAD], -1)
        for cache, new in zip(self.caches[number], (k, v), strict=True):
            cache.index_copy_(1, self.position, new[:, None])
        keys, values = self.caches[number]
        scores = (norm(q.view(ROWS, HEADS, HEAD)) @ norm(keys).mT).float() / HEAD**0.5
        scores = scores.masked_fill(self.places > self.position, -torch.inf)
        mixed = scores.softmax(-1).to(torch.bfloat16) @ values
        return self.multiply(self.attention_out[number], mixed.flatten(1))

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(self.down, self.multiply(self.gate_up, x))

    def _mixture(self, x: torch.Tensor) -> torch.Tensor:
        """As lowbit.layers.experts does it."""
        shares, chosen = (x @ self.router.mT).float().softmax(-1).topk(CHOSEN)
        expert, order = chosen.flatten().sort(stable=True)
        start = torch.searchsorted(expert, torch.arange(EXPERTS + 1), out_int32=True)
        rows = nn.functional.silu(self.multiply(self.experts_in, x[order // CHOSEN], start))
        rows = self.multiply(self.experts_out, rows, start) * shares.flatten()[order, None]
        return torch.empty_like(rows).index_copy_(0, order, rows).view(ROWS, CHOSEN, -1).sum(1).to(torch.bfloat16)
