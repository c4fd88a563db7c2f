"""Parts of source files to documents: CSV, JSONL, Parquet, plain text and source code.

In: a `Part` (a file, or a piece of one that starts and ends between two rows) as `sources.py` plans them. Out: for each
row a `Document`, or a `Rejected` that says which row it was and why; nothing is dropped in silence and no row stops the
rest. Reading a file in parts gives exactly what reading it whole gives.

Memory: one row, or one Parquet batch, at a time. Rows longer than the part's `max_document_bytes` are rejected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from blues.data.reading.csv_rows import CsvRows, RowTooLong, csv_header
from blues.data.reading.metadata import Unusable, column_values, jsonable
from blues.data.reading.places import Entry, Place
from blues.data.reading.streams import (
    DAMAGES,
    MAX_DOCUMENT_BYTES,
    UTF8,
    UTF8_MARK,
    DamagedStream,
    Lines,
    LineTooLong,
    codec,
    cookie,
    damage,
    decode,
    longer_than,
    marked,
    open_bytes,
    open_random,
    open_stream,
)
from blues.errors import DataError

WHOLE = 1 << 62
"""The end of a part that goes on to the end of its file, however long that is once it is decompressed and decoded."""
TEXT_DOCUMENT_BYTES = 256 << 10  # a longer text file is cut into documents of about this size
PARQUET_BATCH_ROWS = 256
PARQUET_BATCH_BYTES = 16 << 20
LFS_MARK = b"version https://git-lfs.github.com/spec/"
LFS_REASON = "git LFS pointer"
LFS_DETAIL = "the content is not here; get it with `git lfs pull`"


@dataclass(frozen=True)
class Document:
    """A text to learn from. `id` is unique within a source where the source says so; `source` is its file.

    `metadata` can be said in JSON."""

    text: str
    id: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """`rows` rows (from 1, counted without a CSV header) that could not be used; `row` is None for a whole file."""

    file: str
    row: int | None
    reason: str
    detail: str = ""
    rows: int = 1


@dataclass(frozen=True)
class Reading:
    """How a file is read; all files that are read alike share one. `encoding`: what a file without a byte order mark is
    in; `delimiter`: of CSV; `max_document_bytes`: of a row, or of a file of source code."""

    kind: str  # "csv", "jsonl", "parquet", "text" or "source"
    text_column: str | None = None
    id_column: str | None = None
    metadata_columns: tuple[str, ...] = ()
    encoding: str = UTF8
    language: str | None = None
    delimiter: str = ""
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    @cached_property
    def described(self) -> str:
        """As JSON without what is empty: what a dataset remembers of a file, so that an update can compare it."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return json.dumps({name: value for name, value in values if value})


@dataclass(frozen=True)
class Part:
    """A piece of a file, and how it is read. `start`, `stop`: bytes, or row groups of a Parquet file; `row`: the first
    row's number."""

    entry: Entry
    reading: Reading
    start: int = 0
    stop: int = WHOLE
    row: int = 1
    bytes: int = 0  # what it weighs when parts are put into tasks, and in the progress line

    @property
    def file(self) -> str:
        return self.entry.file


Record = Document | Rejected


def read_part(place: Place, part: Part) -> Iterator[Record]:
    """The records of a part of a file at `place`, in order.

    Raises:
        DataError: the file vanished, cannot be read, or changed since it was planned, which the last record of a part
            does not tell but what comes behind it: use none before the iterator ends.
    """
    try:
        try:
            yield from READERS[part.reading.kind](place, part)
        except DAMAGES as error:
            words = damage(error)
            place.check(part.entry)  # one that changed need not be what the plan says
            raise DataError(f"{place.where(part.file)} is damaged: {words}") from None
        except (DataError, LookupError, ValueError):
            place.check(part.entry)
            raise
        place.check(part.entry)
    except OSError as error:
        raise DataError(f"cannot read {place.where(part.file)}: {error.strerror or error}") from None


def _read_csv(place: Place, part: Part) -> Iterator[Record]:
    limit = part.reading.max_document_bytes
    stream, encoding = open_stream(place, part.entry, part.reading.encoding)
    with stream:
        header = csv_header(iter(CsvRows(stream, part.reading.delimiter, limit=limit)))
    if header is None:
        raise DataError(f"{place.where(part.file)} has no header row")
    text_at = header.index(part.reading.text_column or "")
    id_at = None if part.reading.id_column is None else header.index(part.reading.id_column)
    metadata_at = [header.index(column) for column in part.reading.metadata_columns]
    stream, _ = open_stream(place, part.entry, part.reading.encoding)
    with stream:
        rows = CsvRows(stream, part.reading.delimiter, part.start if part.row > 1 else 0, limit)
        row = part.row - 1
        cells: Iterator[list[str] | Exception] = iter(rows)
        if part.row == 1:
            next(cells)
        while rows.position < part.stop:
            row += 1
            try:
                value = next(cells)
            except StopIteration:
                return
            except DamagedStream as error:
                yield _damaged_compression(part, row, error)
                return
            if isinstance(value, Exception):
                reason = "row too long" if isinstance(value, RowTooLong) else "malformed CSV"
                yield Rejected(part.file, row, reason, str(value))
            elif len(value) != len(header):
                yield Rejected(part.file, row, "wrong number of fields", f"{len(value)}, the header has {len(header)}")
            else:
                metadata = [value[at] for at in metadata_at]
                yield _table_row(part, row, value[text_at], None if id_at is None else value[id_at], metadata, encoding)


def _read_jsonl(place: Place, part: Part) -> Iterator[Record]:
    stream, encoding = open_stream(place, part.entry, part.reading.encoding)
    with stream:
        lines = Lines(stream, part.start, part.reading.max_document_bytes)
        row = part.row - 1
        while lines.position < part.stop:
            row += 1
            try:
                line = next(lines)
            except StopIteration:
                return
            except LineTooLong as error:
                yield Rejected(part.file, row, "row too long", str(error))
                continue
            except DamagedStream as error:
                yield _damaged_compression(part, row, error)
                return
            if not line.isspace():
                yield _json_row(part, row, line.removeprefix(UTF8_MARK) if row == 1 else line, encoding)


def _damaged_compression(part: Part, row: int | None, error: DamagedStream) -> Rejected:
    lost = "the file is lost" if row is None else "this row and all after it are lost"
    return Rejected(part.file, row, "damaged compression", f"{error}; {lost}")


def _json_row(part: Part, row: int, line: bytes, encoding: str) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejected(part.file, row, *_undecodable(encoding, error.start, "of the line"))
    except (ValueError, RecursionError) as error:
        return Rejected(part.file, row, "invalid JSON", str(error))
    if not isinstance(value, dict):
        return Rejected(part.file, row, "not a JSON object", _called(value))
    for column in (part.reading.text_column, part.reading.id_column):
        if column is not None and column not in value:
            return Rejected(part.file, row, f"no column {column!r}", f"it has {', '.join(map(repr, value))}"[:200])
    metadata = [value.get(column) for column in part.reading.metadata_columns]
    return _table_row(part, row, value[part.reading.text_column], value.get(part.reading.id_column), metadata, encoding)


def _read_parquet(place: Place, part: Part) -> Iterator[Record]:
    names = [part.reading.text_column, part.reading.id_column, *part.reading.metadata_columns]
    columns = list(dict.fromkeys(name for name in names if name is not None))
    with open_random(place, part.entry) as stream, pq.ParquetFile(stream) as file:
        row = part.row - 1
        for group in range(part.start, min(part.stop, file.num_row_groups)):
            of_group = file.metadata.row_group(group)
            end = row + of_group.num_rows
            fitting = PARQUET_BATCH_BYTES * of_group.num_rows // max(1, of_group.total_byte_size)
            rows = max(1, min(PARQUET_BATCH_ROWS, fitting))  # long texts come in small batches
            try:
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                    for text, id, *metadata in _parquet_rows(batch, part):
                        row += 1
                        yield _table_row(part, row, text, id, metadata, UTF8)
            except DAMAGES as error:
                detail = f"row group {group}: {damage(error)}"
                yield Rejected(part.file, row + 1, "damaged Parquet rows", detail, rows=end - row)
            row = end


def _parquet_rows(batch: pa.RecordBatch, part: Part) -> Iterator[tuple[Any, ...]]:
    """Text, id and the metadata columns of each row."""
    texts = _text_values(batch.column(part.reading.text_column))
    ids = column_values(batch.column(part.reading.id_column)) if part.reading.id_column else [None] * len(texts)
    metadata = [column_values(batch.column(column)) for column in part.reading.metadata_columns]
    return zip(texts, ids, *metadata, strict=True)


def _text_values(column: pa.Array) -> list[bytes | None]:
    """A column of strings as bytes: a value that is not UTF-8 must spoil its own row only."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _read_source(place: Place, part: Part) -> Iterator[Record]:
    """One document: the file. Python source may name its encoding in its first lines (PEP 263)."""
    limit, encoding = part.reading.max_document_bytes, part.reading.encoding
    size = part.entry.size
    try:
        content = b""
        if size <= limit:
            with open_bytes(place, part.entry) as stream:
                content = stream.read(size + 1)
                if len(content) > size:  # decompressed
                    content += stream.read(limit + 1 - len(content))
            size = max(size, len(content))
        named = cookie(content) if part.reading.language == "python" else None
        encoding = marked(content) or (encoding if named is None else codec(named))
        if encoding != UTF8:
            content = decode(content, encoding)
    except DamagedStream as error:
        yield _damaged_compression(part, None, error)
    except DataError:
        yield Rejected(part.file, None, "unknown encoding", f"its first lines name {named!r}")
    else:
        if size > limit:
            yield Rejected(part.file, None, "file too large", f"{size:,} bytes of source are {longer_than(limit)}")
        else:
            yield _whole_file(part, content, encoding)


def _read_text(place: Place, part: Part) -> Iterator[Record]:
    """The file as one document, or a long one in pieces, numbered like rows."""
    stream, encoding = open_stream(place, part.entry, part.reading.encoding)
    row: int | None = None
    with stream:
        try:
            held = b""
            if part.row == 1:
                held = stream.read(TEXT_DOCUMENT_BYTES + 1)
                if len(held) <= TEXT_DOCUMENT_BYTES:
                    yield _whole_file(part, held, encoding)
                    return
            else:
                stream.seek(part.start)
            row = part.row
            for content in text_pieces(stream, part.start, part.stop, held):
                content = content.removeprefix(UTF8_MARK) if row == 1 else content
                yield clean_text(part, row, content, f"{part.file}:{row}", _about(part), encoding)
                row += 1
        except DamagedStream as error:
            yield _damaged_compression(part, row, error)


def _whole_file(part: Part, content: bytes, encoding: str) -> Record:
    if is_lfs_pointer(content):
        return Rejected(part.file, None, LFS_REASON, LFS_DETAIL)
    return clean_text(part, None, content.removeprefix(UTF8_MARK), part.file, _about(part), encoding)


def _about(part: Part) -> dict[str, Any]:
    return {} if part.reading.language is None else {"language": part.reading.language}


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file is what git LFS leaves in the place of a large file."""
    return len(content) < 1024 and content.startswith(LFS_MARK)


def text_pieces(stream: BinaryIO, start: int, stop: int, held: bytes = b"") -> Iterator[bytes]:
    """Cut a text at the last empty line (else line end, else blank, else character) within TEXT_DOCUMENT_BYTES.

    Each cut depends only on where the piece before ended, so that parts that start at cuts give the same pieces.
    `held`: what was read already from `start` on.
    """
    while start < stop:
        held += stream.read(TEXT_DOCUMENT_BYTES + 1 - len(held))
        if not held:
            return
        length = len(held) if len(held) <= TEXT_DOCUMENT_BYTES else _cut(held)
        yield held[:length]
        start, held = start + length, held[length:]


def _cut(content: bytes) -> int:
    for separator in (b"\n\n", b"\n", b" "):
        at = content.rfind(separator, TEXT_DOCUMENT_BYTES // 2, TEXT_DOCUMENT_BYTES)
        if at >= 0:
            return at + len(separator)
    at = TEXT_DOCUMENT_BYTES
    while at > TEXT_DOCUMENT_BYTES - 4 and content[at] & 0xC0 == 0x80:  # not within a UTF-8 character
        at -= 1
    return at


def _table_row(part: Part, row: int, text: Any, id: Any, values: Sequence[Any], encoding: str) -> Record:
    """A row of a table as a document; text may come as str, or as bytes that are to be UTF-8."""
    if text is None:
        return Rejected(part.file, row, "no text", f"column {part.reading.text_column!r} is null")
    if not isinstance(text, (str, bytes)):
        return Rejected(part.file, row, "not text", f"column {part.reading.text_column!r} holds {_called(text)}")
    if part.reading.id_column is None:
        id = f"{part.file}:{row}"
    elif id is None or id == "" or isinstance(id, (dict, list, Unusable)):
        return Rejected(part.file, row, "no id", f"column {part.reading.id_column!r} holds {id!r}"[:200])
    metadata = {}
    for column, value in zip(part.reading.metadata_columns, values, strict=True):
        try:
            if isinstance(value, Unusable):
                raise value
            metadata[column] = jsonable(value)
        except Unusable as error:
            return Rejected(part.file, row, "unusable metadata", f"column {column!r}: {error}")
    return clean_text(part, row, text, str(id), metadata, encoding)


def _called(value: Any) -> str:
    """What a value of JSON is, with its article."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def clean_text(
    part: Part, row: int | None, text: str | bytes, id: str, metadata: dict[str, Any], encoding: str
) -> Record:
    """The document, unless its text is empty, could not be decoded, holds a NUL (binary or damaged), or is too long."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        if not id.isascii():
            id.encode("utf-8")
    except UnicodeError as error:
        position = getattr(error, "start", 0)
        if part.reading.kind == "jsonl":  # its line was valid, so an escape wrote it
            return Rejected(part.file, row, "lone surrogate", f"at position {position}: half of a pair of \\u escapes")
        return Rejected(part.file, row, *_undecodable(encoding, position, ""))
    if size > part.reading.max_document_bytes:
        return Rejected(part.file, row, "row too long", longer_than(part.reading.max_document_bytes))
    if "\0" in text:
        return Rejected(part.file, row, "NUL byte", f"at position {text.index(chr(0))}: binary or damaged")
    if not text or text.isspace():
        return Rejected(part.file, row, "empty")
    return Document(text, id, part.file, metadata)


def _undecodable(encoding: str, position: int, of: str) -> tuple[str, str]:
    """Reason and detail of bytes that are not in the encoding they should be in."""
    name = "UTF-8" if encoding == UTF8 else encoding
    where = f"at position {position} {of}".rstrip()
    return f"invalid {name}", f"{where}; say what encoding it is in with --encoding"


READERS: dict[str, Callable[[Place, Part], Iterator[Record]]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text,
    "source": _read_source,
}
