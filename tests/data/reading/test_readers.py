"""Every row becomes a document or a rejected row, with its metadata, in any encoding, however hostile the file is."""

from __future__ import annotations

import datetime
import gzip
import json
import random
import resource
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blues.data.reading import readers, sources
from blues.data.reading.readers import Document, Record, Rejected, read_part
from blues.errors import DataError

LAX = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "shift_jis")


def read_all(plan: sources.Plan) -> list[Record]:
    return [record for task in plan.tasks() for part in task for record in read_part(plan.root, part)]


def documents(plan: sources.Plan) -> list[Document]:
    return [record for record in read_all(plan) if isinstance(record, Document)]


def reasons(plan: sources.Plan) -> list[tuple[int | None, str]]:
    return [(record.row, record.reason) for record in read_all(plan) if isinstance(record, Rejected)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# The law: nothing is lost, nothing comes twice.

good = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20).filter(str.strip)
CSV_ROWS = {
    "document": ["plain,1", '"quoted, with ""quotes""",2', '"two\nlines",3', "ünï,4"],
    "rejected": ["no fields", ",5", '"stray"x,6', '"never closed,7', "a\0b,8", '"  ",9'],
}
JSON_ROWS = {
    "document": ['{"text": "plain"}', '{"text": "ünï\\n", "more": [1]}', '  {"text": "x"}  '],
    "rejected": ["{", "[1]", '{"t": 1}', '{"text": 5}', '{"text": null}', '{"text": ""}', '{"text": "\\u0000"}', "NaN"]
    + ['{"text": "\\ud800"}', '{"text": ' + "[" * 3000, "9" * 5000],
}


def drawn(rows: dict[str, list[str]]) -> st.SearchStrategy[list[tuple[str, str]]]:
    pairs = [(kind, row) for kind, found in rows.items() for row in found]
    return st.lists(st.sampled_from(pairs), max_size=25)


def assert_adds_up(plan: sources.Plan, kinds: Sequence[str]) -> None:
    records = read_all(plan)
    assert ["document" if isinstance(record, Document) else "rejected" for record in records] == list(kinds)
    assert [record.rows for record in records if isinstance(record, Rejected)] == [1] * kinds.count("rejected")
    numbers = [int(r.id.rpartition(":")[2]) if isinstance(r, Document) else r.row for r in records]
    assert numbers == list(range(1, len(kinds) + 1)), "every row once, in order"


@LAX
@given(rows=drawn(CSV_ROWS), encoding=st.sampled_from(ENCODINGS), part_bytes=st.integers(1, 200))
def test_rows_of_csv_add_up(tmp_path, monkeypatch, rows, encoding, part_bytes):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    content = "".join(f"{row}\n" for row in ["text,n", *(row for _, row in rows)])
    if encoding == "shift_jis":
        content = content.replace("ünï", "日本")
    plan = sources.plan(write(tmp_path / "t.csv", content.encode(encoding)), encoding=encoding, metadata_columns=["n"])
    assert_adds_up(plan, [kind for kind, _ in rows])


@LAX
@given(
    rows=drawn(JSON_ROWS),
    encoding=st.sampled_from(ENCODINGS[:-2]),
    part_bytes=st.integers(1, 200),
    packed=st.booleans(),
)
def test_rows_of_json_lines_add_up(tmp_path, monkeypatch, rows, encoding, part_bytes, packed):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    rows = [("document", '{"text": "first", "more": 1}'), *rows]
    content = "\n".join(row for _, row in rows).encode(encoding)
    path = write(tmp_path / f"t.jsonl{'.gz' if packed else ''}", gzip.compress(content) if packed else content)
    assert_adds_up(sources.plan(path, encoding=encoding, metadata_columns=["more"]), [kind for kind, _ in rows])


@LAX
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([b"good", None, b"", b"\xff", b"a\0", b" \n"]), st.integers(0, 9)), max_size=30
    ),
    group=st.integers(1, 7),
    part_bytes=st.integers(1, 200),
)
def test_rows_of_parquet_add_up(tmp_path, monkeypatch, rows, group, part_bytes):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    monkeypatch.setattr(readers, "PARQUET_BATCH_ROWS", 3)
    texts = pa.array([text for text, _ in rows], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts, "n": [n for _, n in rows]}), tmp_path / "t.parquet", row_group_size=group)
    plan = sources.plan(tmp_path / "t.parquet", metadata_columns=["n"])
    assert_adds_up(plan, ["document" if text == b"good" else "rejected" for text, _ in rows])
    assert [d.metadata["n"] for d in documents(plan)] == [n for text, n in rows if text == b"good"]


@LAX
@given(
    lines=st.lists(st.sampled_from([b"words of text\n", b"\n", b"\xff\n", b"\0\n", b"x" * 90 + b"\n"]), max_size=60),
    part_bytes=st.integers(1, 300),
)
def test_pieces_of_text_add_up(tmp_path, monkeypatch, lines, part_bytes):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    monkeypatch.setattr(readers, "TEXT_DOCUMENT_BYTES", 64)
    content = b"".join(lines)
    records = read_all(sources.plan(write(tmp_path / "t.txt", content)))
    if len(content) <= 64:
        assert len(records) == 1
        return
    rows = [int(r.id.rpartition(":")[2]) if isinstance(r, Document) else r.row for r in records]
    assert rows == list(range(1, len(records) + 1))
    pieces = list(readers.text_pieces((tmp_path / "t.txt").open("rb"), 0, len(content)))
    assert b"".join(pieces) == content and len(pieces) == len(records)
    for piece, record in zip(pieces, records, strict=True):
        usable = piece.strip() != b"" and b"\xff" not in piece and b"\0" not in piece
        assert (record.text.encode() == piece) if isinstance(record, Document) else not usable


# Metadata.


def test_metadata_columns_of_every_table(tmp_path):
    rows = [{"text": "a", "n": 1, "tags": ["x", {"y": 2}], "when": "2026"}, {"text": "b", "tags": None}]
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    plan = sources.plan(path, metadata_columns=["n", "tags", "when", "n"])
    assert [d.metadata for d in documents(plan)] == [
        {"n": 1, "tags": ["x", {"y": 2}], "when": "2026"},
        {"n": None, "tags": None, "when": None},
    ]
    plan = sources.plan(write(tmp_path / "t.csv", "n,text,when\n1,a,\n,b,x\n"), metadata_columns=["when", "n", "text"])
    assert [d.metadata for d in documents(plan)] == [
        {"when": "", "n": "1", "text": "a"},
        {"when": "x", "n": "", "text": "b"},
    ]
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    columns = {"text": ["a", "b"], "when": [when, None], "price": [Decimal("1.10"), None], "raw": [b"\xff", b"x"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    plan = sources.plan(tmp_path / "t.parquet", metadata_columns=["when", "price", "raw"])
    assert [d.metadata for d in documents(plan)] == [
        {"when": "2026-01-02T03:04:05+00:00", "price": "1.10", "raw": "/w=="},
        {"when": None, "price": None, "raw": "x"},
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_metadata_column_that_is_not_there_is_named(tmp_path, name):
    content = {"t.csv": b"text,author\na,b\n", "t.jsonl": b'{"text": "a", "author": "b"}\n'}
    if name == "t.parquet":
        pq.write_table(pa.table({"text": ["a"], "author": ["b"]}), tmp_path / name)
    else:
        write(tmp_path / name, content[name])
    with pytest.raises(
        DataError, match=r"no column 'autor' \(--metadata-columns\). It has: text, author.*Did you mean"
    ):
        sources.plan(tmp_path / name, metadata_columns=["autor"])


def test_a_key_that_comes_late_in_json_lines_is_found(tmp_path):
    rows = ['{"text": "a"}'] * 3000 + ['{"text": "b", "late": 1}']
    plan = sources.plan(write(tmp_path / "t.jsonl", "\n".join(rows)), metadata_columns=["late"])
    assert [d.metadata["late"] for d in documents(plan)] == [None] * 3000 + [1]


def test_metadata_that_cannot_be_said_costs_its_row(tmp_path):
    rows = [
        '{"text": "a", "m": "fine"}',
        '{"text": "b", "m": "\\ud800"}',
        '{"text": "c", "m": ' + "[" * 90 + "]" * 90 + "}",
    ]
    plan = sources.plan(
        write(tmp_path / "t.jsonl", "\n".join([*rows, '{"text": "d", "m": NaN}'])), metadata_columns=["m"]
    )
    assert [(d.text, d.metadata["m"]) for d in documents(plan)] == [("a", "fine"), ("d", None)]
    assert reasons(plan) == [(2, "unusable metadata"), (3, "unusable metadata")]
    plan = sources.plan(write(tmp_path / "t.csv", b"text,m\na,caf\xe9\nb,fine\n"), metadata_columns=["m"])
    assert reasons(plan) == [(1, "unusable metadata")] and len(documents(plan)) == 1


def test_ids_of_any_type(tmp_path):
    columns = {"text": ["a", "b", "c"], "id": pa.array([b"x", b"\xff", None]).view(pa.string())}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    plan = sources.plan(tmp_path / "t.parquet", id_column="id")
    assert [d.id for d in documents(plan)] == ["x"] and reasons(plan) == [(2, "no id"), (3, "no id")]
    pq.write_table(pa.table({"text": ["a"], "id": [datetime.date(2026, 1, 2)]}), tmp_path / "t.parquet")
    assert documents(sources.plan(tmp_path / "t.parquet", id_column="id"))[0].id == "2026-01-02"


def test_columns_that_hold_no_text_or_come_twice_are_refused(tmp_path):
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'text' holds int64, not text"):
        sources.plan(tmp_path / "t.parquet")
    assert len(documents(sources.plan(tmp_path / "t.parquet", text_column="body"))) == 2
    with pytest.raises(DataError, match="has more than one column 'text'; rename all but one"):
        sources.plan(write(tmp_path / "t.csv", "text,text\na,b\n"))


# Encodings.


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt", "t.py", "t.csv.gz"])
def test_any_encoding_gives_the_same_documents(tmp_path, monkeypatch, encoding, name):
    monkeypatch.setattr(readers, "TEXT_DOCUMENT_BYTES", 1000)
    word = "日本語" if encoding in ("shift_jis", "utf-8", "utf-16") else "für alle"
    content = {
        "t.csv": "id,text\n" + "".join(f'{n},"{word},\n{n}"\n' for n in range(300)),
        "t.jsonl": "".join(json.dumps({"text": f"{word} {n}"}, ensure_ascii=False) + "\n" for n in range(300)),
    }.get(name.removesuffix(".gz"), "".join(f"# {word} {n}\n\n" for n in range(300)))
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / "plain").mkdir()
    wanted = read_all(sources.plan(write(tmp_path / "plain" / name, pack(content.encode()))))
    assert len(wanted) > 2 or name == "t.py"
    plan = sources.plan(write(tmp_path / name, pack(content.encode(encoding))), encoding=encoding)
    if name == "t.txt" and encoding == "utf-8-sig":  # the mark counts where the text is cut
        assert "".join(d.text for d in documents(plan)) == content
        return
    assert read_all(plan) == wanted
    if encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert read_all(sources.plan(tmp_path / name)) == wanted, "the byte order mark says it"


def test_bytes_outside_the_encoding_cost_their_own_row(tmp_path):
    rows = b"id,text\n1,gut\n2,a\x81b\n3,f\xfcr\n"
    plan = sources.plan(write(tmp_path / "t.csv", rows), encoding="cp1252")
    assert [d.text for d in documents(plan)] == ["gut", "für"] and reasons(plan) == [(2, "invalid cp1252")]
    plan = sources.plan(write(tmp_path / "t.csv", rows))
    assert [d.text for d in documents(plan)] == ["gut"]
    assert reasons(plan) == [(2, "invalid UTF-8"), (3, "invalid UTF-8")]
    wide = b'{"text": "a"}\n{"text": "b"}\n'.decode().encode("utf-16-le")
    broken = wide[:20] + b"\x00\xd8" + wide[22:]
    plan = sources.plan(write(tmp_path / "t.jsonl", broken), encoding="utf-16")
    assert [d.text for d in documents(plan)] == ["b"] and reasons(plan) == [(1, "invalid utf-16-le")]


@pytest.mark.parametrize("name", ["t.txt", "t.py", "t.csv"])
def test_a_file_in_another_encoding_is_rejected_with_a_hint(tmp_path, name):
    plan = sources.plan(write(tmp_path / name, "text\nfür\n".encode("cp1252")))
    [rejected] = [record for record in read_all(plan) if isinstance(record, Rejected)]
    assert rejected.reason == "invalid UTF-8" and "say what encoding it is in with --encoding" in rejected.detail


def test_a_table_that_is_wide_without_a_mark_says_so(tmp_path):
    with pytest.raises(DataError, match="seems to be in utf-16-le; say so with --encoding utf-16-le"):
        sources.plan(write(tmp_path / "t.jsonl", '{"text": "a"}\n'.encode("utf-16-le")))
    with pytest.raises(DataError, match="unknown encoding 'latin-x'"):
        sources.plan(tmp_path / "t.jsonl", encoding="latin-x")


def test_python_source_names_its_encoding(tmp_path):
    write(tmp_path / "a.py", "# -*- coding: latin-1 -*-\nx = 'für'\n".encode("latin-1"))
    write(tmp_path / "b.py", "# coding: utf-8\nx = 'für'\n")
    write(tmp_path / "c.py", "# coding: no-such-one\nx = 1\n")
    write(tmp_path / "d.py", "# coding: punycode\n" + "x-" * 100_000)
    write(tmp_path / "e.py", "\ufeff# coding: latin-1\nx = 'für'\n")
    write(tmp_path / "f.go", "# coding: latin-1\nx = 'für'\n")
    for encoding in ("utf-8", "cp1252"):
        plan = sources.plan(tmp_path, encoding=encoding)
        found = {d.id: d.text for d in documents(plan)}
        assert {id: text.splitlines()[1] for id, text in found.items() if id != "f.go"} == dict.fromkeys(
            ["a.py", "b.py", "e.py"], "x = 'für'"
        )
        assert reasons(plan) == [(None, "unknown encoding")] * 2
        assert found["f.go"].endswith("'für'\n") == (encoding == "utf-8")


def test_details_are_said_in_plain_words(tmp_path):
    rows = ["5", "null", "[]", '{"text": 5}', '{"text": {}}', '{"text": "a\\ud800"}']
    records = read_all(sources.plan(write(tmp_path / "t.jsonl", "\n".join(['{"text": "a"}', *rows]))))
    assert [(r.reason, r.detail) for r in records if isinstance(r, Rejected)] == [
        ("not a JSON object", "an int"),
        ("not a JSON object", "null"),
        ("not a JSON object", "a list"),
        ("not text", "column 'text' holds an int"),
        ("not text", "column 'text' holds a dict"),
        ("lone surrogate", "at position 1: half of a pair of \\u escapes"),
    ]


# Monsters.


@pytest.mark.parametrize(
    ("name", "head", "tail", "expected"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n', [(2, "row too long")]),
        ("t.csv", b"text\na\n", b"\nb\n", [(2, "row too long")]),
        ("t.csv", b'text\na\n"', b'"\nb\n', [(2, "row too long")]),
        ("t.txt", b"a\n", b"\nb\n", []),
        ("t.py", b"a\n", b"\nb\n", [(None, "file too large")]),
        ("t.jsonl.gz", b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n', [(2, "row too long")]),
        ("t.txt.gz", b"a\n", b"\nb\n", []),
    ],
)
def test_a_line_of_100_megabytes_is_read_in_bounded_memory(tmp_path, name, head, tail, expected):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb", **({"compresslevel": 1} if name.endswith(".gz") else {})) as file:
        file.write(head)
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(tail)
    plan = sources.plan(tmp_path / name, max_document_bytes=16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rejected, size = [], 0
    for task in plan.tasks():
        for part in task:
            for record in read_part(plan.root, part):
                if isinstance(record, Document):
                    size += len(record.text)
                else:
                    rejected.append((record.row, record.reason))
    assert rejected == expected
    assert size == (len(head) + len(tail) + (100 << 20) if name.startswith("t.txt") else 0 if name == "t.py" else 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10, "KiB"


def test_long_texts_of_parquet_come_in_small_batches(tmp_path, monkeypatch):
    texts = ["x" * (3 << 20)] * 40
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet", use_dictionary=False, compression="none")
    sizes = []
    rows_of = readers._parquet_rows
    monkeypatch.setattr(
        readers, "_parquet_rows", lambda batch, part: sizes.append(batch.num_rows) or rows_of(batch, part)
    )
    assert len(documents(sources.plan(tmp_path / "t.parquet"))) == 40
    assert sum(sizes) == 40 and max(sizes) <= 5


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt", "t.py", "t.parquet"])
@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"\n" * 1000, b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b" * 9])
def test_files_of_nothing_and_of_nonsense(tmp_path, name, content):
    """They give no document, and a reason: in planning or in reading."""
    write(tmp_path / name, content)
    write(tmp_path / "fine.md", "# fine\n")
    plan = sources.plan(tmp_path)
    assert [d.id for d in documents(plan)] == ["fine.md"]
    refused = len(plan.rejected) + len(reasons(plan)) + plan.ignored.get("empty table", 0)
    assert refused == 1


def test_damaged_rows_of_parquet_are_counted(tmp_path):
    rows = [f"row {number} " * 50 for number in range(300)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "t.parquet", row_group_size=100, use_dictionary=False)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    middle = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0).data_page_offset
    content[middle : middle + 200] = b"\xee" * 200
    plan = sources.plan(write(tmp_path / "t.parquet", bytes(content)))
    records = read_all(plan)
    lost = [record for record in records if isinstance(record, Rejected)]
    assert sum(record.rows for record in lost) == 100 and {record.reason for record in lost} == {"damaged Parquet rows"}
    assert [d.text for d in documents(plan)] == rows[:100] + rows[200:]


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Some bytes changed, added or gone, or the end cut off."""
    found = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5, 30])):
        at = generator.randrange(len(found) + 1)
        change = generator.randrange(4)
        if change == 0:
            found[at : at + 1] = generator.randbytes(1)
        elif change == 1:
            del found[at : at + generator.randrange(50)]
        elif change == 2:
            found[at:at] = generator.randbytes(generator.randrange(9))
        else:
            del found[max(at, len(found) // 4) :]
    return bytes(found)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.jsonl.gz", "t.csv.zst", "t.txt", "t.py"])
def test_whatever_is_damaged_is_told_in_a_sentence_or_costs_rows(tmp_path, monkeypatch, name):
    rows = [{"text": f"row {n} é", "id": f"r{n}", "m": None if n % 3 else n, "tags": ["a", str(n)]} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=20)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = ("text,id,m\n" + "".join(f'"row ""{n}""\n",r{n},\n' for n in range(60))).encode()
    whole = {
        **{"t.parquet": (tmp_path / "t.parquet").read_bytes(), "t.csv": table, "t.jsonl": lines, "t.txt": lines},
        **{"t.jsonl.gz": gzip.compress(lines), "t.csv.zst": zstandard.compress(table)},
        "t.py": b"# coding: latin-1\nx = 1\n" * 20,
    }[name]
    generator, used = random.Random(name), 0
    for _ in range(150):
        path = write(tmp_path / name, damaged(whole, generator))
        monkeypatch.setattr(sources, "PART_BYTES", generator.choice([50, 500, 4 << 20]))
        encoding = generator.choice(["utf-8", "cp1252", "gb18030"])
        try:
            plan = sources.plan(path, metadata_columns=["m"], encoding=encoding)
            records = read_all(plan)
        except DataError as error:
            assert "\n" not in str(error)
            continue
        used += 1
        for record in records:
            told = (
                [record.id, record.text, record.metadata]
                if isinstance(record, Document)
                else [record.file, record.detail]
            )
            json.dumps(told, allow_nan=False, ensure_ascii=False).encode()
    assert used > 5
