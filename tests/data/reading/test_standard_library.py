"""The interpreter's own library as data: real, bounded, the same every time, and no text twice."""

from __future__ import annotations

import ast
import json

import pytest

from blues.data.reading.standard_library import write_code, write_text
from blues.errors import DataError


def test_code_is_a_tree_of_modules_within_the_budget(tmp_path):
    written = write_code(tmp_path / "code", max_bytes=300_000)
    files = sorted((tmp_path / "code").rglob("*.py"))
    assert written.documents == len(files) > 5
    assert written.size == sum(file.stat().st_size for file in files) <= 300_000
    again = write_code(tmp_path / "again", max_bytes=300_000)
    assert again.size == written.size
    assert [f.relative_to(tmp_path / "again") for f in sorted((tmp_path / "again").rglob("*.py"))] == [
        f.relative_to(tmp_path / "code") for f in files
    ]


def test_text_is_topics_and_docstrings_each_once(tmp_path):
    written = write_text(tmp_path / "text.jsonl", max_bytes=10_000_000)
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert written.documents == len(rows) > 500
    assert written.size == sum(len(row["text"].encode()) for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)
    assert any(row["id"].startswith("topic:") for row in rows)
    assert any(not row["id"].startswith("topic:") for row in rows)


def test_no_docstring_of_the_text_stands_in_the_code(tmp_path):
    write_code(tmp_path / "code", max_bytes=100_000_000)
    write_text(tmp_path / "text.jsonl", max_bytes=100_000_000)
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    texts = {row["text"] for row in rows if len(row["text"]) > 400}
    in_code = set()
    for file in (tmp_path / "code").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                in_code.add(ast.get_docstring(node))
    assert len(texts) > 100 and len(texts & in_code) <= len(texts) // 50  # a few are copied within the library itself


def test_a_library_without_sources_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Python files under"):
        write_code(tmp_path / "code", max_bytes=1000, root=tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
