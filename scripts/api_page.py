"""Render docs/api.md from the public names of lowbit: their signatures and docstrings.

    python scripts/api_page.py [--check]

--check changes nothing and fails if the page is not what the sources say.
"""

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
sys.path[:0] = [str(ROOT)]

import lowbit  # noqa: E402

# What is not shown of the type of a parameter: that it is text, and which modules define it
_FORWARD = re.compile(r"(?<=: )'(torch\.[^']+)'")
_BEFORE_CLASS = re.compile(r"\b(\w+\.)+(?=[A-Z])")


def definition(name: str) -> tuple[ast.FunctionDef | ast.ClassDef, str]:
    """The statement that defines a public name, and the module it is in."""
    module, attribute = lowbit._PUBLIC[name].split(":")
    module = getattr(import_module(module), attribute).__module__
    tree = ast.parse(Path(import_module(module).__file__).read_text(encoding="utf-8"))
    found = (node for node in tree.body if getattr(node, "name", None) == attribute)
    return next(found), module


def signature(node: ast.FunctionDef | ast.ClassDef, public) -> str:
    """One argument a line where there are several."""
    subject = public.__init__ if isinstance(public, type) else public
    if hasattr(subject, "__signature__"):
        return _spread(node.name, inspect.signature(subject))
    made = node
    if isinstance(node, ast.ClassDef):
        made = next((each for each in node.body if getattr(each, "name", None) == "__init__"), None)
        if made is None:
            fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
            return f"{node.name}({_lines(fields)})"
    arguments = made.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    shown = [_argument(*pair) for pair in zip(positional, defaults, strict=True) if pair[0].arg != "self"]
    shown += ["*"] * bool(arguments.kwonlyargs)
    shown += [_argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    shown += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    result = f" -> {ast.unparse(made.returns)}" if made.returns is not None and made is node else ""
    return f"{node.name}({_lines(shown)}){result}"


def _spread(name: str, made: inspect.Signature) -> str:
    """The signature that `takes_options` gives a function, whose options its source does not list."""
    shown, starred = [], False
    for parameter in [each for each in made.parameters.values() if each.name != "self"]:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown, starred = [*shown, "*"], True
        shown.append(_BEFORE_CLASS.sub("", _FORWARD.sub(r"\1", str(parameter))))
    returned = made.return_annotation
    result = "" if returned is made.empty or returned is None else f" -> {inspect.formatannotation(returned)}"
    return f"{name}({_lines(shown)}){_BEFORE_CLASS.sub('', result)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}" + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def _lines(parts: list[str]) -> str:
    return ", ".join(parts) if len(parts) < 3 else "\n" + "".join(f"    {part},\n" for part in parts)


def page() -> str:
    parts = [
        "# API",
        "What `import lowbit` gives; everything else may change. Rendered by `python scripts/api_page.py`.",
    ]
    for name in lowbit._PUBLIC:
        node, module = definition(name)
        public = getattr(lowbit, name)
        parts += [
            f"## lowbit.{name}",
            f"<!-- norun: a signature -->\n```python\n{signature(node, public)}\n```",
            f"```text\n{inspect.getdoc(public)}\n```",
            f"Defined in `{module}`.",
        ]
    return "\n\n".join(parts) + "\n"


def main():
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != made:
        sys.exit("docs/api.md is stale: run python scripts/api_page.py")


if __name__ == "__main__":
    main()
