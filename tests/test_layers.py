"""Rules of the source tree: who may import whom, and patterns that are never written."""

import ast
import re
import sys
from pathlib import Path

import pytest

from lowbit import transformers_api

ROOT = Path(__file__).parents[1]


def layer_table() -> list[list[str]]:
    """The lines of the table in CONTRIBUTING.md, the lowest first: the rooms of each. A file imports its own room and
    lower lines only; neighbours on a line do not import each other."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(r"## Layers\n.*?```\n(.*?)```", text, re.DOTALL)[1]
    lines = [re.fullmatch(r"(\d+) +(.+)", line) for line in table.splitlines()]
    assert [int(line[1]) for line in lines] == list(range(len(lines)))[::-1]
    return [line[2].split() for line in lines][::-1]


LINES = layer_table()
LINE_OF = {unit: number for number, rooms in enumerate(LINES) for unit in rooms}
TOP = {"lowbit/__init__.py", "lowbit/__main__.py"}  # above every line: they only name what others made
KERNEL_USERS = {"lowbit/backends/triton.py", "lowbit/backends/triton_int8.py", "lowbit/quantizers/gptq_kernels.py"}
KERNEL_IMPORTS = {"lowbit_kernels", "torch", "triton", *sys.stdlib_module_names}
MAX_LINES = 450
MOST_FILES, MOST_LINES = 16, 2500  # of a room
# The modules that may spell the undocumented names of a package; PEFT's are few and documented as extension points
UPSTREAM = {
    "lowbit/transformers_api.py", "lowbit/transformers_serving.py", "lowbit/torch_api.py", "lowbit/hf/lora.py",
}  # fmt: skip
# Operators of torch that have no documented name, tried out before they are used
OPERATORS = ("lowbit/backends/torch_cpu.py", re.compile(r"_(convert_)?weight_(to_)?int\d\w*pack\w*"))
# Hooks of documented base classes that subclasses define and call
HOOKS = {"_apply", "_save_to_state_dict", "_load_from_state_dict"}
UNDOCUMENTED_MODULES = re.compile(
    r"torch\.(_|utils\._)|transformers\.(core_model_loading|conversion_mapping|modeling_|integrations|pytorch_utils|"
    r"cache_utils|models|quantizers\.\w+_utils|generation\.[a-z])|accelerate\.(?!utils\b)\w+\.|(torch|transformers|accelerate|peft)\..*\._"
)
# Only these write and remove files by name. The kernel package has no lowbit to import: it writes its own tables.
WRITERS = {
    "lowbit/guards/safe_files.py",
    "lowbit_kernels/tuning/select.py",
    "lowbit/guards/reading.py",
}  # the last opens to read only
# Of a function, apart from self
MOST_PARAMETERS, MOST_FUNCTION_LINES = 8, 60
REMOVING = {"unlink", "rmdir", "rmtree", "removedirs"}
WRITING = {
    "write_text", "write_bytes", "touch", "truncate", "mkstemp", "copyfile", "copytree", "copy2", "symlink_to",
    "hardlink_to", "tofile",
}  # fmt: skip
# Where the name alone says nothing: list.remove, Tensor.copy, ...
OF_MODULES = {
    "os.open", "os.fdopen", "os.remove", "os.symlink", "os.link", "os.mkfifo", "os.mknod", "shutil.copy", "shutil.move",
    "io.open", "io.FileIO", "codecs.open", "tempfile.NamedTemporaryFile", "tempfile.TemporaryFile", "torch.save",
    "numpy.save", "np.save", "numpy.savez", "np.savez",
}  # fmt: skip
OTHER_FUNCTIONS = {"save_file"}  # of safetensors


def source_files():
    """Path in the wheel -> file, of both packages."""
    for folder in (ROOT / "lowbit", ROOT / "triton_kernels" / "lowbit_kernels"):
        for file in sorted(folder.rglob("*.py")):
            if "assets" not in file.parts:
                yield file.relative_to(folder.parent).as_posix(), file


FILES = dict(source_files())


def imports(path, tree):
    """Yield (line number, dotted name) of each import, inside functions too; `from a import b` gives `a.b`."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def refusal(path, name):
    """Why the file at `path` may not import `name`, or None."""
    top, _, rest = name.partition(".")
    if path.startswith("lowbit_kernels/"):
        return None if top in KERNEL_IMPORTS else "lowbit_kernels imports torch, triton and the standard library only"
    if path in TOP or top not in ("lowbit", "lowbit_kernels"):
        return None
    if top == "lowbit_kernels":
        return None if path in KERNEL_USERS else f"only {sorted(KERNEL_USERS)} import lowbit_kernels"
    own, target = Path(path).with_suffix("").parts[1], rest.partition(".")[0]
    if target in (own, "__version__"):
        return None
    if target not in LINE_OF:
        return "import public names from the file that defines them, and list new rooms in CONTRIBUTING.md"
    if LINE_OF[target] >= LINE_OF[own]:
        return f"{own} (line {LINE_OF[own]}) may import lower lines only, and {target} is on line {LINE_OF[target]}"
    return None


def layer_errors(path, source):
    own = Path(path).with_suffix("").parts[1]
    if path.startswith("lowbit/") and path not in TOP and own not in LINE_OF:
        return [f"{path}: {own} has no place in the table of CONTRIBUTING.md"]
    found = ((line, name, refusal(path, name)) for line, name in imports(path, ast.parse(source)))
    return [f"{path}:{line}: imports {name}: {reason}" for line, name, reason in found if reason]


def _own_names(tree):
    """Names with an underscore that a file defines: functions, classes, variables, attributes of its objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def boundary_errors(path, source):
    """Undocumented names of other packages outside of the module that is there for them."""
    if path in UPSTREAM or path.startswith("lowbit_kernels/"):
        return []
    tree, errors = ast.parse(source), []
    own = {*_own_names(tree), *HOOKS}
    undocumented = {name.rpartition(".")[2] for name in transformers_api.ATTRIBUTES} | transformers_api.IMPORTED.keys()
    for line, name in imports(path, tree):
        if UNDOCUMENTED_MODULES.match(name):
            errors.append(f"{path}:{line}: imports {name}: only {sorted(UPSTREAM)} use what is not documented")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value if node.value in undocumented else ""
        else:
            continue
        private = name.startswith("_") and not name.startswith("__") and name not in own
        allowed = path == OPERATORS[0] and OPERATORS[1].fullmatch(name)
        if (private or name in undocumented) and not allowed:
            errors.append(f"{path}:{node.lineno}: {name} is not documented: only {sorted(UPSTREAM)} use such names")
    return errors


def writes(call: ast.Call) -> bool:
    """Whether a call makes, changes or removes a file by its name. os.replace and Path.rename follow no link."""
    name = ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else None
    function = call.func.id if isinstance(call.func, ast.Name) else None
    if call.args and ast.unparse(call.args[0]) == "os.devnull":
        return False
    if name in OF_MODULES or method in REMOVING | WRITING or (method or function) in OTHER_FUNCTIONS:
        return True
    if function in REMOVING | WRITING:  # from shutil import rmtree
        return True
    if (method or function) != "open":
        return False
    mode = [*call.args[1 if function else 0 :][:1], *(k.value for k in call.keywords if k.arg == "mode")]
    return bool(mode) and not (isinstance(mode[0], ast.Constant) and not set("wax+") & set(str(mode[0].value)))


def pattern_errors(path, source):
    errors = []
    if (count := len(source.splitlines())) > MAX_LINES:
        errors.append(f"{path}: {count} lines, at most {MAX_LINES}: split it")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                errors.append(f"{path}:{node.lineno}: bare except: name the error")
            elif ast.unparse(node.type) in ("Exception", "BaseException") and isinstance(node.body[0], ast.Pass):
                errors.append(f"{path}:{node.lineno}: an error is swallowed: name it, or log it")
        elif isinstance(node, ast.Call) and path not in WRITERS and writes(node):
            errors.append(f"{path}:{node.lineno}: {ast.unparse(node.func)}: safe_files writes and removes")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            errors.append(f"{path}:{node.lineno}: torch.load: pickled weights are never loaded")
    return errors


def test_rooms_are_small():
    """What is in a room can be overlooked."""
    rooms = {}
    for path, file in FILES.items():
        folder = path.rpartition("/")[0]
        files, lines = rooms.get(folder, (0, 0))
        rooms[folder] = files + 1, lines + len(file.read_text(encoding="utf-8").splitlines())
    large = {folder: size for folder, size in rooms.items() if size[0] > MOST_FILES or size[1] > MOST_LINES}
    assert not large, large


def size_errors(path, source):
    """Functions that are too long to be read in one sitting, or take too much to be called without a look at them. One
    that has to says why beside its name: `# long: ...`, `# many parameters: ...`. Parameters of kernels and operators
    are the arguments of their launch, those of commands their options."""
    errors, lines = [], source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        beside = " ".join(lines[node.lineno - 2 : node.body[0].lineno])
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = len([each for each in given if each.arg not in ("self", "cls")])
        listed = path.startswith(("lowbit_kernels/", "lowbit/native/", "lowbit/cli/commands/"))
        if count > MOST_PARAMETERS and not listed and "# many parameters: " not in beside:
            errors.append(f"{path}:{node.lineno}: {node.name} takes {count} parameters")
        length = node.end_lineno - node.body[0].lineno + 1  # its parameters were counted
        if length > MOST_FUNCTION_LINES and "# long: " not in beside:
            errors.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return errors


@pytest.mark.parametrize("check", [layer_errors, boundary_errors, pattern_errors, size_errors])
def test_source_tree(check):
    assert FILES
    errors = [error for path, file in FILES.items() for error in check(path, file.read_text(encoding="utf-8"))]
    assert not errors, "\n" + "\n".join(errors)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lowbit/numerics/grid.py", "import math, torch\nfrom lowbit.numerics.qweight import QuantWeight"),
        ("lowbit/numerics/grid.py", "from lowbit import __version__\nfrom lowbit.numerics import qweight"),
        ("lowbit/formats/awq.py", "from lowbit.formats import bitpack\nfrom .bitpack import pack\nfrom . import gptq"),
        ("lowbit/formats/awq.py", "from ..numerics.qweight import QuantWeight\nfrom .. import errors"),
        ("lowbit/formats/__init__.py", "FORMATS = {'gptq': 'lowbit.cli:main'}\nfrom .bitpack import pack"),
        ("lowbit/backends/triton.py", "def linear():\n    import lowbit_kernels.gemv"),
        ("lowbit/cli/commands/quantize.py", "from lowbit.quantization import run\nfrom lowbit.eval import kl"),
        ("lowbit/__init__.py", "from lowbit.cli import main"),
        ("lowbit_kernels/gemv.py", "import json\nimport triton.language as tl\nfrom .dequant import f"),
    ],
)
def test_imports_that_are_allowed(path, source):
    assert layer_errors(path, source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lowbit/numerics/grid.py", "import lowbit.cli"),
        ("lowbit/numerics/grid.py", "from lowbit import quantization"),
        ("lowbit/numerics/grid.py", "from lowbit import quantize"),
        ("lowbit/numerics/grid.py", "import lowbit"),
        ("lowbit/numerics/grid.py", "from lowbit.layers.linear import LowbitLinear"),
        ("lowbit/numerics/grid.py", "def f():\n    from lowbit.hf.load import load"),
        ("lowbit/quantizers/rtn.py", "from ..formats import gptq"),
        ("lowbit/quantizers/rtn.py", "from .. import layers"),
        ("lowbit/backends/__init__.py", "from ..layers.linear import LowbitLinear"),
        ("lowbit/verification/checks.py", "from lowbit.quantization.report import Report"),
        ("lowbit/verification/checks.py", "from lowbit.conversion.dtype import convert_dtype"),
        ("lowbit/backends/reference.py", "import lowbit_kernels"),
        ("lowbit/layers/linear.py", "from lowbit_kernels.gemv import gemv"),
        ("lowbit/stray.py", "import torch"),
        ("lowbit_kernels/gemv.py", "from lowbit.errors import LowbitError"),
        ("lowbit_kernels/gemv.py", "import numpy"),
    ],
)
def test_imports_that_are_refused(path, source):
    assert len(layer_errors(path, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept:\n    raise",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept BaseException as error:\n    pass",
        "state = torch.load(path, weights_only=True)",
        'open(path, "w")',
        'path.open("a", encoding="utf-8")',
        'path.open(mode="x")',
        'open(path, mode="r+b")',
        "open(path, mode)",  # whatever it is
        "os.open(path, os.O_WRONLY)",
        "(folder / name).write_text(text)",
        "path.write_bytes(data)",
        "path.unlink(missing_ok=True)",
        "os.remove(path)",
        "os.unlink(path)",
        "shutil.rmtree(folder, ignore_errors=True)",
        "rmtree(folder)",
        "shutil.copy(source, target)",
        "save_file(tensors, path)",
        "\n" * (MAX_LINES + 1),
    ],
)
def test_patterns_that_are_refused(source):
    assert len(pattern_errors("lowbit/x.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model._is_stateful",
        "getattr(model, '_is_stateful', False)",
        "model.all_tied_weights_keys",
        "from transformers.core_model_loading import MergeModulelist",
        "def f():\n    import torch.utils._pytree",
        "from torch import _C",
        "from torch._C import DispatchKey",
        "from accelerate.hooks import AlignDevicesHook",
        "torch.ops.aten._weight_int4pack_mm_for_cpu",
        "module._parameters['weight']",
    ],
)
def test_undocumented_names_of_other_packages_are_refused(source):
    assert len(boundary_errors("lowbit/layers/linear.py", source)) == 1
    assert boundary_errors("lowbit/transformers_api.py", source) == []


def test_own_private_names_are_allowed():
    source = "class A:\n    def _f(self):\n        self._x = other._x\n        return self._f, super()._apply(f)"
    assert boundary_errors("lowbit/layers/linear.py", source) == []
    assert boundary_errors("lowbit/backends/torch_cpu.py", "torch.ops.aten._weight_int4pack_mm_for_cpu") == []


def test_patterns_that_are_allowed():
    source = "try:\n    f()\nexcept OSError:\n    pass\nexcept Exception as error:\n    log(error)\njson.load(file)"
    source += (
        "\nopen(path)\npath.open()\npath.open('rb', buffering=0)\nopen(path, encoding='utf-8')\nnames.remove(name)"
    )
    source += "\nos.replace(made, path)\nfolder.rename(target)\ntensor.copy_(other)\nsafe_open(path, 'pt')"
    source += "\nos.open(os.devnull, os.O_WRONLY)"
    assert pattern_errors("lowbit/x.py", source) == []
