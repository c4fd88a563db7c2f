"""Columns of tables: which there are, and which hold text, id and metadata.

In: a table as a whole `Part`, and what the person `Wanted`. Out: its `Reading` with the columns, or one sentence that
says why it cannot be read: damaged, in another encoding, separated by something else, or without a column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from blues.config import nearest
from blues.data.reading.csv_rows import CsvRows, csv_header
from blues.data.reading.places import Place
from blues.data.reading.readers import Part, Reading
from blues.data.reading.streams import (
    DAMAGES,
    MAX_DOCUMENT_BYTES,
    UTF8,
    UTF8_MARK,
    DamagedStream,
    Lines,
    LineTooLong,
    damage,
    open_bytes,
    open_random,
    open_stream,
    wide,
)
from blues.errors import DataError

COLUMN_SAMPLE = 100
"""JSON objects looked at to learn which columns there are."""
WIDE_SAMPLE = 64
"""Bytes looked at to learn whether a table has two of them for each character."""
LONG_SAMPLE = 10_000
"""The same, while a column that was named has not been seen."""
MOST_LISTED = 40
"""Columns named in a message."""
TEXT_COLUMNS = ("text", "content", "code")
"""Columns that are taken for the text where none is named, first found first."""
DELIMITERS = ",;\t|"
"""What tables are commonly separated by."""


@dataclass(frozen=True)
class Wanted:
    """What the person asked for: columns of tables, the kind of all files, and how they are read."""

    text_column: str | None = None
    id_column: str | None = None
    metadata_columns: tuple[str, ...] = ()
    kind: str | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    @property
    def named(self) -> list[tuple[str, str]]:
        """The columns with the flags that named them."""
        single = (("--text-column", self.text_column), ("--id-column", self.id_column))
        several = (("--metadata-columns", column) for column in self.metadata_columns)
        return [(flag, column) for flag, column in (*single, *several) if column is not None]


def delimiter_of(named: str) -> str:
    """The character that --delimiter names; a tab may be written as a shell passes it on, with a backslash."""
    delimiter = "\t" if named == r"\t" else named
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n\0':
        raise DataError(f"--delimiter must be one character of ASCII such as ';', ',', '\\t' or '|', got {named!r}")
    return delimiter


def with_columns(place: Place, whole: Part, wanted: Wanted) -> Reading:
    """How a table is read, with the columns that are read of it.

    Raises:
        DataError: it is damaged, is not what its name says, or has not the columns.
    """
    where = place.where(whole.file)
    columns, schema = _columns(place, whole, wanted)
    if whole.reading.kind == "csv" and wanted.delimiter is None:
        _refuse_other_delimiter(where, columns, whole.reading.delimiter, wanted.text_column)
    text, id = _choose_columns(where, columns, wanted)
    if schema is not None and not _holds_text(schema.field(text).type):
        raise DataError(f"{where}: column {text!r} holds {schema.field(text).type}, not text")
    encoding = whole.reading.encoding if schema is None else UTF8
    return replace(
        whole.reading, text_column=text, id_column=id, metadata_columns=wanted.metadata_columns, encoding=encoding
    )


def _refuse_other_delimiter(where: str, columns: Sequence[str], delimiter: str, text_column: str | None) -> None:
    """A table of a single column whose name holds a delimiter is most likely one of several columns."""
    if len(columns) != 1 or text_column == columns[0]:
        return
    counts = {other: columns[0].count(other) for other in DELIMITERS if other != delimiter}
    other = max(counts, key=lambda found: counts[found])
    if counts[other]:
        raise DataError(
            f"{where} has a single column, {_listed(columns)}; say what separates it with --delimiter {other!r}, or "
            "name that column with --text-column"
        )


def _columns(place: Place, part: Part, wanted: Wanted) -> tuple[list[str], pa.Schema | None]:
    """The columns of a table, and the schema of one that has types.

    Raises:
        DataError: it has none, so it is not what its name says.
    """
    columns: list[str] | None = []
    schema, encoding, seems = None, part.reading.encoding, None
    where, kind = place.where(part.file), part.reading.kind
    try:
        if kind == "parquet":
            with open_random(place, part.entry) as stream, pq.ParquetFile(stream) as file:
                schema = file.schema_arrow
            columns = list(schema.names)
        else:
            stream, encoding = open_stream(place, part.entry, part.reading.encoding)
            with stream:
                if kind == "csv":
                    rows = CsvRows(stream, part.reading.delimiter, limit=part.reading.max_document_bytes)
                    columns = csv_header(iter(rows))
                else:
                    columns = _json_columns(stream, wanted)
            if not columns:
                seems = _seems(place, part)
    except DamagedStream as error:
        raise DataError(f"{where} is {error}; mend it, or name it for what it is") from None
    except DAMAGES as error:
        raise DataError(f"{where} is damaged or not {kind}: {damage(error)}") from None
    if not columns:
        if seems not in (None, encoding):
            raise DataError(f"{where} seems to be in {seems}; say so with --encoding {seems}")
        form = {"csv": "a header row", "jsonl": "JSON objects, one on each line"}.get(kind, "columns")
        flags = "--format" if kind == "parquet" else f"--format, or with --encoding if it is not in {encoding}"
        raise DataError(f"{where} does not begin with {form}; mend it, or say what it is with {flags}")
    return columns, schema


def _seems(place: Place, part: Part) -> str | None:
    with open_bytes(place, part.entry) as stream:
        return wide(stream.read(WIDE_SAMPLE))


def _holds_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(type) for is_kind in (*kinds, *binary))


def _json_columns(stream: BinaryIO, wanted: Wanted) -> list[str]:
    """Keys of the first objects, in order of appearance: as many as it takes to find those that are needed."""
    columns: dict[str, None] = {}
    needed = {wanted.text_column or TEXT_COLUMNS[0], *(column for _, column in wanted.named)}
    for number, value in enumerate(_json_values(Lines(stream, limit=wanted.max_document_bytes))):
        if number >= (LONG_SAMPLE if any(column not in columns for _, column in wanted.named) else COLUMN_SAMPLE):
            break
        if isinstance(value, dict):
            columns.update(dict.fromkeys(value))
        if needed <= columns.keys():
            break
    return list(columns)


def _json_values(lines: Lines) -> Iterator[Any]:
    """The value of each line; None for one that cannot be read, which is rejected when its turn comes."""
    while True:
        try:
            line = next(lines)
            yield json.loads((line.removeprefix(UTF8_MARK) if lines.count == 1 else line).decode("utf-8"))
        except StopIteration:
            return
        except DamagedStream:
            if not lines.count:
                raise
            return  # what lies before it is read
        except (ValueError, RecursionError, LineTooLong):
            yield None


def _choose_columns(where: str, columns: Sequence[str], wanted: Wanted) -> tuple[str, str | None]:
    for flag, column in wanted.named:
        if column not in columns:
            hint = nearest(column, columns)
            close = "" if hint.startswith(" Choose") else hint
            raise DataError(f"{where} has no column {column!r} ({flag}). It has: {_listed(columns)}.{close}")
    text_column = wanted.text_column
    if text_column is None:
        usual = [column for column in TEXT_COLUMNS if column in columns]
        if not usual and len(columns) > 1:
            raise DataError(
                f"{where} has no column 'text'; say which one holds it with --text-column: {_listed(columns)}"
            )
        text_column = usual[0] if usual else columns[0]
    for column in (text_column, *(column for _, column in wanted.named)):
        if columns.count(column) > 1:
            raise DataError(f"{where} has more than one column {column!r}; rename all but one")
    return text_column, wanted.id_column


def _listed(columns: Sequence[str]) -> str:
    """The names in one line, whatever they hold and however many there are."""
    names = [name if name.isprintable() and len(name) < 80 else repr(name[:80]) for name in columns[:MOST_LISTED]]
    return ", ".join(names) + (f" and {len(columns) - MOST_LISTED:,} more" if len(columns) > MOST_LISTED else "")
