"""Parts of packed weights: what one process has is what the whole weight has there, bit for bit."""

import pytest
import torch
from weights import matrix

from lowbit.formats import compressed_tensors as packed_format
from lowbit.numerics.scheme import Scheme
from lowbit.parallel import EXPERTS, INPUTS, OUTPUTS, Part
from lowbit.quantizers import get_quantizer

SCHEMES = ["W4A16-G32", "W3A16_ASYM-G16", "W4A16_ASYM-CHANNEL", "W2A16_ASYM-G32", "W5A16_ASYM-G16", "W8A8", "W8A8-G16"]


def quantized(scheme: Scheme, shape: tuple[int, int], seed: int = 0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return get_quantizer("rtn").quantize(weight, {}, scheme, {"scale_search": "minmax"})[0]


def dense(tensors: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """What packed tensors stand for, by the shape that they say they have."""
    codes = tensors.get("weight", tensors["weight_scale"])
    shape = tensors["weight_shape"].tolist() if "weight_shape" in tensors else list(codes.shape)
    return matrix(packed_format.unpack_weight(tensors, scheme, *shape))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dim", [OUTPUTS, INPUTS])
def test_parts_are_those_of_the_whole(name, world, dim):
    scheme, shape = Scheme.parse(name), (36, 768)  # parts of 18, 12 and 9 rows end inside of words
    weight = quantized(scheme, shape)
    whole, packed = matrix(weight), packed_format.pack(weight)
    parts = []
    for rank in range(world):
        part = Part(rank, world)
        kept = {s: packed_format.part_of(s, t, scheme, shape, dim, part) for s, t in packed.items()}
        expected = list(shape)
        expected[dim] //= world
        stored = packed_format.shapes(scheme, *expected)
        assert {s: tuple(t.shape) for s, t in kept.items()} == {s: size for s, (size, _) in stored.items()}
        parts.append(dense(kept, scheme))
    assert torch.equal(torch.cat(parts, dim), whole)


def test_pieces_are_divided_each_for_itself():
    """Gate and up of experts: a process has a part of both."""
    scheme, gate, up = (
        Scheme.parse("W4A16_ASYM-G16"),
        *(quantized(Scheme.parse("W4A16_ASYM-G16"), (12, 32), s) for s in (1, 2)),
    )
    both = type(gate).concatenated([gate, up])
    packed = {s: t[None] for s, t in packed_format.pack(both).items()} | {
        "weight_shape": torch.tensor([[12, 32, 12, 32]])
    }
    for rank in range(2):
        kept = {
            s: packed_format.part_of(s, t, scheme, (24, 32), OUTPUTS, Part(rank, 2, pieces=2))[0]
            for s, t in packed.items()
        }
        assert kept["weight_shape"].tolist() == [6, 32, 6, 32]
        rows = slice(6 * rank, 6 * rank + 6)
        expected = torch.cat([matrix(gate)[rows], matrix(up)[rows]])
        assert torch.equal(matrix(packed_format.unpack_weight(kept, scheme, 12, 32)), expected)


def test_whole_experts():
    codes = torch.arange(4 * 6).view(4, 6)
    scheme = Scheme.parse("W4A16")
    assert torch.equal(packed_format.part_of("weight_packed", codes, scheme, (6, 8), EXPERTS, Part(1, 2)), codes[2:])
