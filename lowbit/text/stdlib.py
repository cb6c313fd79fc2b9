"""The Python standard library as a text corpus: the one body of real text that every machine with lowbit has.

The embedded reference model is trained on the "train" split and measured on the "heldout" split. The held-out modules,
and the tests that exercise them, never appear in "train".
"""

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lowbit.errors import InputError

HELDOUT_MODULES = (
    "bisect", "calendar", "cmd", "colorsys", "configparser", "csv", "fractions", "graphlib", "heapq", "queue",
    "sched", "shlex", "statistics", "textwrap", "http/cookies", "email/utils", "logging/handlers", "json/encoder",
)  # fmt: skip

# Not prose a reader would recognise as Python: code-page tables, and the test suite's deliberately broken files.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "__pycache__", "lib2to3", "badsyntax"}
_SKIPPED_PREFIXES = ("bad", "config-")


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _is_heldout_test(stem: str) -> bool:
    names = {module.replace("/", "_") for module in HELDOUT_MODULES} | {m.split("/")[-1] for m in HELDOUT_MODULES}
    return any(stem == f"test_{name}" or stem.startswith(f"test_{name}_") for name in names)


def sources(split: str) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of each module of `split` ("train" or "heldout"), in a fixed order.

    Raises InputError when the interpreter ships no standard library sources (frozen or stripped installs).
    """
    root = stdlib_folder()
    heldout = {f"{module}.py" for module in HELDOUT_MODULES}
    found = False
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or path.name.startswith(_SKIPPED_PREFIXES):
            continue
        is_heldout = relative.as_posix() in heldout
        if is_heldout != (split == "heldout") or (not is_heldout and _is_heldout_test(path.stem)):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the test suite holds files in other encodings on purpose
        found = True
        yield relative.as_posix(), text
    if not found:
        raise InputError(
            f"no standard library sources under {root}: expected *.py files there; pass a text file instead"
        )


def described_functions(split: str) -> Iterator[tuple[str, str]]:
    """Yield (first docstring paragraph, dedented source) of each short documented function."""
    for _, text in sources(split):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno > 30:
                continue
            docstring = ast.get_docstring(node)
            if docstring:
                question = " ".join(docstring.split("\n\n")[0].split())
                if 12 <= len(question) <= 160:
                    yield question, textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
