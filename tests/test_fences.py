"""The rules of the house that can be read off the source: fenced dependencies, import order, length, no stubs."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("blues", "jobs", "tuning")

FENCES = {
    "ray": ("blues/cluster/", "jobs/", "tuning/"),
    "deepspeed": ("blues/training/engine.py", "blues/training/parallel.py"),
    "mlflow": ("blues/tracking/",),
    "tree_sitter": ("blues/syntax/",),
}
"""Where a dependency may be imported, at module level or in a function."""

LAZY = ("transformers", "tokenizers", "mlflow", "shtab")
"""Imported inside functions only: each costs seconds, or is needed by one command."""

ORDER = (
    ("blues", "blues.errors", "blues.config", "blues.table"),
    ("blues.syntax",),
    ("blues.data",),
    ("blues.kernels",),
    ("blues.model",),
    ("blues.tracking",),
    ("blues.training",),
    ("blues.inference",),
    ("blues.evaluation",),
    ("blues.experiment",),
    ("blues.cluster",),
    ("tuning",),
    ("blues.variants", "blues.cli"),
    ("jobs",),
)
"""The journey of data. A module imports from its own row and the rows above. `blues.cli` finds jobs by name."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported name with its line; `from blues import config` counts as `blues.config`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports absolutely"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def row_of(name: str) -> int | None:
    """The row of ORDER a dotted name belongs to (longest match), None for other people's packages."""
    best: tuple[int, int] | None = None
    for row, names in enumerate(ORDER):
        for candidate in names:
            exact = name == candidate or name.startswith(candidate + ".")
            if exact and (best is None or len(candidate) > best[0]):
                best = (len(candidate), row)
    return None if best is None else best[1]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_fenced_dependencies_stay_inside_their_fences(path):
    where = name_of(path)
    for name, line in imports_of(tree_of(path)):
        allowed = FENCES.get(name.partition(".")[0])
        if allowed is not None:
            assert where.startswith(allowed), f"{where}:{line} imports {name}; allowed only in {', '.join(allowed)}"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_imports_point_up_the_journey(path):
    own = row_of(module_of(path))
    assert own is not None, f"{name_of(path)} has no place in the order of the journey"
    for name, line in imports_of(tree_of(path)):
        row = row_of(name)
        assert row is None or row <= own, f"{name_of(path)}:{line} imports {name}, which comes later in the journey"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_slow_or_rare_packages_are_imported_where_they_are_used(path):
    inside = {
        id(node)
        for function in ast.walk(tree_of(path))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or id(node) in inside or _is_typing_only(path, node):
            continue
        for name, line in imports_of(ast.Module(body=[node], type_ignores=[])):
            assert name.partition(".")[0] not in LAZY, f"{name_of(path)}:{line} imports {name} at module level"


def _is_typing_only(path: Path, node: ast.AST) -> bool:
    blocks = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return any(node in ast.walk(block) for block in blocks)


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=name_of)
def test_files_and_functions_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{name_of(path)} has {lines} lines; split it at a seam (at most 500)"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = (node.end_lineno or 0) - (body[0].lineno if body else node.lineno) + 1
            assert length <= 60, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines (at most 60)"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_nothing_is_a_stub_and_no_error_is_swallowed(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            pytest.fail(f"{name_of(path)}:{node.lineno} NotImplementedError: use abc.abstractmethod, or write it")
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (broad and silent), f"{name_of(path)}:{node.lineno} swallows every error in silence"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line), f"{name_of(path)}:{number} {line.strip()}"


@pytest.mark.parametrize("path", [p for p in sources(*PACKAGES) if p.read_text().strip()], ids=name_of)
def test_every_module_opens_with_what_it_does(path):
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring: what comes in, what goes out"


def test_tests_mirror_the_modules():
    """A test folder has an __init__.py, and tests/data/test_store.py tests a module blues/data/storage/store.py."""
    for path in sources("tests"):
        folder = path.parent
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} needs an __init__.py"
