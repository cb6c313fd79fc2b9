"""The wheel holds both packages, their data and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lowbit

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"lowbit": ROOT, "lowbit_kernels": ROOT / "triton_kernels"}
DATA = {"lowbit": "assets/**/*", "lowbit_kernels": "tuned/*.json"}


def package_files(name):
    """Paths in the wheel that a package must have, found in the tree and not through the build's settings."""
    root = SOURCE_ROOTS[name]
    found = {*(root / name).rglob("*.py"), *(root / name).rglob("*.[ch]"), *(root / name).glob(DATA[name])}
    return {file.relative_to(root).as_posix() for file in found if file.is_file() and "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because setuptools writes build folders beside the sources."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("lowbit", "triton_kernels", "scripts", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "dist").iterdir()
    with zipfile.ZipFile(path) as file:
        yield file


def test_wheel_is_the_packages_and_their_data(wheel):
    names = [name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")]
    assert set(names) == package_files("lowbit") | package_files("lowbit_kernels")


def test_wheel_has_the_two_import_names(wheel):
    expected = {name for name in SOURCE_ROOTS if package_files(name)}
    assert {name.split("/")[0] for name in wheel.namelist()} == expected | {f"lowbit-{lowbit.__version__}.dist-info"}


def test_wheel_installs_the_command_and_the_license(wheel):
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    assert "lowbit = lowbit.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_requirements_are_lower_bounds():
    """An exact pin would keep lowbit out of the environment of the engine that serves its output."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in project["dependencies"] + extras:
        requirement = requirement.partition(";")[0]  # what follows says for which systems
        assert not any(sign in requirement for sign in ("==", "<", "~=", "!=")), requirement
