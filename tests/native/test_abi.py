"""abi.h and abi.py: a library that was built from another abi.h is refused by name, or, where Python reads what the
library says, works all the same."""

import ctypes
import ctypes.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lowbit.native import abi, build

pytestmark = pytest.mark.usefixtures("compiler")
SOURCES = Path(build.__file__).parent / "source"


@pytest.fixture
def built(tmp_path):
    """built(old, new): the table of abi.h in which `new` is written for `old`, with functions that do nothing."""

    def build_with(old: str, new: str) -> Path:
        header = (SOURCES / "abi.h").read_text()
        assert header.count(old) == 1
        (tmp_path / "abi.h").write_text(header.replace(old, new))
        for source in ("abi.c", "levels.c"):
            shutil.copy(SOURCES / source, tmp_path)
        names = re.findall(r"FUNCTION\(\w+, (lowbit_\w+),", header)
        functions = "".join(f"void {name}_portable(void) {{}}\n" for name in names)
        (tmp_path / "functions.c").write_text(functions)
        made = tmp_path / f"{len(list(tmp_path.glob('*.so')))}.so"  # one name is loaded once
        sources = (tmp_path / name for name in ("abi.c", "levels.c", "functions.c"))
        subprocess.run([shutil.which("cc") or "gcc", "-shared", "-fPIC", *sources, "-o", made], check=True)
        return made

    return build_with


# What is declared -> what a library was built with, and how the error begins
CHANGES = {
    "Weight, int64_t, bits": (
        "Weight, int32_t, bits",
        "Weight.bits is int32_t, 4 bytes at 32 in the library and int64_t",
    ),
    "Weight, int64_t, group_size": ("Weight, int64_t, group", "Weight.group_size is nothing in the library"),
    "FIELD(Weight, int64_t, in_features)": (
        "",
        "Weight.in_features is nothing in the library and int64_t, 8 bytes at 48",
    ),
    "Attention, float, scale": ("Attention, int32_t, scale", "Attention.scale is int32_t, 4 bytes"),
    "Strided, int64_t, token": ("Strided, const void *, token", "Strided.token is pointer, 8 bytes"),
    "Operand, float, value)": (
        "Operand, float, value) FIELD(Operand, float, more)",
        "Operand.more is float, 4 bytes at 52",
    ),
    "#define DIMENSIONS 4": ("#define DIMENSIONS 3", "Operand.strides is int64_t, 24 bytes at 8 in the library"),
}


@pytest.mark.parametrize("declared", CHANGES)
def test_another_layout_is_refused_by_name(built, declared):
    changed, error = CHANGES[declared]
    with pytest.raises(abi.AbiError, match=re.escape(error)):
        abi.Library(built(declared, changed))


def test_constants_and_arguments_are_those_of_the_library(built):
    swapped = abi.Library(built("ENUMERATOR(COPY) ENUMERATOR(ADD)", "ENUMERATOR(ADD) ENUMERATOR(COPY)"))
    assert (swapped.constants["ADD"], swapped.constants["COPY"]) == (0, 1)
    assert abi.Library(built("#define ROWS 16", "#define ROWS 32")).constants["ROWS"] == 32
    library = abi.Library(
        built("lowbit_run, const Instruction *program, int64_t count", "lowbit_run, float a, Weight *b")
    )
    assert library.lowbit_run.argtypes == [ctypes.c_float, ctypes.POINTER(abi.Weight)]
    assert library.lowbit_run.restype is None and library.lowbit_linear_knows.restype is ctypes.c_int64


def test_what_a_library_lacks_is_named(built):
    with pytest.raises(abi.AbiError, match="no function lowbit_other_portable"):
        abi.Library(built("void, lowbit_run,", "void, lowbit_other,"))
    with pytest.raises(abi.AbiError, match="no table lowbit_abi"):
        abi.Library(Path(ctypes.util.find_library("m") or pytest.skip("no library to try")))
