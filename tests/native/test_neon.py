"""The kernels for ARM, built by a cross compiler and run by an emulator: the same bits as plain C."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lowbit.native import build

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
FLAGS = ("-O2", "-fwrapv", "-fopenmp", "-static")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR} (Debian packages)"
)
def test_neon_has_the_bits_of_plain_c(tmp_path):
    objects, common = [], build._FOR_ALL_LEVELS
    for source in build._SOURCES:
        for level, flags in {"portable": ("-DPLAIN_C",), "neon": build._ARM_LEVELS["neon"]}.items():
            if level == "portable" or source.name not in common:
                objects.append(tmp_path / f"{source.stem}-{level}.o")
                compile_one(source, objects[-1], *flags, f"-DLEVEL={level}")
    program = tmp_path / "two_levels"
    compile_one(Path(__file__).with_name("two_levels.c"), tmp_path / "main.o", f"-I{build._FOLDER}")
    subprocess.run([COMPILER, *FLAGS, *objects, tmp_path / "main.o", "-o", program, "-lm"], check=True)
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = int(done.stdout.split()[0])
    assert compared > 1500, done.stdout


def compile_one(source: Path, to: Path, *flags: str) -> None:
    subprocess.run([COMPILER, *FLAGS, *flags, "-c", source, "-o", to], check=True)
