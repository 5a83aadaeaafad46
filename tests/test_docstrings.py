"""What is public has a docstring: classes, functions and methods, but not a method that overrides another.

Public: no name on the way to it begins with an underscore. A class says what its `__call__` does.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    *sorted((ROOT / "flux").rglob("*.py")),
    *(ROOT / f"{n}.py" for n in ("txt2image", "dreambooth", "caption")),
]
Defined = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def classes(trees: dict[Path, ast.Module]) -> dict[str, ast.ClassDef]:
    """Every class by its name; no two that are base classes share one."""
    return {
        node.name: node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def bases(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """The classes of this project that a class inherits from, near and far."""
    for base in node.bases:
        name = ast.unparse(base).split("[")[0].rpartition(".")[2]
        if name in known and known[name] is not node:
            yield known[name]
            yield from bases(known[name], known)


def public(node: ast.Module | ast.ClassDef) -> list[Defined]:
    return [n for n in node.body if isinstance(n, Defined) and not n.name.startswith("_")]


def undocumented(tree: ast.Module, known: dict[str, ast.ClassDef]) -> Iterator[str]:
    """The names of what lacks a docstring in a module."""
    for node in public(tree):
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            inherited = {method.name for base in bases(node, known) for method in public(base)}
            for method in public(node):
                if not ast.get_docstring(method) and method.name not in inherited:
                    yield f"{node.name}.{method.name}"


def test_what_is_public_has_a_docstring():
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    known = classes(trees)
    found = {str(file.relative_to(ROOT)): list(undocumented(tree, known)) for file, tree in trees.items()}
    assert not {file: names for file, names in found.items() if names}


def test_the_rule():
    tree = ast.parse(
        "class A:\n 'Says.'\n def f(self): 'Says.'\n def g(self): pass\n def _h(self): pass\n"
        "class B(A):\n 'Says.'\n def f(self): pass\n def i(self): pass\n"
        "class _C:\n def f(self): pass\n"
        "def k(): pass\n"
    )
    assert list(undocumented(tree, classes({Path(): tree}))) == ["A.g", "B.i", "k"]
