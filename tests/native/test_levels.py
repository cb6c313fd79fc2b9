"""Each level of instructions that this machine runs against the portable one: the same bits, wherever integers and
fused multiply-adds are all there is."""

import os
import shutil
import subprocess
import sys
from itertools import cycle

import pytest
import torch
from weights import random_quantized

from lowbit.backends import native
from lowbit.native import build, gemm, linear
from lowbit.native.abi import Library
from lowbit.native.build import constant, library
from lowbit.native.linear import _weight_of, product
from lowbit.numerics.scheme import BITS, Scheme

pytestmark = pytest.mark.usefixtures("compiler")
SCHEMES = [Scheme(bits, group, sym) for bits in BITS for group in (16, 32, 128, -1) for sym in (True, False)]


def on_each_level(on_level, function) -> dict[str, torch.Tensor]:
    """What `function` gives on each level."""
    made = {}
    for level in library().levels:
        on_level(level)
        made[level] = function()
    assert "portable" in made
    return made


def bytes_of(count: int, low: int, high: int, dtype) -> torch.Tensor:
    return torch.randint(low, high, (count,), dtype=dtype)


def operands(name: str, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a, b and the sums so far, at the limits of what a primitive is given."""
    size = constant("PRIMITIVE_BYTES")
    integers = torch.randint(-(2**20), 2**20, (size // 4,), dtype=torch.int32)
    if name == "DOT_S16":
        a, b = bytes_of(size // 2, 0, 256, torch.int16), bytes_of(size // 2, -(2**15), 2**15, torch.int16)
        a[:4], b[:2], b[2:4] = 255, 2**15 - 1, -(2**15)
        return a, b, integers
    if name == "DOT_U8S16":
        a, b = bytes_of(size, 0, 2**bits, torch.uint8), bytes_of(size // 2, -(2**15), 2**15, torch.int16)
        a[:8], b[:4] = 2**bits - 1, torch.tensor([2**15 - 1, -(2**15), -1, 255], dtype=torch.int16)
        return a, b, integers
    if name == "DOT_U8S8":
        a, b = bytes_of(size, 0, 2**bits, torch.uint8), bytes_of(size, -127, 128, torch.int8)
        a[:8], b[:4], b[4:8] = 2**bits - 1, 127, -127
        return a, b, integers
    dtype = torch.float32 if name == "FMA_F32" else torch.bfloat16
    count = size // dtype.itemsize
    return torch.randn(count).to(dtype), torch.randn(count).to(dtype), torch.randn(size // 4)


def expected(name: str, a: torch.Tensor, b: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """In int64 or float64; a block of DOT_U8S8 is eight times the same."""
    wide = torch.float64 if a.is_floating_point() else torch.int64
    if name == "DOT_U8S16":  # all lanes have the first four
        b = b[:4].repeat(len(sums))
    terms = (a.to(wide) * b.to(wide)).view(len(sums), -1).sum(1)
    return sums.to(wide) + terms * (8 if name == "DOT_U8S8" else 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["DOT_S16", "DOT_U8S16", "DOT_U8S8", "DOT_BF16", "FMA_F32"])
def test_primitives(on_level, name, bits):
    for _ in range(20):
        a, b, sums = operands(name, bits)

        def primitive(a=a, b=b, sums=sums):
            out = torch.zeros_like(sums)
            pointers = (tensor.data_ptr() for tensor in (a, b, sums, out))
            library().lowbit_primitive(constant(name), bits, *pointers)
            return out

        for level, found in on_each_level(on_level, primitive).items():
            wanted = expected(name, a, b, sums)
            if name.startswith("DOT_") and name != "DOT_BF16":
                assert torch.equal(found.long(), wanted), level
            elif name == "FMA_F32":
                assert torch.equal(found, wanted.float()), level
            else:
                terms = sums.abs().double() + (a.double() * b.double()).abs().view(-1, 2).sum(1)
                assert ((found - wanted).abs() <= 2**-22 * terms).all(), level


@pytest.mark.parametrize(
    ("scheme", "rows"), list(zip(SCHEMES, cycle((1, 5, 5, 1)), strict=False)), ids=lambda one: getattr(one, "name", one)
)
def test_product_of_few_rows(on_level, scheme, rows):
    shape = 37, 640
    qweight = random_quantized(scheme, *shape, torch.bfloat16)
    buffers, x, bias = native.prepare(qweight), torch.randn(rows, shape[1]), torch.randn(shape[0])

    def run():
        y = torch.full((rows, shape[0]), torch.nan)
        product(_weight_of(buffers, scheme, shape), x, y, bias, pieces=2)()
        return y

    made = on_each_level(on_level, run)
    assert all(torch.equal(y, made["portable"]) for y in made.values()), made


def test_the_layout_is_the_same(on_level):
    """A weight that was packed on one level runs on every other."""
    scheme, shape = Scheme(4, 32, False), (21, 96)
    qweight, x = random_quantized(scheme, *shape), torch.randn(3, 96)
    packed = on_each_level(on_level, lambda: native.prepare(qweight)["codes"])
    assert all(torch.equal(codes, packed["portable"]) for codes in packed.values())
    made = on_each_level(on_level, lambda: native.linear(x, native.prepare(qweight), scheme, shape))
    assert all(torch.equal(y, made["portable"]) for y in made.values())


# Level whose place it takes -> flags that make other code of the same sources: what runs on other machines
AVX512 = build._X86_LEVELS["avx512"]
OTHERS = {
    "avx2": ("-DPLAIN_C", "-DVECTOR=64", "-O1"),  # AVX-512, with the definitions in C
    "avxvnni": (*AVX512, "-DVECTOR=32", "-O1"),  # AVX-VNNI, with the same instructions as AVX-512 has them
}


@pytest.fixture(scope="module")
def of_other_machines(tmp_path_factory):
    """A library whose levels are those of OTHERS, beside the portable one."""
    if "avx2" not in build._levels():
        pytest.skip("these are the instructions of x86")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_X86_LEVELS", {"portable": ("-O1",), **OTHERS})
        path = build._compile(os.environ.get("CC") or shutil.which("cc"), tmp_path_factory.mktemp("others"))
    return Library(path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_algorithms_of_other_machines(of_other_machines, scheme, monkeypatch):
    """The code of each width of vectors is right, whatever this machine has."""
    for module in (linear, gemm):
        monkeypatch.setattr(module, "library", lambda: of_other_machines)
    shape, dtype = (37, 640), torch.bfloat16
    buffers, x = native.prepare(random_quantized(scheme, *shape, dtype)), torch.randn(13, shape[1]).to(dtype)
    stored = buffers["codes"], buffers["scales"], buffers.get("zeros")

    def products():
        yield native.linear(x[:5], buffers, scheme, shape)
        for arithmetic in gemm.ARITHMETICS:
            if gemm.refuse(scheme, arithmetic, dtype) is None:
                yield torch.ops.lowbit.gemm_native(x, *stored, None, scheme.name, shape[0], arithmetic)

    of_other_machines.use("portable")
    expected = list(products())
    runnable = [level for level in OTHERS if level != "avxvnni" or "avx512" in library().levels]
    for level in runnable:
        of_other_machines.use(level)
        for found, wanted in zip(products(), expected, strict=True):
            assert torch.equal(found, wanted), level


SHOW = "from lowbit.native.build import library as l; print(getattr(l(), 'level', l()))"


@pytest.mark.slow
def test_the_level_that_the_environment_names(monkeypatch):
    def shown(level):
        monkeypatch.setenv(build.LEVEL_VARIABLE, level)
        return subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True).stdout.strip()

    assert shown("portable") == "portable" and shown("") == library().levels[0]
    assert shown("avx1024") == f"LOWBIT_CPU_LEVEL is 'avx1024'; this machine runs {', '.join(library().levels)}"
