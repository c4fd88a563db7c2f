"""From what the person named to a plan: which parts of which files are read, in a fixed order.

In: a file, a folder that is walked, a URL, or a git repository at a commit; which columns hold text, id and metadata.
Out: a `Plan` of `Part`s that `readers.py` turns into documents. The plan depends on the names, sizes and contents of
the files alone: not on where they lie, on their times, or on how many processes will read them.

    places.py, remote.py, git.py    list and open files
    columns.py                      which columns of a table are read
    cutting.py                      large files in parts
    readers.py, streams.py          parts to rows to documents
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from blues.config import nearest
from blues.data.reading.columns import Wanted, delimiter_of, with_columns
from blues.data.reading.csv_rows import csv_delimiter
from blues.data.reading.cutting import cut
from blues.data.reading.locate import Located, locate
from blues.data.reading.places import Entry, Place
from blues.data.reading.readers import (
    LFS_DETAIL,
    LFS_REASON,
    WHOLE,
    Part,
    Rejected,
    is_lfs_pointer,
)
from blues.data.reading.streams import (
    COMPRESSIONS,
    MAX_DOCUMENT_BYTES,
    codec,
)
from blues.errors import DataError

PART_BYTES = 4 << 20
"""Files are cut into parts of about this size."""
MAX_TASKS = 1 << 14
"""Tasks grow beyond PART_BYTES where a corpus would need more of them than this."""
MOST_IGNORED = 100
"""Kinds of files passed over that are told apart; the rest is one sum."""

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
KIND_OF = {**dict.fromkeys(LANGUAGES, "source"), **dict.fromkeys(TEXTS, "text"), **TABLES}
KINDS = ("csv", "jsonl", "parquet", "text", "source")

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. `content`: equal ones mean equal bytes; `bytes`: its size as it lies there."""

    file: str
    content: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What will be read, and where it lies.

    files: by name. parts: the files that are read, each as one part; `tasks` cuts large ones. rejected: tables of a
    folder that cannot be read. ignored: files passed over, by suffix or reason.
    """

    root: Place
    name: str
    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]
    rejected: tuple[Rejected, ...]
    ignored: dict[str, int]

    @property
    def bytes(self) -> int:
        """Size of the files as they lie there."""
        return sum(file.bytes for file in self.files)

    @property
    def content(self) -> str:
        """Checksum of the names and contents of all files."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(f"{file.file}\0{file.content}\0".encode())
        return digest.hexdigest()

    @property
    def source(self) -> dict[str, Any]:
        """What a manifest says of the source: nothing that depends on this machine."""
        return {
            **self.root.provenance(),
            "name": self.name,
            "files": len(self.files),
            "bytes": self.bytes,
            "ignored": self.ignored,
            "content": self.content,
        }

    def only(self, files: Collection[str]) -> Plan:
        """The same with the parts of these files alone."""
        wanted = frozenset(files)
        return replace(self, parts=tuple(part for part in self.parts if part.file in wanted))

    def tasks(self) -> list[tuple[Part, ...]]:
        """The parts in order, large files cut between rows, in groups of about PART_BYTES: what one process reads and
        writes at a time.

        Raises:
            DataError: a file that vanished, changed or cannot be read.
        """
        cut_above = max(PART_BYTES, self.root.cut_above(sum(part.bytes for part in self.parts)))
        pieces = _map(self.root, lambda part: cut(self.root, part, PART_BYTES, cut_above), self.parts)
        parts = [piece for found in pieces for piece in found]
        target = max(PART_BYTES, sum(part.bytes for part in parts) // MAX_TASKS)
        groups: list[list[Part]] = []
        size = 0
        for part in parts:
            if not groups or size + part.bytes > target:
                groups.append([])
                size = 0
            groups[-1].append(part)
            size += part.bytes
        return [tuple(group) for group in groups]


@dataclass(frozen=True)
class _Planned:
    """A file of the source: a part, a rejection, or neither for an empty table."""

    file: SourceFile
    part: Part | None = None
    rejected: Rejected | None = None


def plan(
    path: str | Path,
    *,
    text_column: str | None = None,
    id_column: str | None = None,
    metadata_columns: Sequence[str] = (),
    kind: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    commit: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plan the reading of a file, or of a folder and all below it.

    In a folder, links, hidden folders and datasets of Blues are passed over: the output may lie inside the source.

    Args:
        path: on this machine, any URL that fsspec reads (`https://`, `s3://`, `zip://...::...`), or a git repository:
            `git+https://`, `git+ssh://`, `git+file://`, a bare repository, or any folder of one if `commit` is given.
        text_column, id_column, metadata_columns: of tables (CSV, JSON Lines, Parquet). Without `text_column`: `text`,
            `content` or `code`, or the only column. Without `id_column` a row's id is `file:row`.
        kind: one of KINDS, for files whose name does not say it.
        encoding: of files without a byte order mark; any text encoding of Python.
        delimiter: what separates the cells of CSV, one character of ASCII; by default a comma, in .tsv files a tab.
        max_document_bytes: longer rows, and longer files of source code, are rejected. It bounds the memory of each
            process, which is several times that.
        commit: commit, branch or tag of a git repository; nothing of it is checked out.
        report: called with a sentence when something takes time.

    Raises:
        DataError: nothing there, nothing readable, a kind or a column that does not exist (names the ones there are).
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"unknown format {kind!r}.{nearest(kind, KINDS)}")
    wanted = Wanted(
        text_column,
        id_column,
        tuple(dict.fromkeys(metadata_columns)),
        kind,
        codec(encoding),
        None if delimiter is None else delimiter_of(delimiter),
        max_document_bytes,
    )
    ignored: Counter[str] = Counter()

    def choose(name: str) -> str | None:
        if name.startswith("."):
            return "hidden file"
        if kind is None and guess_kind(name) is None:
            return Path(name).suffix.lower() or "no suffix"
        return None

    located = locate(path, commit, choose, ignored, report)
    planned = list(_map(located.place, lambda entry: _plan_entry(located, entry, wanted), located.entries))
    ignored["empty table"] += sum(not (file.part or file.rejected) for file in planned)
    rejected = [file.rejected for file in planned if file.rejected is not None]
    parts = [file.part for file in planned if file.part is not None]
    if rejected and (not parts or (text_column and all(part.text_column is None for part in parts))):
        raise DataError(f"no table in {located.shown} can be read; {rejected[0].file}: {rejected[0].detail}")
    if not parts:
        raise DataError(_nothing_to_read(located, ignored))
    return Plan(
        root=located.place,
        name=located.name,
        files=tuple(file.file for file in planned),
        parts=tuple(parts),
        rejected=tuple(rejected),
        ignored=_most_common(ignored),
    )


def _map(place: Place, function: Callable[[Given], Made], items: Sequence[Given]) -> Iterable[Made]:
    """The results in order; several at a time where each file takes long to reach."""
    if place.threads == 1 or len(items) < 2:
        return map(function, items)
    with ThreadPoolExecutor(place.threads) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # one failure, or Ctrl-C, is enough
            raise


def _plan_entry(located: Located, entry: Entry, wanted: Wanted) -> _Planned:
    place = located.place
    try:
        entry = place.resolve(entry)
        file = SourceFile(entry.file, place.content(entry), entry.size)
        try:
            return _Planned(file, _plan_file(place, entry, _kind(located, entry, wanted.kind), wanted))
        except DataError as error:
            if located.single:
                raise
            detail = str(error).replace(place.where(entry.file), "it")  # a dataset names no folder of this machine
            reason = LFS_REASON if isinstance(error, LfsPointer) else "table that cannot be read"
            return _Planned(file, rejected=Rejected(entry.file, None, reason, detail))
    except OSError as error:
        raise DataError(f"cannot read {place.where(entry.file)}: {error.strerror or error}") from None


def _nothing_to_read(located: Located, ignored: Counter[str]) -> str:
    found = ", ".join(f"{count} {what}" for what, count in (+ignored).most_common(5))
    return (
        f"nothing to read in {located.shown}"
        + (f" (passed over: {found})" if found else "; it is empty")
        + "; Blues reads .csv .tsv .jsonl .parquet .txt .md and source code, or say --format"
    )


def _most_common(ignored: Counter[str]) -> dict[str, int]:
    """Counts by kind, sorted; of a great many kinds the rarest are added up."""
    ordered = sorted((+ignored).items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[MOST_IGNORED:])
    return dict(sorted([*ordered[:MOST_IGNORED], *([("other kinds", rest)] if rest else [])]))


def guess_kind(name: str) -> str | None:
    """The kind of a file by its name: a member of KINDS, or None if that does not say."""
    stem, suffix = _split_suffix(name.rpartition("/")[2].lower())
    if suffix not in COMPRESSIONS:
        return KIND_OF.get(suffix)
    inner = KIND_OF.get(_split_suffix(stem)[1])
    return None if inner in ("parquet", "source") else inner


def _inner_suffix(name: str) -> str:
    """`.jsonl` of `a.jsonl.gz`, as pathlib understands a suffix, at a tenth of its time."""
    stem, suffix = _split_suffix(name.rpartition("/")[2].lower())
    return _split_suffix(stem)[1] if suffix in COMPRESSIONS else suffix


def _split_suffix(name: str) -> tuple[str, str]:
    stem, _, suffix = name.rpartition(".")
    return (stem, f".{suffix}") if stem and suffix else (name, "")


def _kind(located: Located, entry: Entry, kind: str | None) -> str:
    chosen = kind or guess_kind(entry.file)
    if chosen is None:
        raise DataError(
            f"{located.shown} does not say by its name what it holds; add --format, one of: {', '.join(KINDS)}"
        )
    return chosen


class LfsPointer(DataError):
    """A table whose content was left elsewhere by git LFS."""


def _plan_file(place: Place, entry: Entry, kind: str, wanted: Wanted) -> Part | None:
    """The file as one part; None for a table without a byte.

    Raises:
        DataError: a table that is damaged or has not the columns.
    """
    language = None
    if kind in ("text", "source"):
        suffix = _inner_suffix(entry.file)
        language = LANGUAGES.get(suffix, TEXTS.get(suffix))
    whole = Part(
        entry=entry,
        kind=kind,
        start=0,
        stop=WHOLE,
        bytes=entry.size,
        encoding=wanted.encoding,
        language=language,
        delimiter=(wanted.delimiter or csv_delimiter(entry.file)) if kind == "csv" else "",
        max_document_bytes=wanted.max_document_bytes,
    )
    if kind in ("text", "source"):
        return whole
    if not entry.size:
        return None
    _refuse_lfs_pointer(place, entry)
    return with_columns(place, whole, wanted)


def _refuse_lfs_pointer(place: Place, entry: Entry) -> None:
    if entry.size < 1024:
        with place.open(entry) as stream:
            if is_lfs_pointer(stream.read(1024)):
                raise LfsPointer(f"{place.where(entry.file)} is a git LFS pointer: {LFS_DETAIL}")
