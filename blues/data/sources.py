"""From files and folders to a plan: which parts of which files are read, in a fixed order.

In: a file, or a folder that is walked; which columns hold text and id. Out: a `Plan` of `Part`s that `readers.py` turns
into documents. The plan depends on the names, sizes and contents of the files alone: not on where they lie, on their
times, or on how many processes will read them.

Large files are cut between two rows so that several processes can share them: CSV by reading its quotes, JSON Lines at
line ends, Parquet at row groups, text at empty lines. Compressed files stay whole.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from blues.config import nearest
from blues.data.chunks import file_checksum
from blues.data.manifest import is_dataset
from blues.data.readers import (
    COMPRESSIONS,
    CsvRows,
    DamagedStream,
    Lines,
    LineTooLong,
    Part,
    Rejected,
    csv_delimiter,
    csv_header,
    open_stream,
    text_pieces,
)
from blues.errors import DataError

PART_BYTES = 4 << 20
"""Files are cut into parts of about this size."""
MAX_TASKS = 1 << 14
"""Tasks grow beyond PART_BYTES where a corpus would need more of them than this."""
COLUMN_SAMPLE = 100
"""JSON objects looked at to learn which columns there are."""
TEXT_COLUMNS = ("text", "content", "code")
"""Columns that are taken for the text where none is named, first found first."""

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TEXTS = {".txt": None, ".md": "markdown", ".rst": "restructuredtext", ".tex": "tex"}
LANGUAGES = {
    **{".py": "python", ".pyi": "python", ".go": "go", ".rs": "rust", ".java": "java", ".kt": "kotlin"},
    **{".js": "javascript", ".jsx": "javascript", ".mjs": "javascript", ".ts": "typescript", ".tsx": "typescript"},
    **{".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".cs": "csharp"},
    **{".rb": "ruby", ".php": "php", ".swift": "swift", ".scala": "scala", ".lua": "lua", ".pl": "perl", ".r": "r"},
    **{".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".sh": "bash", ".bash": "bash", ".sql": "sql", ".zig": "zig"},
    **{".html": "html", ".css": "css", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"},
}
KINDS = ("csv", "jsonl", "parquet", "text", "source")
SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules"))
WHOLE = 1 << 62
"""The end of a part whose size in decompressed bytes is not known."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its name, a token that is equal only for equal content, its size in bytes."""

    file: str
    content: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What will be read. `root`: the folder that the parts' files are relative to; `name`: what the source is called;
    `files`: in the order of their names; `rejected`: tables of a walked folder that cannot be read; `ignored`: its
    other files that are not read, by suffix or reason."""

    root: Path
    name: str
    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]
    rejected: tuple[Rejected, ...]
    ignored: dict[str, int]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def source(self) -> dict[str, Any]:
        """What a manifest says of the source."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(f"{file.file}\0{file.content}\0".encode("utf-8", "surrogateescape"))
        return {
            "kind": "files",
            "name": self.name,
            "files": len(self.files),
            "bytes": self.bytes,
            "ignored": self.ignored,
            "xxh3": digest.hexdigest(),
        }

    def only(self, files: Collection[str]) -> Plan:
        """The same with the parts of these files alone."""
        wanted = frozenset(files)
        return replace(self, parts=tuple(part for part in self.parts if part.file in wanted))

    def tasks(self) -> list[tuple[Part, ...]]:
        """The parts in groups of about PART_BYTES, in order: what one process reads and writes at a time."""
        target = max(PART_BYTES, sum(part.bytes for part in self.parts) // MAX_TASKS)
        groups: list[list[Part]] = []
        size = 0
        for part in self.parts:
            if not groups or size + part.bytes > target:
                groups.append([])
                size = 0
            groups[-1].append(part)
            size += part.bytes
        return [tuple(group) for group in groups]


def plan(
    path: str | Path, *, text_column: str | None = None, id_column: str | None = None, kind: str | None = None
) -> Plan:
    """Plan the reading of a file, or of a folder and all below it.

    In a folder, links, hidden folders and datasets of Blues are passed over: the output may lie inside the source.

    Args:
        text_column, id_column: of tables (CSV, JSON Lines, Parquet). Without `text_column`: `text`, `content` or
            `code`, or the only column. Without `id_column` a row's id is `file:row`.
        kind: one of KINDS, for files whose name does not say it.

    Raises:
        DataError: nothing there, nothing readable, a kind or a column that does not exist (names the ones there are).
    """
    path = Path(path)
    if kind is not None and kind not in KINDS:
        raise DataError(f"unknown format {kind!r}.{nearest(kind, KINDS)}")
    ignored: Counter[str] = Counter()
    if is_dataset(path):
        raise DataError(f"{str(path)!r} is a dataset of Blues already; name the files it was to be made of")
    if path.is_dir():
        root, files = path, list(_walk(path, kind, ignored))
    elif path.is_file():
        root, files = path.parent, [path.name]
    else:
        raise DataError(f"there is no file or folder {str(path)!r}; check the path")
    parts: list[Part] = []
    rejected: list[Rejected] = []
    listed: list[SourceFile] = []
    for file in files:
        try:
            try:
                found = _plan_file(root, file, _kind(path, file, kind), text_column, id_column)
                ignored["empty table"] += not found
            except DataError as error:
                if path.is_file():
                    raise
                found = []  # one table of a folder does not stop the rest
                detail = str(error).replace(repr(str(root / file)), "it")  # a dataset names no folder of this machine
                rejected.append(Rejected(file, None, "table that cannot be read", detail))
            listed.append(SourceFile(file, f"xxh3:{file_checksum(root / file)}", (root / file).stat().st_size))
        except OSError as error:
            raise DataError(f"cannot read {str(root / file)!r}: {error.strerror or error}") from None
        parts += found
    if rejected and (not parts or (text_column and all(part.text_column is None for part in parts))):
        raise DataError(f"no table in {str(path)!r} can be read; {rejected[0].file}: {rejected[0].detail}")
    if not parts:
        found_text = ", ".join(f"{count} {what}" for what, count in (+ignored).most_common(5))
        raise DataError(
            f"nothing to read in {str(path)!r}"
            + (f" (passed over: {found_text})" if found_text else "; it is empty")
            + "; Blues reads .csv .tsv .jsonl .parquet .txt .md and source code, or say --format"
        )
    return Plan(
        root=root,
        name=path.resolve().name,
        files=tuple(listed),
        parts=tuple(parts),
        rejected=tuple(rejected),
        ignored=dict(sorted((+ignored).items())),
    )


def _walk(root: Path, kind: str | None, ignored: Counter[str]) -> Iterator[str]:
    """Files below `root` that are read, relative to it, in the order of their names.

    Raises:
        DataError: a folder that cannot be listed.
    """
    found = []
    for folder, folders, names in os.walk(root, onerror=_refuse):  # does not follow links: a loop of them ends
        if is_dataset(Path(folder)):  # not told in the plan, which must be the same once the output is there
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                ignored["link or special file"] += 1
            elif name.startswith("."):
                ignored["hidden file"] += 1
            elif kind is None and guess_kind(name) is None:
                ignored[path.suffix.lower() or "no suffix"] += 1
            else:
                found.append(path.relative_to(root).as_posix())
    yield from sorted(found)


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"cannot read folder {str(error.filename)!r}: {error.strerror}; mend its permissions") from None


def guess_kind(name: str) -> str | None:
    """The kind of a file by its name: a member of KINDS, or None if that does not say."""
    suffix = _inner_suffix(name)
    if suffix in TABLES:
        return None if suffix == ".parquet" and _compressed(name) else TABLES[suffix]
    if _compressed(name):
        return None
    if suffix in TEXTS:
        return "text"
    return "source" if suffix in LANGUAGES else None


def _inner_suffix(name: str) -> str:
    """`.jsonl` of `a.jsonl.gz`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _compressed(name: str) -> bool:
    return Path(name.lower()).suffix in COMPRESSIONS


def _kind(path: Path, file: str, kind: str | None) -> str:
    chosen = kind or guess_kind(file)
    if chosen is None:
        raise DataError(
            f"{str(path)!r} does not say by its name what it holds; add --format, one of: {', '.join(KINDS)}"
        )
    return chosen


def _plan_file(root: Path, file: str, kind: str, text_column: str | None, id_column: str | None) -> list[Part]:
    path = root / file
    status = path.stat()
    whole = Part(
        file=file,
        kind=kind,
        size=status.st_size,
        modified=status.st_mtime_ns,
        start=0,
        stop=WHOLE if _compressed(file) else status.st_size,
        bytes=status.st_size,
        language=LANGUAGES.get(_inner_suffix(file), TEXTS.get(_inner_suffix(file))),
    )
    if kind in ("text", "source"):
        return list(_cut_text(path, whole)) if kind == "text" else [whole]
    if not status.st_size:
        return []
    columns = _columns(path, whole)
    text, id = _choose_columns(path, columns, text_column, id_column)
    whole = replace(whole, text_column=text, id_column=id, language=None)
    if kind == "parquet":
        return list(_cut_parquet(path, whole))
    if _compressed(file):
        return [whole]
    return list(_cut_csv(path, whole) if kind == "csv" else _cut_jsonl(path, whole))


def _columns(path: Path, part: Part) -> list[str]:
    """The columns of a table.

    Raises:
        DataError: it has none, so it is not what its name says.
    """
    columns: list[str] | None = []
    try:
        if part.kind == "parquet":
            columns = list(pq.read_schema(path).names)
        elif part.kind == "csv":
            with open_stream(path) as stream:
                columns = csv_header(iter(CsvRows(stream, csv_delimiter(part.file))))
        else:
            columns = _json_columns(path)
    except (pa.ArrowException, DamagedStream) as error:
        raise DataError(f"{str(path)!r} is damaged or not {part.kind}: {' '.join(str(error).split())}") from None
    if not columns:
        wanted = {"csv": "a header row", "jsonl": "JSON objects, one on each line"}.get(part.kind, "columns")
        raise DataError(f"{str(path)!r} does not begin with {wanted}; mend it, or say what it is with --format")
    return columns


def _json_columns(path: Path) -> list[str]:
    """Every key of the first objects, in order of appearance."""
    columns: dict[str, None] = {}
    with open_stream(path) as stream:
        lines = Lines(stream)
        for _ in range(COLUMN_SAMPLE):
            try:
                value = json.loads(next(lines))
            except (StopIteration, DamagedStream):
                break
            except (ValueError, RecursionError, LineTooLong):  # rejected when its turn comes, row by row
                continue
            if isinstance(value, dict):
                columns.update(dict.fromkeys(value))
    return list(columns)


def _choose_columns(
    path: Path, columns: Sequence[str], text_column: str | None, id_column: str | None
) -> tuple[str, str | None]:
    for flag, column in (("--text-column", text_column), ("--id-column", id_column)):
        if column is not None and column not in columns:
            hint = nearest(column, columns)
            there = "" if hint.startswith(" Choose") else f" It has: {', '.join(columns)}."
            raise DataError(f"{str(path)!r} has no column {column!r} ({flag}).{there}{hint}")
    if text_column is None:
        usual = [column for column in TEXT_COLUMNS if column in columns]
        if not usual and len(columns) > 1:
            raise DataError(
                f"{str(path)!r} has no column 'text'; say which one holds it with --text-column: {', '.join(columns)}"
            )
        text_column = usual[0] if usual else columns[0]
    return text_column, id_column


def _cut_csv(path: Path, whole: Part) -> Iterator[Part]:
    """Parts that end between two rows. The whole file is read for its quotes; only a long one."""
    if whole.size <= PART_BYTES:
        yield whole
        return
    with open_stream(path) as stream:
        rows = CsvRows(stream, csv_delimiter(whole.file))
        values = iter(rows)
        next(values)  # the header
        start, first = 0, 1
        for row, _ in enumerate(values, start=1):
            if rows.position - start >= PART_BYTES and rows.position < whole.size:
                yield _piece(whole, start, rows.position, first)
                start, first = rows.position, row + 1
        yield _piece(whole, start, whole.size, first)


def _cut_jsonl(path: Path, whole: Part) -> Iterator[Part]:
    start, row = 0, 1
    with open(path, "rb") as stream:
        while whole.size - start > PART_BYTES:
            content = stream.read(PART_BYTES)
            rest = stream.readline()
            stop = start + len(content) + len(rest)
            if stop >= whole.size:
                break
            yield _piece(whole, start, stop, row)
            row += content.count(b"\n") + rest.count(b"\n")
            start = stop
    yield _piece(whole, start, whole.size, row)


def _cut_parquet(path: Path, whole: Part) -> Iterator[Part]:
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        sizes, rows = [group.total_byte_size for group in groups], [group.num_rows for group in groups]
    start = 0
    while start < len(groups):
        stop = start + 1
        while stop < len(groups) and sum(sizes[start : stop + 1]) <= PART_BYTES:
            stop += 1
        part = _piece(whole, start, stop, 1 + sum(rows[:start]))
        yield replace(part, bytes=sum(sizes[start:stop]))
        start = stop


def _cut_text(path: Path, whole: Part) -> Iterator[Part]:
    """Parts made of whole pieces of `text_pieces`, so that reading them gives the pieces of the whole text."""
    if whole.size <= PART_BYTES:
        yield whole
        return
    with open(path, "rb") as stream:
        start, position, first = 0, 0, 1
        for row, piece in enumerate(text_pieces(stream, 0, whole.size), start=1):
            position += len(piece)
            if position - start >= PART_BYTES and position < whole.size:
                yield _piece(whole, start, position, first)
                start, first = position, row + 1
        yield _piece(whole, start, whole.size, first)


def _piece(whole: Part, start: int, stop: int, row: int) -> Part:
    return replace(whole, start=start, stop=stop, row=row, bytes=stop - start)
