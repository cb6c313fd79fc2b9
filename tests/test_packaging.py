"""The wheel holds both packages, their data and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lowbit

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"lowbit": ROOT, "lowbit_kernels": ROOT / "triton_kernels"}
DATA = {"lowbit": "assets/**/*", "lowbit_kernels": "tuned/*.json"}


def package_files(name):
    """Paths in the wheel that a package must have, found in the tree and not through the build's settings."""
    root = SOURCE_ROOTS[name]
    found = {*(root / name).rglob("*.py"), *(root / name).rglob("*.[ch]"), *(root / name).glob(DATA[name])}
    found.add(root / name / "py.typed")
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


@pytest.mark.slow
def test_wheel_is_the_packages_and_their_data(wheel):
    names = [name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")]
    assert set(names) == package_files("lowbit") | package_files("lowbit_kernels")


@pytest.mark.slow
def test_wheel_has_the_two_import_names(wheel):
    expected = {name for name in SOURCE_ROOTS if package_files(name)}
    assert {name.split("/")[0] for name in wheel.namelist()} == expected | {f"lowbit-{lowbit.__version__}.dist-info"}


@pytest.mark.slow
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


def pinned():
    """Package -> its version in scripts/constraints.txt."""
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pins = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def test_all_that_a_fresh_machine_installs_is_pinned():
    """Each dependency within its bounds; what they pull in too, where this environment is that of the pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = pinned()
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    requirements = [requirement for requirement in map(Requirement, wanted) if requirement.name != "lowbit"]
    assert not [str(each) for each in requirements if pins.get(canonicalize_name(each.name)) not in each.specifier]

    def installed(name):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            return None

    wanted_here = [each.name for each in requirements if installed(each.name) is not None]  # extras may be missing
    if any(installed(name) != pins[canonicalize_name(name)] for name in wanted_here):
        pytest.skip("this environment has other versions")
    seen, todo = set(), [requirement.name for requirement in requirements]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen or installed(name) is None:
            continue
        seen.add(name)
        needed = (Requirement(each) for each in requires(name) or ())
        todo += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert seen - pins.keys() <= {"certifi", "tzdata"}  # data, that should be new
