"""Codes of one weight after another in the same memory: what a backend has made of one is left alone by the next."""

import pytest
import torch
from weights import random_quantized

from lowbit.backends import get_backend
from lowbit.formats import compressed_tensors
from lowbit.layers.linear import LowbitLinear
from lowbit.layers.workspace import Workspace
from lowbit.numerics.scheme import Scheme

# A larger weight, one of the same size, smaller ones: memory is made, given away, and shared
SHAPES = [(16, 64), (16, 64), (8, 32), (4, 64)]


def packed(scheme, shape, seed):
    return LowbitLinear.from_quantized(random_quantized(scheme, *shape, torch.float32, seed=seed)).unprepare()


@pytest.mark.parametrize(
    ("scheme", "backend"),  # both keep codes as they are
    [("W4A16-G32", "reference"), ("W3A16_ASYM-G32", "reference"), ("W8A8", "int8_cpu")],
)
def test_weights_prepared_one_after_another_keep_their_numbers(scheme, backend):
    scheme = Scheme.parse(scheme)
    workspace, layers = Workspace(), [packed(scheme, shape, seed) for seed, shape in enumerate(SHAPES)]
    for layer in layers:
        layer.wanted_backend = backend
        layer.prepare(workspace)
        workspace.codes(layer.shape, layer.device).fill_(255)
    for seed, (layer, shape) in enumerate(zip(layers, SHAPES, strict=True)):
        expected = random_quantized(scheme, *shape, torch.float32, seed=seed)
        assert torch.equal(layer.quantized_weight().codes, expected.codes)


def test_memory_is_used_again():
    workspace = Workspace()
    first = workspace.codes((8, 64), torch.device("cpu"))
    for shape in ((8, 64), (3, 7)):
        assert workspace.codes(shape, torch.device("cpu")).data_ptr() == first.data_ptr()
    qweight = random_quantized(Scheme(4, 32), 8, 64, torch.float32)
    workspace.prepare("reference", compressed_tensors.unpack_weight(
        compressed_tensors.pack(qweight), qweight.scheme, 8, 64, first
    ))  # fmt: skip
    assert workspace.codes((8, 64), torch.device("cpu")).data_ptr() != first.data_ptr()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("columns", [64, 37])
def test_codes_are_put_where_they_are_wanted(bits, columns):
    qweight = random_quantized(Scheme(bits, -1, False), 6, columns, torch.float32)
    whole = torch.full((10, columns), 255, dtype=torch.uint8)
    tensors = compressed_tensors.pack(qweight)
    found = compressed_tensors.unpack_weight(tensors, qweight.scheme, 6, columns, whole[2:8])
    assert torch.equal(whole[2:8], qweight.codes) and found.codes.data_ptr() == whole[2:8].data_ptr()
    assert (whole[:2] == 255).all() and (whole[8:] == 255).all()
    assert get_backend("reference").prepare(found)["codes"].data_ptr() == whole[2:8].data_ptr()
