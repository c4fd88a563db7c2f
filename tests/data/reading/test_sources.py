"""Plans and readers: every way of cutting a file gives the rows of the whole file; what is wrong is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blues.data.merging.merge import merge
from blues.data.reading import sources
from blues.data.reading.readers import Document, Rejected, read_part
from blues.errors import DataError
from tests.data.datasets import make_store

NO_FIXTURE_CHECK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(plan: sources.Plan) -> list[Document | Rejected]:
    return [record for task in plan.tasks() for part in task for record in read_part(plan.root, part)]


def texts(plan: sources.Plan) -> list[str]:
    return [record.text for record in read_all(plan) if isinstance(record, Document)]


def reasons(plan: sources.Plan) -> list[tuple[int | None, str]]:
    return [(record.row, record.reason) for record in read_all(plan) if isinstance(record, Rejected)]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)


@NO_FIXTURE_CHECK
@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=30), target=st.integers(1, 200))
def test_cutting_a_table_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str]], target: int
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["id", "text"])
    writer.writerows(rows)
    (tmp_path / "t.csv").write_bytes(buffer.getvalue().encode())
    lines = [json.dumps({"id": id, "text": text}, ensure_ascii=False) for id, text in rows]
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode())
    pq.write_table(pa.table({"id": [r[0] for r in rows], "text": [r[1] for r in rows]}), tmp_path / "t.parquet", 3)
    wanted = [text for _, text in rows if not text.isspace()]
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        monkeypatch.setattr(sources, "PART_BYTES", 1 << 22)
        whole = read_all(sources.plan(tmp_path / name))
        monkeypatch.setattr(sources, "PART_BYTES", target)
        cut = sources.plan(tmp_path / name)
        assert read_all(cut) == whole
        if name != "t.csv":  # the csv module reads a bare carriage return or line separator in its own way
            assert texts(cut) == wanted


def test_csv_with_quoted_line_breaks_keeps_rows_whole(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text('id,text\n1,"first\nline, ""quoted"""\n2,second\n', encoding="utf-8")
    plan = sources.plan(tmp_path / "notes.csv", id_column="id")
    assert [(r.id, r.text) for r in read_all(plan)] == [("1", 'first\nline, "quoted"'), ("2", "second")]  # type: ignore[union-attr]


def test_bad_rows_are_named_and_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(b"id,text\n1,good\n2\n3,caf\xe9\n4,\n5,a\0b\n6,also good\n")
    plan = sources.plan(tmp_path / "bad.csv")
    assert texts(plan) == ["good", "also good"]
    assert reasons(plan) == [(2, "wrong number of fields"), (3, "invalid UTF-8"), (4, "empty"), (5, "NUL byte")]

    rows = [b'{"text": "good"}', b"{", b"[1]", b'{"txt": 1}', b'{"text": 5}', b'{"text": null}', b'"\xff"']
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(rows) + b'\n\n{"text": "end"}\n')
    plan = sources.plan(tmp_path / "bad.jsonl")
    assert texts(plan) == ["good", "end"]
    assert reasons(plan) == [
        (2, "invalid JSON"),
        (3, "not a JSON object"),
        (4, "no column 'text'"),
        (5, "not text"),
        (6, "no text"),
        (7, "invalid UTF-8"),
    ]


@pytest.mark.parametrize("later", ["", '7,"a, b"\n', '7,"two\nlines"\n'])
def test_a_quote_that_is_never_closed_costs_its_own_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    good = "".join(f"{n},good {n}\n" for n in range(3, 1003))
    (tmp_path / "t.csv").write_text(f'id,text\n1,first\n2,"never closed\n{good}{later}', encoding="utf-8")
    plan = sources.plan(tmp_path / "t.csv")
    wanted = ["first", *(f"good {n}" for n in range(3, 1003))]
    assert texts(plan)[:1001] == wanted and reasons(plan) == [(2, "malformed CSV")]
    monkeypatch.setattr(sources, "PART_BYTES", 500)
    cut = sources.plan(tmp_path / "t.csv")
    assert len(cut.tasks()) > 5 and read_all(cut) == read_all(plan)


def test_a_line_longer_than_a_document_may_be_is_rejected_alone(tmp_path: Path) -> None:
    limit = 1 << 20
    long = json.dumps({"text": "x" * (3 << 20)})
    (tmp_path / "long.jsonl").write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n', encoding="utf-8")
    plan = sources.plan(tmp_path / "long.jsonl", max_document_bytes=limit)
    assert texts(plan) == ["a", "b"] and reasons(plan) == [(2, "row too long")]
    (tmp_path / "long.csv").write_text(f"text\na\n{'x' * (3 << 20)}\nb\n", encoding="utf-8")
    plan = sources.plan(tmp_path / "long.csv", max_document_bytes=limit)
    assert texts(plan) == ["a", "b"] and reasons(plan) == [(2, "row too long")]
    details = [record.detail for record in read_all(plan) if isinstance(record, Rejected)]
    assert details[0].startswith("longer than 1 MiB; raise --max-document-mb")
    (tmp_path / "long.py").write_text("x" * (3 << 20))
    pq.write_table(pa.table({"text": ["a", "x" * (3 << 20), "b"]}), tmp_path / "long.parquet")
    assert reasons(sources.plan(tmp_path / "long.py", max_document_bytes=limit)) == [(None, "file too large")]
    assert reasons(sources.plan(tmp_path / "long.parquet", max_document_bytes=limit)) == [(2, "row too long")]
    for name in ("long.jsonl", "long.csv", "long.parquet", "long.py"):
        assert reasons(sources.plan(tmp_path / name)) == []


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_a_row_of_104_megabytes_is_a_document(tmp_path: Path, name: str) -> None:
    long = "0123456 " * (13 << 20)
    if name == "t.parquet":
        pq.write_table(pa.table({"text": ["a", long, "b"]}), tmp_path / name, use_dictionary=False)
    elif name == "t.csv":
        (tmp_path / name).write_text(f'text\na\n"{long}"\nb\n')
    else:
        (tmp_path / name).write_text(f'{{"text": "a"}}\n{{"text": "{long}"}}\n{{"text": "b"}}\n')
    assert texts(sources.plan(tmp_path / name)) == ["a", long, "b"]


def test_rows_with_lines_add_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is as long as all its lines; parts find the same rows."""
    rows = [f'{n},"' + "some text\n" * n + '"\n' for n in range(60)]
    (tmp_path / "t.csv").write_text("id,text\n" + "".join(rows))
    plan = sources.plan(tmp_path / "t.csv", max_document_bytes=300)
    whole = read_all(plan)
    assert texts(plan)[:29] == ["some text\n" * n for n in range(1, 30)]
    assert next(reason for row, reason in reasons(plan) if row and row > 10) == "row too long"
    monkeypatch.setattr(sources, "PART_BYTES", 500)
    cut = sources.plan(tmp_path / "t.csv", max_document_bytes=300)
    assert len(cut.tasks()) > 5 and read_all(cut) == whole


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_tables_separated_by_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delimiter: str) -> None:
    rows = "".join(f'{n}{delimiter}"row, {n}{delimiter} ""x"""\n' for n in range(200))
    path = write(tmp_path, "t.csv", f"id{delimiter}text\n{rows}".encode())
    with pytest.raises(
        DataError, match="t.csv' has a single column, .*; say what separates it with --delimiter"
    ) as bad:
        sources.plan(path, id_column="id")
    assert f"--delimiter {delimiter!r}" in str(bad.value) and "\n" not in str(bad.value)
    plan = sources.plan(path, id_column="id", delimiter=delimiter)
    assert texts(plan) == [f'row, {n}{delimiter} "x"' for n in range(200)]
    monkeypatch.setattr(sources, "PART_BYTES", 300)
    cut = sources.plan(path, id_column="id", delimiter=delimiter)
    assert len(cut.tasks()) > 5 and read_all(cut) == read_all(plan)


def test_a_single_column_may_be_named_whatever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", b"either|or\nx\n")
    assert texts(sources.plan(path, text_column="either|or")) == ["x"]
    assert texts(sources.plan(path, delimiter=",")) == ["x"]
    tabs = write(tmp_path, "u.csv", b"id\ttext\n1\tx\n")
    assert texts(sources.plan(tabs, delimiter=r"\t")) == ["x"]
    assert texts(sources.plan(write(tmp_path, "v.tsv", b"id\ttext\n1\tx\n"))) == ["x"]
    with pytest.raises(DataError, match="--delimiter ','"):
        sources.plan(write(tmp_path, "v.tsv", b"id,text\n1,x\n"))
    for wrong in ("", ";;", '"', "\n", "§"):
        with pytest.raises(DataError, match="--delimiter must be one character"):
            sources.plan(path, delimiter=wrong)


def test_a_wrong_name_and_damaged_compression_are_told_apart(tmp_path: Path) -> None:
    lines = b'{"text": "a"}\n' * 100
    for name, pack in (("gz", gzip.compress), ("zst", zstandard.compress)):
        kind = {"gz": "gzip", "zst": "zstd"}[name]
        for table, content in (("t.jsonl", lines), ("t.csv", b"text\na\n")):
            with pytest.raises(DataError, match=rf"{table}.{name}' is not {kind}, though its name says so"):
                sources.plan(write(tmp_path, f"{table}.{name}", content))
        with pytest.raises(DataError, match=f"d.jsonl.{name}' is damaged {kind}"):
            sources.plan(write(tmp_path, f"d.jsonl.{name}", pack(lines)[:6] + b"\xee" * 50))


def test_compressed_lines_are_read_and_a_truncated_file_says_where_it_ends(tmp_path: Path) -> None:
    content = b"".join(json.dumps({"text": f"document {n}"}).encode() + b"\n" for n in range(20_000))
    for name, packed in (("a.jsonl.gz", gzip.compress(content)), ("a.jsonl.zst", zstandard.compress(content))):
        (tmp_path / name).write_bytes(packed)
        assert len(texts(sources.plan(tmp_path / name))) == 20_000
        (tmp_path / f"cut-{name}").write_bytes(packed[: len(packed) // 2])
        plan = sources.plan(tmp_path / f"cut-{name}")
        assert texts(plan) == [f"document {n}" for n in range(len(texts(plan)))]
        assert [reason for _, reason in reasons(plan)] == ["damaged compression"]


def test_a_source_tree_is_walked_without_links_hidden_or_binary_files(tmp_path: Path) -> None:
    tree = tmp_path / "a tree, ünïcode"
    (tree / "pkg" / ".git").mkdir(parents=True)
    (tree / "pkg" / "b.py").write_text("b = 1\n")
    (tree / "a.go").write_text("package a\n")
    (tree / "pkg" / ".git" / "c.py").write_text("hidden\n")
    (tree / "d.py").write_bytes(b"\0\1binary")
    (tree / "photo.png").write_bytes(b"png")
    os.symlink(tree, tree / "pkg" / "loop")
    os.symlink(tree / "a.go", tree / "link.go")
    plan = sources.plan(tree)
    documents = [record for record in read_all(plan) if isinstance(record, Document)]
    assert [(d.id, d.metadata) for d in documents] == [
        ("a.go", {"language": "go"}),
        ("pkg/b.py", {"language": "python"}),
    ]
    assert reasons(plan) == [(None, "NUL byte")]
    assert plan.ignored == {".png": 1, "link or special file": 2}


def test_a_long_text_is_cut_at_empty_lines_without_losing_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"Paragraph {n} says äöü.\n{'word ' * (n % 50)}\n\n" for n in range(9_000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    whole = read_all(sources.plan(tmp_path / "book.txt"))
    assert "".join(record.text for record in whole) == text and len(whole) > 2  # type: ignore[union-attr]
    assert all(record.text.endswith("\n\n") for record in whole)  # type: ignore[union-attr]
    monkeypatch.setattr(sources, "PART_BYTES", 300_000)
    cut = sources.plan(tmp_path / "book.txt")
    assert len(cut.tasks()) > 2 and read_all(cut) == whole


def test_plans_do_not_depend_on_place_or_time_but_on_content(tmp_path: Path) -> None:
    plans = []
    for folder, body in (("one", "x"), ("two", "x"), ("three", "y")):
        (tmp_path / folder / "src").mkdir(parents=True)
        (tmp_path / folder / "src" / "a.py").write_text(body)
        os.utime(tmp_path / folder / "src" / "a.py", (len(plans), len(plans)))
        plans.append(sources.plan(tmp_path / folder / "src"))
    assert plans[0].source == plans[1].source and plans[1].files != plans[2].files
    assert [part.file for part in plans[0].parts()] == ["a.py"]


def test_a_plan_holds_its_files_in_columns(tmp_path: Path) -> None:
    """Equal to what is said of one file after the other."""
    contents = {"b.py": "b = 1\n", "a/ünï.md": "# a\n", "empty.csv": "", "t.csv": "text\nrow\n", "bad.parquet": "PAR1"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    plan = sources.plan(tmp_path, max_document_bytes=1 << 20)
    digest, rows = xxhash.xxh3_128(), []
    for name in sorted(contents):
        token = f"xxh3:{xxhash.xxh3_128_hexdigest(contents[name].encode())}"
        digest.update(f"{name}\0{token}\0".encode())
        [reading] = [part.reading.described for part in plan.parts() if part.file == name] or [""]
        rows.append({"file": name, "content": token, "bytes": len(contents[name].encode()), "reading": reading})
    assert plan.files.to_pylist() == rows and plan.content == digest.hexdigest()
    assert plan.bytes == sum(row["bytes"] for row in rows)
    common = '"encoding": "utf-8", '
    assert [part.reading.described for part in plan.parts()] == [
        '{"kind": "text", ' + common + '"language": "markdown", "max_document_bytes": 1048576}',
        '{"kind": "source", ' + common + '"language": "python", "max_document_bytes": 1048576}',
        '{"kind": "csv", "text_column": "text", ' + common + '"delimiter": ",", "max_document_bytes": 1048576}',
    ], "what datasets remember must not change"
    assert [part.file for part in plan.parts(np.array([True, False, True, True, False]))] == ["a/ünï.md"]
    assert [part.file for task in plan.tasks(np.arange(5) == 4) for part in task] == ["t.csv"]
    assert plan.ignored == {"empty table": 1} and [row.file for row in plan.rejected] == ["bad.parquet"]


def test_files_that_are_read_alike_share_how_they_are_read(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.py").write_text("a = 1\n")
        (tmp_path / f"{n}.jsonl").write_text('{"text": "a"}\n')
    plan = sources.plan(tmp_path)
    assert len(plan.readings) == 2 and len({id(part.reading) for part in plan.parts()}) == 2
    assert pickle.loads(pickle.dumps(plan.tasks())) == plan.tasks()


def test_a_file_that_changes_while_it_is_prepared_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    plan = sources.plan(file)
    file.write_text("afterwards")
    with pytest.raises(DataError, match="a.txt' changed while it was being prepared"):
        read_all(plan)
    file.unlink()
    with pytest.raises(DataError, match="cannot read .*a.txt'"):
        read_all(plan)


def test_tasks_group_small_files_and_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(20):
        (tmp_path / f"{n:02d}.txt").write_text("x" * 100)
    monkeypatch.setattr(sources, "PART_BYTES", 350)
    plan = sources.plan(tmp_path)
    tasks = plan.tasks()
    assert [part for task in tasks for part in task] == plan.parts()
    assert {len(task) for task in tasks} == {3, 2}


def write(tmp_path: Path, name: str, content: bytes) -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("absent.csv", None, {}, "there is no file or folder .*absent.csv"),
        ("a.csv", b"id,body\n1,x\n", {}, "a.csv' has no column 'text'; say which one .*--text-column: id, body"),
        ("a.csv", b"id,body\n1,x\n", {"text_column": "bdy"}, "no column 'bdy' .*It has: id, body.*Did you mean 'body'"),
        ("a.csv", b'"a\nb",c\n1,2\n', {}, r"--text-column: 'a\\nb', c$"),
        ("a.csv", b",".join(b"c%d" % n for n in range(5000)), {}, "c38, c39 and 4,960 more$"),
        ("a.csv", b"text\nx\n", {"id_column": "id"}, r"no column 'id' \(--id-column\)"),
        ("a.jsonl", b"not json\n", {}, "a.jsonl' does not begin with JSON objects"),
        ("a.jsonl", b'{"a": 1, "b": 2}\n', {}, "has no column 'text'.*: a, b"),
        ("a.parquet", b"PAR1 nonsense", {}, "a.parquet' is damaged or not parquet"),
        ("a.csv", b"", {}, "nothing to read in .*a.csv"),
        ("a.unknown", b"x", {}, "does not say by its name what it holds; add --format"),
        ("a.csv", "text,n\nx,1\n".encode("utf-16-le"), {}, "seems to be in utf-16-le; .*--encoding utf-16-le$"),
        ("a.csv", "id;text\n1;x\n".encode("utf-16-be"), {}, "seems to be in utf-16-be; .*--encoding utf-16-be$"),
        ("a.jsonl", '{"text": "é"}\n'.encode("utf-16-be"), {}, "--encoding utf-16-be$"),
        ("a.txt", b"x", {"kind": "csvv"}, "unknown format 'csvv'. Did you mean 'csv'"),
    ],
)
def test_bad_sources_say_what_where_and_what_to_do(
    tmp_path: Path, name: str, content: bytes | None, options: dict[str, str], message: str
) -> None:
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        sources.plan(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_damaged_table_does_not_stop_a_folder(tmp_path: Path) -> None:
    """Whatever Arrow says of the damage; in a folder it costs that table alone."""
    pq.write_table(pa.table({"text": ["a"] * 50}), tmp_path / "a.parquet")
    content, footer = (tmp_path / "a.parquet").read_bytes(), 60
    write(tmp_path, "fine.md", b"# fine\n")
    for position in range(len(content) - 8 - footer, len(content)):
        write(tmp_path, "a.parquet", content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        plan = sources.plan(tmp_path)
        assert "# fine\n" in texts(plan)
        assert [r.reason for r in plan.rejected] in ([], ["table that cannot be read"])
        assert all("\n" not in r.detail for r in plan.rejected)


def test_a_table_without_the_column_does_not_stop_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", b"x,y\n1,2\n")
    with pytest.raises(DataError, match="no table in .*; a.csv: it has no column 'text'"):
        sources.plan(tmp_path)
    write(tmp_path, "b.jsonl", b'{"text": "fine"}\n')
    plan = sources.plan(tmp_path)
    assert texts(plan) == ["fine"]
    assert [(record.file, record.reason) for record in plan.rejected] == [("a.csv", "table that cannot be read")]
    with pytest.raises(DataError, match="no column 'body'"):
        sources.plan(tmp_path, text_column="body")
    (tmp_path / "only").mkdir()
    write(tmp_path / "only", "x.bin", b"1")
    with pytest.raises(DataError, match=r"nothing to read in .*passed over: 1 \.bin"):
        sources.plan(tmp_path / "only")


def test_datasets_inside_a_source_are_not_read(tmp_path: Path) -> None:
    """So that the output may lie inside the source, and the same command again finds the same source."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("text\nrow\n")
    (tmp_path / "in" / "empty.csv").touch()
    before = sources.plan(tmp_path / "in")
    assert before.ignored == {"empty table": 1}
    dataset = make_store(tmp_path / "in" / "data", train=[["a"]], validation=[["b"]])
    merge([dataset], tmp_path / "in" / "mixed", strategy="equal")
    assert sources.plan(tmp_path / "in") == before
    with pytest.raises(DataError, match="is a dataset of Blues already; name the files"):
        sources.plan(dataset)


def test_a_folder_that_cannot_be_listed_is_an_error_not_an_omission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text\nrow\n")
    (tmp_path / "locked").mkdir()
    listing = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="cannot read folder '.*locked': Permission denied"):
        sources.plan(tmp_path)
