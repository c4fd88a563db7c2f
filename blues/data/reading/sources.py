"""From what the person named to a plan: which parts of which files are read, in a fixed order.

In: a file, a folder that is walked, a URL, or a git repository at a commit; which columns hold text, id and metadata.
Out: a `Plan`, whose `Part`s `readers.py` turns into documents. The plan depends on the names, sizes and contents of
the files alone: not on where they lie, on their times, or on how many processes will read them.

    places.py, remote.py, git.py    list and open files
    kinds.py                        what a file holds, by its name
    columns.py                      which columns of a table are read
    cutting.py                      large files in parts
    readers.py, streams.py          parts to rows to documents
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from blues.config import nearest
from blues.data.reading.columns import Wanted, delimiter_of, with_columns
from blues.data.reading.csv_rows import csv_delimiter
from blues.data.reading.cutting import cut
from blues.data.reading.kinds import KINDS, TABLE_KINDS, guess_kind, language_of, suffix_of, suffixes_of
from blues.data.reading.locate import AskKnown, Located, locate
from blues.data.reading.places import EMPTY_TABLE, HIDDEN, Choose, Entry, Listing, Place, in_threads
from blues.data.reading.readers import LFS_DETAIL, LFS_REASON, Part, Reading, Rejected, is_lfs_pointer
from blues.data.reading.streams import MAX_DOCUMENT_BYTES, codec
from blues.data.storage.arrays import Strings, flags, strings, whole, whole_numbers
from blues.data.storage.chunks import numbers
from blues.errors import DataError

PART_BYTES = 4 << 20
"""Files are cut into parts of about this size."""
MAX_TASKS = 1 << 14
"""Tasks grow beyond PART_BYTES where a corpus would need more of them than this."""
MOST_IGNORED = 100
"""Kinds of files passed over that are told apart; the rest is one sum."""


@dataclass(frozen=True)
class Plan:
    """What will be read, and where it lies.

    files: by name: `file`, `content` (equal ones mean equal bytes), `bytes` (the size as it lies there) and `reading`
    (one of `readings` by what describes it, empty for a file that is not read). listing: where each of them lies.
    rejected: tables of a folder that cannot be read. ignored: files passed over, by suffix or reason.
    """

    root: Place
    name: str
    files: pa.Table
    listing: Listing
    readings: dict[str, Reading]
    rejected: tuple[Rejected, ...]
    ignored: dict[str, int]

    @property
    def bytes(self) -> int:
        """Size of the files as they lie there."""
        return int(numbers(self.files, "bytes").sum())

    @cached_property
    def content(self) -> str:
        """Checksum of the names and contents of all files, with a NUL behind each."""
        name, content = (whole(self.files[column]).cast(pa.large_string()) for column in ("file", "content"))
        nothing, nul = strings(["", "\0"]).cast(pa.large_string())
        joined = pc.binary_join_element_wise(name, content, nothing, nul)
        _, ends, characters = joined.buffers()
        return xxhash.xxh3_128_hexdigest(characters.slice(0, int(np.frombuffer(ends, np.int64)[len(joined)])))

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

    def parts(self, wanted: np.ndarray | None = None) -> list[Part]:
        """The files that are read, each as one part. `wanted`, bool[files]: only those of them."""
        readings = self.files["reading"]
        chosen = range(len(self.files)) if wanted is None else np.flatnonzero(wanted).tolist()
        if wanted is not None:
            readings = readings.filter(flags(wanted))
        parts = []
        for number, described in zip(chosen, readings.to_pylist(), strict=True):
            if described:
                entry = self.listing.entry(number)
                parts.append(Part(entry, self.readings[described], bytes=entry.size))
        return parts

    def tasks(self, wanted: np.ndarray | None = None) -> list[tuple[Part, ...]]:
        """The `parts` in order, large files cut between rows, in groups of about PART_BYTES: what one process reads and
        writes at a time.

        Raises:
            DataError: a file that vanished, changed or cannot be read.
        """
        uncut = self.parts(wanted)
        cut_above = max(PART_BYTES, self.root.cut_above(sum(part.bytes for part in uncut)))
        pieces = in_threads(self.root.threads, lambda part: cut(self.root, part, PART_BYTES, cut_above), uncut)
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
    known: AskKnown = lambda: None,
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
        known: gives what a dataset says of the same repository, so that only what changed since is looked at. It makes
            no difference to the plan.

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
    located, suffixes, suffix_F, ignored = _located(path, commit, kind, report, known)
    listing, contents = located.place.look(located.listing)
    readings, number_F, rejected = _readings(located, listing, wanted, suffixes, suffix_F)
    ignored[EMPTY_TABLE] += int(np.count_nonzero(number_F == 0)) - len(rejected)
    if rejected and (not readings or (text_column and all(r.text_column is None for r in readings.values()))):
        raise DataError(f"no table in {located.shown} can be read; {rejected[0].file}: {rejected[0].detail}")
    if not readings:
        raise DataError(_nothing_to_read(located, ignored))
    return Plan(
        root=located.place,
        name=located.name,
        files=_table(listing, contents, strings(["", *readings]).take(whole_numbers(number_F, pa.int32()))),
        listing=listing,
        readings=readings,
        rejected=tuple(rejected),
        ignored=_most_common(ignored),
    )


def _located(
    path: str | Path, commit: str | None, kind: str | None, report: Callable[[str], None], known: AskKnown
) -> tuple[Located, list[str], np.ndarray, Counter[str]]:
    """Where the files lie, their `suffixes_of`, and the counts of those that were passed over."""
    ignored: Counter[str] = Counter()
    choose = _chooser(kind)
    located = locate(path, commit, choose, ignored, report, known if kind is None else lambda: None)
    suffixes, suffix_F = suffixes_of(strings(located.listing.names))
    if isinstance(located.listing.names, Strings) and any(choose(f"x{suffix}") is not None for suffix in suffixes):
        return _located(path, commit, kind, report, lambda: None)  # the dataset was made of all kinds of files
    return located, suffixes, suffix_F, ignored


def _table(listing: Listing, contents: Sequence[str], readings: pa.Array) -> pa.Table:
    """`Plan.files`."""
    columns = {
        "file": strings(listing.names),
        "content": strings(contents),
        "bytes": whole_numbers(np.array(listing.sizes), pa.uint64()),
        "reading": readings,
    }
    return pa.table(columns)


def _chooser(kind: str | None) -> Choose:
    """Why a file is passed over, by its name alone; found out once for each suffix."""
    reasons: dict[str, str | None] = {}

    def choose(name: str) -> str | None:
        if name.startswith("."):
            return HIDDEN
        suffix = suffix_of(name)
        if suffix not in reasons:
            other = f".{suffix.lower().rpartition('.')[2]}" if suffix else "no suffix"
            reasons[suffix] = other if kind is None and guess_kind(suffix) is None else None
        return reasons[suffix]

    return choose


def _readings(
    located: Located, listing: Listing, wanted: Wanted, suffixes: list[str], suffix_F: np.ndarray
) -> tuple[dict[str, Reading], np.ndarray, list[Rejected]]:
    """How files are read: the ways there are, by what describes them; the number of each file's, from 1, or 0 for a
    table that is empty or rejected: int32[files]; the tables that are rejected.

    A look at its suffix is enough for text and source code, and one for each suffix; each table is looked into.
    """
    readings: dict[str, Reading] = {}
    order: dict[str, int] = {}

    def number_of(reading: Reading) -> int:
        readings.setdefault(reading.described, reading)
        return order.setdefault(reading.described, len(readings))

    of_suffix = [_reading(located, suffix, wanted) for suffix in suffixes]
    number_S = [-1 if reading.kind in TABLE_KINDS else number_of(reading) for reading in of_suffix]
    number_F = np.array(number_S, np.int32)[suffix_F]
    tables = np.flatnonzero(number_F < 0).tolist()
    looked = in_threads(located.place.threads, lambda at: _read_table(located, listing.entry(at), wanted), tables)
    for at, one in zip(tables, looked, strict=True):
        number_F[at] = number_of(one) if isinstance(one, Reading) else 0
    return readings, number_F, [one for one in looked if isinstance(one, Rejected)]


def _reading(located: Located, suffix: str, wanted: Wanted) -> Reading:
    """How files with this suffix are read, without the columns of tables."""
    kind = wanted.kind or guess_kind(suffix)
    if kind is None:
        raise DataError(
            f"{located.shown} does not say by its name what it holds; add --format, one of: {', '.join(KINDS)}"
        )
    language = None if kind in TABLE_KINDS else language_of(suffix)
    return Reading(kind, encoding=wanted.encoding, language=language, max_document_bytes=wanted.max_document_bytes)


def _read_table(located: Located, entry: Entry, wanted: Wanted) -> Reading | Rejected | None:
    """How a table is read; None for one without a byte.

    Raises:
        DataError: it is damaged or has not the columns, and was named itself; one of a folder is rejected.
    """
    place = located.place
    if not entry.size:
        return None
    reading = _reading(located, suffix_of(entry.file), wanted)
    if reading.kind == "csv":
        reading = replace(reading, delimiter=wanted.delimiter or csv_delimiter(entry.file))
    try:
        _refuse_lfs_pointer(place, entry)
        return with_columns(place, Part(entry, reading), wanted)
    except DataError as error:
        if located.single:
            raise
        detail = str(error).replace(place.where(entry.file), "it")  # a dataset names no folder of this machine
        reason = LFS_REASON if isinstance(error, LfsPointer) else "table that cannot be read"
        return Rejected(entry.file, None, reason, detail)
    except OSError as error:
        raise place.unreadable(entry.file, error) from None


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


class LfsPointer(DataError):
    """A table whose content was left elsewhere by git LFS."""


def _refuse_lfs_pointer(place: Place, entry: Entry) -> None:
    if entry.size < 1024:
        with place.open(entry) as stream:
            if is_lfs_pointer(stream.read(1024)):
                raise LfsPointer(f"{place.where(entry.file)} is a git LFS pointer: {LFS_DETAIL}")
