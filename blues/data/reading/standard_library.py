"""Two real datasets that every machine has: the running interpreter's standard library, as code and as English.

In: where to write and how much. Out: a tree of .py files (`write_code`), and JSON Lines of docstrings and of Python's
help topics (`write_text`), for the demonstration and for trying things without a download.

A module gives either its code or its docstrings, never both: otherwise a docstring held out of the text would have
been trained on as part of the code. Both are the same on every machine with the same Python, whatever the file order.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blues.config import write_atomic
from blues.errors import DataError

SKIPPED = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings")
    + ("pydoc_data", "__pycache__")
)
"""Folders: installed packages, tests, generated tables, and what some distributions leave out."""

SHORTEST_DOCSTRING = 40
"""Characters; shorter ones say what the name says."""


@dataclass(frozen=True)
class Written:
    """What was written where. documents: files of code, or lines of JSON. size: bytes of UTF-8 text."""

    path: Path
    documents: int
    size: int


def write_code(directory: str | Path, *, max_bytes: int, root: str | Path | None = None) -> Written:
    """Copy modules into `directory`, a whole source tree, until `max_bytes` of them are there.

    root: another library than the interpreter's. A directory that exists is replaced.

    Raises:
        DataError: the interpreter has no source files (some ship as one zip file).
    """
    directory, root = Path(directory), _root(root)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    documents = size = 0
    try:
        for path in _modules(root, as_text=False):
            source = path.read_bytes()
            if size + len(source) > max_bytes:
                continue
            copy = temporary / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source)
            documents, size = documents + 1, size + len(source)
        if not documents:
            raise DataError(f"no Python files under {str(root)!r} fit into {max_bytes} bytes; use another Python")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Written(directory, documents, size)


def write_text(path: str | Path, *, max_bytes: int, root: str | Path | None = None) -> Written:
    """Write help topics, then docstrings, as lines of `{"id": ..., "text": ..., "module": ...}` up to `max_bytes`.

    Raises:
        DataError: the interpreter has no source files.
    """
    path, root = Path(path), _root(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, size, seen = [], 0, set[str]()
    for name, text, module in _texts(root):
        length = len(text.encode())
        if text in seen or size + length > max_bytes:
            continue
        seen.add(text)
        lines.append(json.dumps({"id": name, "text": text, "module": module}, ensure_ascii=False))
        size += length
    if not lines:
        raise DataError(f"no documentation under {str(root)!r} fits into {max_bytes} bytes; use another Python")
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return Written(path, len(lines), size)


def _root(root: str | Path | None) -> Path:
    return Path(sysconfig.get_path("stdlib")) if root is None else Path(root)


def _modules(root: Path, *, as_text: bool) -> Iterator[Path]:
    """The modules that give their docstrings (`as_text`) or their code, in an order that mixes the packages."""
    paths = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    keyed = sorted((zlib.crc32(path.relative_to(root).as_posix().encode()), path) for path in paths)
    return (path for key, path in keyed if (key % 2 == 1) is as_text)


def _texts(root: Path) -> Iterator[tuple[str, str, str]]:
    """(id, text, module) of every help topic and every docstring."""
    if importlib.util.find_spec("pydoc_data") is not None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from ((f"topic:{name}", text.strip(), "pydoc_data.topics") for name, text in sorted(topics.items()))
    for path in _modules(root, as_text=True):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken examples are not modules
            continue
        for name, docstring in _docstrings(tree, module):
            if len(docstring) >= SHORTEST_DOCSTRING:
                yield name, docstring, module


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Qualified name and cleaned docstring of a module, its classes and its functions, in order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        own = getattr(child, "name", None) if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else None
        yield from _docstrings(child, f"{name}.{own}" if own else name)
