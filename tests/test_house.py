"""The house: no circles of imports, rooms that know nothing of pruning, small files with docstrings."""

import ast
from pathlib import Path

import pytest

import probeprune

ROOT = Path(probeprune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PRUNING = (
    "methods",
    "plan",
    "prepare",
    "surgery",
    "dynamic",
    "calibration",
    "strategies",
    "runtime",
    "jobs",
    "training",
    "experiment",
)
"""Rooms and files about pruning, and those above them."""


def module(file: Path) -> str:
    """The dotted name of a file, without `probeprune.`; the package itself is empty."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file): file for file in FILES}


def at_import(tree: ast.AST) -> list[ast.stmt]:
    """The import statements that run when the file is imported: those in no function."""
    found: list[ast.stmt] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += at_import(node)
    return found


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for node in at_import(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{file}: write absolute imports"
            # `from package import name` imports a module where the name is one.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("probeprune.") in MODULES else node.module for n in inner]
        found |= {n.removeprefix("probeprune").lstrip(".") for n in names if n.split(".")[0] == "probeprune"}
    assert found <= MODULES.keys(), f"{file} imports {found - MODULES.keys()}, which is not there"
    return found


GRAPH = {name: imported(file) for name, file in MODULES.items()}


def reached(start: str) -> set[str]:
    """All modules that importing one needs."""
    found: set[str] = set()
    left = [start]
    while left:
        for name in GRAPH[left.pop()] - found:
            found.add(name)
            left.append(name)
    return found


def room(name: str) -> str:
    """The folder of a module in the package, or the module itself where it lies in the root."""
    return name.split(".")[0]


def test_the_graph_has_the_imports_that_are_there():
    assert len(FILES) > 80 and sum(map(len, GRAPH.values())) > 200
    assert {"report.palette", "bench.lines"} <= GRAPH["bench.plot"]
    assert "report.svg_charts" in GRAPH["report.html"], "imported by name from its package"


def test_imports_have_no_circles():
    assert [name for name in GRAPH if name in reached(name)] == []


def test_rooms_have_no_circles():
    rooms: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    left = dict(rooms)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these rooms import each other: {sorted(left)}"


@pytest.mark.parametrize("name", ["evaluation", "report"])
def test_a_room_knows_nothing_of_pruning(name):
    inside = [m for m in GRAPH if room(m) == name]
    known = {other for m in inside for other in reached(m)}
    assert inside and not {m for m in known if room(m) in PRUNING}


def test_few_files_in_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 16


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
def test_a_file_is_short_and_documented(file):
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    tree = ast.parse(source)
    bare = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in public(tree):
        bare += [] if ast.get_docstring(node) else [node.name]
    assert not bare, f"without a docstring: {', '.join(bare)}"


def public(tree: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes without an underscore, and the methods of classes that derive from no other.

    Classes that only set one attribute of a library's class (modeling_pruned.py) are explained as a family.
    """
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and len(node.body) == 1 and isinstance(node.body[0], ast.Assign):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            found.append(node)
            # Methods of derived classes are those of a library, documented there.
            found += public(node) if isinstance(node, ast.ClassDef) and not node.bases else []
    return found
