"""Counting quotes finds the same row ends as the csv module; parts give the rows of the whole, however they are cut."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blues.data.reading import cutting, readers, sources
from blues.data.reading.cutting import csv_row_ends, csv_row_ends_by_reading
from blues.data.reading.readers import Document, read_part
from blues.errors import DataError

LAX = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ends(content: bytes, delimiter: str = ",", limit: int = 1 << 20) -> list[int]:
    return [int(end) for found in csv_row_ends(io.BytesIO(content), delimiter, len(content), limit) for end in found]


def ends_by_reading(content: bytes, delimiter: str = ",", limit: int = 1 << 20) -> list[int]:
    return [int(end) for found in csv_row_ends_by_reading(io.BytesIO(content), delimiter, 0, limit) for end in found]


@pytest.fixture(params=[1, 7, 4 << 20])
def window(request, monkeypatch) -> int:
    monkeypatch.setattr(cutting, "WINDOW_BYTES", request.param)
    return request.param


PIECES = ['"', '""', '"a"', '"a,\n"', ",", "\n", "\r\n", "\r", "a", "é", "\t", '"b""c"', "\0", "\ufeff"]


@LAX
@given(parts=st.lists(st.sampled_from(PIECES), max_size=40), delimiter=st.sampled_from([",", "\t"]))
@example(parts=['"', "a", "\n"], delimiter=",")
@example(parts=["a", '"', "\n", '"', "b", '"'], delimiter=",")
@example(parts=["\ufeff", '"a\n"', "\n", "b"], delimiter=",")
@example(parts=["a", "\n", "\n", "\r\n", "\r", "\n"], delimiter=",")
def test_counting_quotes_finds_the_rows_of_the_csv_module(window, parts, delimiter):
    content = "".join(parts).encode()
    assert ends(content, delimiter) == ends_by_reading(content, delimiter)


cells = st.text(st.sampled_from('ab",\n é'), max_size=12).map(lambda cell: '"' + cell.replace('"', '""') + '"')
regular = st.lists(st.lists(cells | st.sampled_from(["x", "", "yz"]), min_size=1, max_size=4), max_size=20)


@LAX
@given(rows=regular, line_end=st.sampled_from(["\n", "\r\n"]))
def test_regular_files_are_cut_without_the_csv_module(window, monkeypatch, rows, line_end):
    content = "".join(",".join(row) + line_end for row in rows).encode()
    wanted = ends_by_reading(content)
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "csv_row_ends_by_reading", lambda *_: pytest.fail("it was read row by row"))
        assert ends(content) == wanted
        assert ends(content.removesuffix(line_end.encode())) == [
            min(end, len(content) - len(line_end)) for end in wanted
        ]


def test_rows_longer_than_a_document_may_be_are_left_to_the_csv_module(monkeypatch):
    monkeypatch.setattr(cutting, "WINDOW_BYTES", 16)
    for long in (b"x" * 200, b'"' + b"y\n" * 100 + b'"', b'"' + b"z" * 200 + b'"'):
        content = b"a,b\n1," + long + b"\n2,b\n3,c\n"
        assert ends(content, limit=50) == ends_by_reading(content, limit=50)


def records(plan: sources.Plan) -> list[readers.Record]:
    return [record for task in plan.tasks() for part in task for record in read_part(plan.root, part)]


@pytest.mark.parametrize("part_bytes", [1, 10, 1000, 70_000])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.txt"])
def test_parts_give_the_records_of_the_whole(tmp_path: Path, monkeypatch, name, part_bytes):
    monkeypatch.setattr(readers, "TEXT_DOCUMENT_BYTES", 500)
    delimiter = "\t" if name == "t.tsv" else ","
    rows = [f'{n}{delimiter}"row ""{n}""\nof é {"x" * (n % 90)}"' for n in range(900)]
    rows[100], rows[101], rows[500] = '101"', 'x"y', '501,"never closed'
    content = "\n".join(["\ufeffid" + delimiter + "text", *rows])
    if name == "t.jsonl":
        content = "\n".join(f'{{"text": "row {n} {"x" * (n % 90)}"}}' if n % 50 else "{" for n in range(900))
    (tmp_path / name).write_text(content, encoding="utf-8")
    whole = records(sources.plan(tmp_path / name))
    assert len(whole) > 100
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    plan = sources.plan(tmp_path / name)
    assert records(plan) == whole
    parts = [part for task in plan.tasks() for part in task]
    assert len(parts) == 1 or [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert len(parts) > 1 or part_bytes > 10_000
    assert sum(part.bytes for part in parts) == (tmp_path / name).stat().st_size


def test_a_long_line_is_not_held_while_cutting(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + " " * 300_000 + '\n{"text": "b"}\n' * 100)
    monkeypatch.setattr(cutting, "BLOCK_BYTES", 512)
    plan = sources.plan(tmp_path / "t.jsonl")
    assert len(plan.tasks()) > 2 and sum(isinstance(record, Document) for record in records(plan)) == 101


def test_a_file_that_changes_while_it_is_cut_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    for name, content in (("t.csv", b"text\n" + b"row\n" * 100), ("t.jsonl", b'{"text": "a"}\n' * 100)):
        (tmp_path / name).write_bytes(content)
        plan = sources.plan(tmp_path / name)
        (tmp_path / name).write_bytes(content + b"more\n")
        with pytest.raises(DataError, match="changed while it was being prepared"):
            plan.tasks()
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match="cannot read"):
            plan.tasks()


def test_row_ends_of_a_long_regular_file_in_windows(monkeypatch):
    monkeypatch.setattr(cutting, "WINDOW_BYTES", 1000)
    generator = np.random.default_rng(0)
    rows = [f'{n},"{"word, " * int(generator.integers(0, 40))}""{n}""\n"\n' for n in range(3000)]
    content = "id,text\n" + "".join(rows)
    assert ends(content.encode()) == [8, *(8 + np.cumsum([len(row) for row in rows])).tolist()]
