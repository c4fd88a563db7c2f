"""Parts of source files to documents: CSV, JSONL, Parquet, plain text and source code.

In: a `Part` (a file, or a piece of one that starts and ends between two rows) as `sources.py` plans them. Out: for each
row a `Document`, or a `Rejected` that says which row it was and why; nothing is dropped in silence and no row stops the
rest. Reading a file in parts gives exactly what reading it whole gives.

Memory: one row, or one Parquet batch, at a time. Rows longer than MAX_DOCUMENT_BYTES are rejected.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from blues.errors import DataError

MAX_DOCUMENT_BYTES = 16 << 20
TEXT_DOCUMENT_BYTES = 256 << 10  # a longer text file is cut into documents of about this size
PARQUET_BATCH_ROWS = 256
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """A text to learn from. `id` is unique within a source where the source says so; `source` is its file."""

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
class Part:
    """A piece of a file. `start`, `stop`: bytes, or row groups of a Parquet file; `row`: the first row's number.

    `size` and `modified` (nanoseconds) are the file's at planning time: a file that changed since then is refused.
    """

    file: str
    kind: str  # "csv", "jsonl", "parquet", "text" or "source"
    size: int
    modified: int
    start: int
    stop: int
    row: int = 1
    bytes: int = 0  # what it weighs when parts are put into tasks, and in the progress line
    text_column: str | None = None
    id_column: str | None = None
    language: str | None = None


Record = Document | Rejected


class DamagedStream(Exception):
    """A .gz or .zst file is truncated or damaged from here on. (Failing to read the file at all is an OSError.)"""


def read_part(root: Path, part: Part) -> Iterator[Record]:
    """The records of a part, in order; `root` is the folder that the part's file is relative to.

    Raises:
        DataError: the file vanished, cannot be read, or changed since it was planned.
    """
    path = root / part.file
    try:
        status = os.stat(path)
        if (status.st_size, status.st_mtime_ns) != (part.size, part.modified):
            raise DataError(f"{str(path)!r} changed while it was being prepared; run the command again")
        yield from READERS[part.kind](path, part)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def open_stream(path: Path) -> BinaryIO:
    """A buffered binary stream over a file, decompressed if its name ends in .gz or .zst."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open(path, "rb", buffering=1 << 20)
    # A small buffer: a read that reaches the damaged place gives nothing of what lies before it.
    return cast(BinaryIO, io.BufferedReader(_Decompressed(path, compression), buffer_size=1 << 16))


class _Decompressed(io.RawIOBase):
    """The content of a compressed file; damage raises `DamagedStream`."""

    def __init__(self, path: Path, compression: str) -> None:
        self._stream = pa.input_stream(str(path), compression=compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DamagedStream(" ".join(str(error).split())) from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


class LineTooLong(Exception):
    """A line longer than a document may be; the stream stands behind it."""


class Lines:
    """The lines of a binary stream, with `position` (bytes behind the last line) and `count`.

    A line over MAX_DOCUMENT_BYTES is skipped without being held in memory and raises `LineTooLong`.
    """

    def __init__(self, stream: BinaryIO, start: int = 0) -> None:
        if start:
            stream.seek(start)
        self.stream, self.position, self.count = stream, start, 0

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> bytes:
        line = self.stream.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            raise StopIteration
        self.position += len(line)
        self.count += 1
        if len(line) <= MAX_DOCUMENT_BYTES:
            return line
        while line and not line.endswith(b"\n"):
            line = self.stream.readline(MAX_DOCUMENT_BYTES)
            self.position += len(line)
        raise LineTooLong(f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB")


class CsvRows:
    """Rows of a CSV stream: lists of cells, or the `csv.Error` that stands for a bad one.

    `position` is the byte behind the last row, so that a new `CsvRows` started there goes on with the next one. Bytes
    that are not UTF-8 come through as surrogates, for `clean_text` to find. A bad row, such as one with a quote that is
    never closed, costs the line it began on: reading goes on at the next line.
    """

    def __init__(self, stream: BinaryIO, delimiter: str, start: int = 0) -> None:
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        self.position, self._delimiter = start, delimiter
        self._lines = _numbered(Lines(stream, start))
        self._again: deque[tuple[bytes, int]] = deque()  # lines of a bad row but its first, to be read again
        self._row: list[tuple[bytes, int]] = []  # lines of the row that is being read

    def __iter__(self) -> Iterator[list[str] | Exception]:
        reader = self._reader()
        while True:
            self._row = []
            value: list[str] | Exception
            try:
                value = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                value = error
                first, *rest = self._row
                self._again.extendleft(reversed(rest))
                self._row = [first]
                reader = self._reader()
            self.position = self._row[-1][1]
            if value:
                yield value

    def _reader(self) -> Iterator[list[str]]:
        # Strict: a stray quote is an error of its row, not a different reading of the rest of the file.
        return csv.reader(self._feed(), delimiter=self._delimiter, strict=True)

    def _feed(self) -> Iterator[str]:
        while True:
            line = self._again.popleft() if self._again else next(self._lines, None)
            if line is None:
                return
            self._row.append(line)
            yield line[0].decode("utf-8", "surrogateescape")


def _numbered(lines: Lines) -> Iterator[tuple[bytes, int]]:
    """Each line and the byte behind it; an over-long one is replaced by one that no CSV row can hold."""
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except LineTooLong:
            line = b'"too long"x\n'  # an error in strict CSV, inside and outside of a quoted cell
        yield line.removeprefix(UTF8_MARK) if lines.position == len(line) else line, lines.position


def csv_delimiter(file: str) -> str:
    """Tab for .tsv files, comma otherwise."""
    return "\t" if ".tsv" in Path(file.lower()).suffixes else ","


def csv_header(rows: Iterator[list[str] | Exception]) -> list[str] | None:
    """The first row as column names; None for a file without a usable one."""
    first = next(rows, None)
    if first is None or isinstance(first, Exception):
        return None
    return first


def _read_csv(path: Path, part: Part) -> Iterator[Record]:
    delimiter = csv_delimiter(part.file)
    with open_stream(path) as stream:
        header = csv_header(iter(CsvRows(stream, delimiter)))
    if header is None:
        raise DataError(f"{str(path)!r} has no header row")
    text_at = header.index(part.text_column or "")
    id_at = None if part.id_column is None else header.index(part.id_column)
    with open_stream(path) as stream:
        rows = CsvRows(stream, delimiter, part.start if part.row > 1 else 0)
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
                yield Rejected(part.file, row, "malformed CSV", str(value))
            elif len(value) != len(header):
                yield Rejected(part.file, row, "wrong number of fields", f"{len(value)}, the header has {len(header)}")
            else:
                yield _table_row(part, row, value[text_at], None if id_at is None else value[id_at])


def _read_jsonl(path: Path, part: Part) -> Iterator[Record]:
    with open_stream(path) as stream:
        lines = Lines(stream, part.start)
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
            if line.isspace():
                continue
            yield _json_row(part, row, line.removeprefix(UTF8_MARK) if row == 1 else line)


def _damaged_compression(part: Part, row: int, error: DamagedStream) -> Rejected:
    return Rejected(part.file, row, "damaged compression", f"{error}; this row and all after it are lost")


def _json_row(part: Part, row: int, line: bytes) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejected(part.file, row, "invalid UTF-8", f"at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Rejected(part.file, row, "invalid JSON", str(error))
    if not isinstance(value, dict):
        return Rejected(part.file, row, "not a JSON object", f"a {type(value).__name__}")
    for column in (part.text_column, part.id_column):
        if column is not None and column not in value:
            return Rejected(part.file, row, f"no column {column!r}", f"it has {', '.join(map(repr, value))}"[:200])
    return _table_row(part, row, value[part.text_column], value.get(part.id_column))


def _read_parquet(path: Path, part: Part) -> Iterator[Record]:
    columns = [column for column in (part.text_column, part.id_column) if column is not None]
    with pq.ParquetFile(path) as file:
        row = part.row - 1
        for group in range(part.start, part.stop):
            end = row + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=columns):
                    texts = _text_values(batch.column(part.text_column))
                    ids = batch.column(part.id_column).to_pylist() if part.id_column else [None] * len(texts)
                    for text, id in zip(texts, ids, strict=True):
                        row += 1
                        yield _table_row(part, row, text, id)
            except (pa.ArrowException, OSError) as error:
                detail = f"row group {group}: {' '.join(str(error).split())}"[:300]
                yield Rejected(part.file, row + 1, "damaged Parquet rows", detail, rows=end - row)
            row = end


def _text_values(column: pa.Array) -> list[bytes | None]:
    """A column of strings as bytes: a value that is not UTF-8 must spoil its own row only."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _read_source(path: Path, part: Part) -> Iterator[Record]:
    metadata = {} if part.language is None else {"language": part.language}
    yield _whole_file(path, part, metadata)


def _read_text(path: Path, part: Part) -> Iterator[Record]:
    metadata = {} if part.language is None else {"language": part.language}
    if part.size <= TEXT_DOCUMENT_BYTES:
        yield _whole_file(path, part, metadata)
        return
    with open(path, "rb") as stream:
        for row, content in enumerate(text_pieces(stream, part.start, part.stop), start=part.row):
            content = content.removeprefix(UTF8_MARK) if row == 1 else content
            yield clean_text(content, part.file, row, f"{part.file}:{row}", metadata)


def _whole_file(path: Path, part: Part, metadata: dict[str, Any]) -> Record:
    if part.size > MAX_DOCUMENT_BYTES:
        return Rejected(part.file, None, "file too large", f"{part.size:,} bytes of source in one document")
    return clean_text(path.read_bytes().removeprefix(UTF8_MARK), part.file, None, part.file, metadata)


def text_pieces(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Cut a text at the last empty line (else line end, else blank, else character) within TEXT_DOCUMENT_BYTES.

    Each cut depends only on where the piece before ended, so that parts that start at cuts give the same pieces.
    """
    stream.seek(start)
    held = b""
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


def _table_row(part: Part, row: int, text: Any, id: Any) -> Record:
    """A row of a table as a document; text may come as str, or as bytes that are to be UTF-8."""
    if text is None:
        return Rejected(part.file, row, "no text", f"column {part.text_column!r} is null")
    if not isinstance(text, (str, bytes)):
        return Rejected(part.file, row, "not text", f"column {part.text_column!r} holds a {type(text).__name__}")
    if part.id_column is None:
        id = f"{part.file}:{row}"
    elif id is None or id == "" or isinstance(id, (dict, list)):
        return Rejected(part.file, row, "no id", f"column {part.id_column!r} holds {id!r}"[:200])
    return clean_text(text, part.file, row, str(id), {})


def clean_text(text: str | bytes, file: str, row: int | None, id: str, metadata: dict[str, Any]) -> Record:
    """The document, unless its text is empty, not UTF-8, holds a NUL (binary or damaged), or is too long."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        size = len(text.encode("utf-8"))
        id.encode("utf-8")
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        return Rejected(file, row, "invalid UTF-8", f"at position {start}")
    if size > MAX_DOCUMENT_BYTES:
        return Rejected(file, row, "row too long", f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
    if "\0" in text:
        return Rejected(file, row, "NUL byte", f"at position {text.index(chr(0))}: binary or damaged")
    if not text or text.isspace():
        return Rejected(file, row, "empty")
    return Document(text, id, file, metadata)


READERS: dict[str, Callable[[Path, Part], Iterator[Record]]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text,
    "source": _read_source,
}
