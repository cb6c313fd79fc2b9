"""The bytes in tests/golden/packed.json never change: files that were written once must stay readable."""

import json
from pathlib import Path

import pytest
import torch
from weights import BITS, assert_same

from lowbit.formats import compressed_tensors as ct
from lowbit.formats import get_format
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "packed.json").read_text())
ROWS, COLUMNS = 5, 48  # neither the codes nor the zero points fill whole words at every number of bits


def formula(rows, columns, levels):
    """Codes from a formula rather than from a generator, whose sequence torch does not promise."""
    return torch.tensor([[(7 * n + 3 * k + n * k) % levels for k in range(columns)] for n in range(rows)]).byte()


def weight(scheme):
    groups = COLUMNS // 16
    zeros = None if scheme.sym else formula(ROWS, groups, scheme.levels)
    return QuantWeight(formula(ROWS, COLUMNS, scheme.levels), torch.ones(ROWS, groups), scheme, zeros)


def test_every_scheme_is_pinned():
    assert set(GOLDEN) == {Scheme(bits, 16, sym).name for bits in BITS for sym in (True, False)}


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes(name):
    qweight = weight(Scheme.parse(name))
    tensors = ct.pack(qweight)
    actual = {
        tensor: {"shape": list(value.shape), "hex": value.numpy().tobytes().hex()}
        for tensor, value in tensors.items()
        if value.dtype == torch.int32
    }
    assert actual == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_read_back(name):
    qweight = weight(Scheme.parse(name))
    tensors = {"weight_scale": qweight.scales}
    for tensor, stored in GOLDEN[name].items():
        data = torch.frombuffer(bytearray.fromhex(stored["hex"]), dtype=torch.int32)
        tensors[tensor] = data.view(stored["shape"])
    assert_same(ct.unpack_weight(tensors, qweight.scheme, ROWS, COLUMNS), qweight)


# Of 32 outputs, which is what 3-bit GPTQ packs at a time, and 32 inputs
OTHERS = json.loads((Path(__file__).parents[1] / "golden" / "other_formats.json").read_text())


def square(scheme):
    zeros = None if scheme.sym else formula(32, 1, scheme.levels)
    return QuantWeight(formula(32, 32, scheme.levels), torch.ones(32, 1), scheme, zeros)


def test_every_scheme_of_the_other_formats_is_pinned():
    expected = {f"gptq W{bits}A16{asym}-G32" for bits in (2, 3, 4, 8) for asym in ("", "_ASYM")}
    assert set(OTHERS) == expected | {"awq W4A16-G32", "awq W4A16_ASYM-G32"}


@pytest.mark.parametrize("name", OTHERS)
def test_bytes_of_the_other_formats(name):
    format, scheme = name.split()
    tensors = get_format(format).pack(square(Scheme.parse(scheme)))
    actual = {suffix: t.numpy().tobytes().hex() for suffix, t in tensors.items() if t.dtype == torch.int32}
    assert actual == OTHERS[name]
