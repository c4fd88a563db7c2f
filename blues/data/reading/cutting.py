"""Large files cut between two rows, so that several processes can share them.

In: a `Part` that is a whole file. Out: parts of about `part_bytes` that give, end to end, exactly the records of the
whole: CSV by reading its quotes, JSON Lines at line ends, Parquet at row groups, text at the ends of its pieces.
Compressed files and files in another encoding than UTF-8 cannot be cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq

from blues.data.reading.csv_rows import CsvRows
from blues.data.reading.places import Place
from blues.data.reading.readers import Part, text_pieces
from blues.data.reading.streams import (
    BLOCK_BYTES,
    DAMAGES,
    MAX_DOCUMENT_BYTES,
    UTF8,
    UTF8_MARK,
    compression_of,
    damage,
    open_random,
    open_stream,
)
from blues.errors import DataError

WINDOW_BYTES = 4 << 20
NEWLINE, RETURN, QUOTE = b'\n\r"'


def cut(place: Place, whole: Part, part_bytes: int, above: int) -> list[Part]:
    """The parts of a file, in order; the file itself if it is not larger than `above` or cannot be cut.

    Raises:
        DataError: it vanished, changed since it was planned, or cannot be read.
    """
    try:
        try:
            if whole.reading.kind == "parquet":
                parts = list(_cut_parquet(place, whole, part_bytes)) if whole.entry.seeks else [whole]
            elif whole.reading.kind not in CUTTERS or whole.entry.size <= above or not _is_plain(place, whole):
                return [whole]
            else:
                parts = list(CUTTERS[whole.reading.kind](place, whole, part_bytes))
        except DAMAGES as error:
            words = damage(error)
            place.check(whole.entry)  # one that changed need not be what the plan says
            raise DataError(f"{place.where(whole.file)} is damaged: {words}") from None
        place.check(whole.entry)
        return parts
    except OSError as error:
        raise DataError(f"cannot read {place.where(whole.file)}: {error.strerror or error}") from None


def _is_plain(place: Place, whole: Part) -> bool:
    """Whether a byte of the file is a byte of its text, so that a part can start at it."""
    if compression_of(whole.file) is not None or not whole.entry.seeks:
        return False
    stream, encoding = open_stream(place, whole.entry, whole.reading.encoding)
    stream.close()
    return encoding == UTF8


def _cut_csv(place: Place, whole: Part, part_bytes: int) -> Iterator[Part]:
    """Parts that end between two rows. The whole file is read for its quotes."""
    size, start, first, row = whole.entry.size, 0, 1, 0  # row: the number of the first of `ends`, the header being 0
    with place.open(whole.entry) as stream:
        for ends in csv_row_ends(stream, whole.reading.delimiter, size, whole.reading.max_document_bytes):
            while True:
                at = max(int(np.searchsorted(ends, start + part_bytes)), 1 - row)
                if at >= len(ends) or ends[at] >= size:
                    break
                yield _piece(whole, start, int(ends[at]), first)
                start, first = int(ends[at]), row + at + 1
            row += len(ends)
    yield _piece(whole, start, size, first)


def csv_row_ends(stream: BinaryIO, delimiter: str, size: int, limit: int = MAX_DOCUMENT_BYTES) -> Iterator[np.ndarray]:
    """Where each row ends that `CsvRows` would give, in bytes from the beginning, some rows at a time.

    As long as every quote stands where the rules of CSV allow one, it is enough to count quotes; from the first row on
    where one does not, the csv module decides (`csv_row_ends_by_reading`, the reference).
    """
    base = 0
    while base < size:
        stream.seek(base)
        ends = _ends_of_regular_rows(stream, delimiter, size - base, limit, first=base == 0)
        if ends is None:
            yield from csv_row_ends_by_reading(stream, delimiter, base, limit)
            return
        behind, kept = ends
        yield base + kept
        base += behind


def csv_row_ends_by_reading(
    stream: BinaryIO, delimiter: str, start: int = 0, limit: int = MAX_DOCUMENT_BYTES
) -> Iterator[np.ndarray]:
    """The same by reading rows one by one from `start` on, the end of a row."""
    stream.seek(0)
    rows = CsvRows(stream, delimiter, start, limit)
    positions = (rows.position for _ in rows)
    while found := list(itertools.islice(positions, 4096)):
        yield np.array(found, np.int64)


def _ends_of_regular_rows(
    stream: BinaryIO, delimiter: str, left: int, limit: int, first: bool
) -> tuple[int, np.ndarray] | None:
    """From the beginning of a row on: how many bytes of whole rows there are in the next window, and where those that
    are not empty end. None if a row is irregular, or longer than a document may be."""
    window = b""
    while True:
        more = stream.read(min(left - len(window), max(len(window), WINDOW_BYTES)))
        window += more
        ended = len(window) >= left or not more
        mark = len(UTF8_MARK) if first and window.startswith(UTF8_MARK) else 0
        text = np.frombuffer(window[mark:] + b"\n" if ended else window[mark:], np.uint8)
        quotes, lines = np.flatnonzero(text == QUOTE), np.flatnonzero(text == NEWLINE)
        ends = lines[np.searchsorted(quotes, lines) % 2 == 0] + 1  # an even number of quotes before it: outside of them
        if len(ends) or ended:
            break
        if len(window) > limit:
            return None
    if not len(ends) or (ended and len(quotes) % 2):
        return None
    behind = int(ends[-1])
    starts = np.concatenate([[0], ends[:-1]])
    if (ends - starts).max() > limit:
        return None
    text, quotes = text[:behind], quotes[: np.searchsorted(quotes, behind)]
    if not _regular(text, quotes, ord(delimiter)):
        return None
    lengths = ends - starts - 1
    empty = (lengths == 0) | ((lengths == 1) & (text[starts] == RETURN))
    # Of the file's last row the line end was added here.
    kept = np.minimum(ends[~empty] + mark, len(window))
    return min(behind + mark, len(window)), kept


def _regular(text: np.ndarray, quotes: np.ndarray, delimiter: int) -> bool:
    """Whether quotes open cells, close cells or stand for one, and nothing else; and carriage returns end lines."""
    opening, closing = quotes[0::2], quotes[1::2]
    before = text[opening[opening > 0] - 1]
    behind = text[closing + 1]
    returns = np.flatnonzero(text == RETURN)
    returns = returns[np.searchsorted(quotes, returns) % 2 == 0]
    return bool(
        ((before == delimiter) | (before == NEWLINE) | (before == QUOTE)).all()
        and ((behind == delimiter) | (behind == NEWLINE) | (behind == RETURN) | (behind == QUOTE)).all()
        and (text[returns + 1] == NEWLINE).all()
    )


def _cut_jsonl(place: Place, whole: Part, part_bytes: int) -> Iterator[Part]:
    """Parts that end at the first line end behind `part_bytes`."""
    start, first = 0, 1
    with place.open(whole.entry) as stream:
        while whole.entry.size - start > part_bytes:
            stop, row = start, first
            block = stream.read(part_bytes)
            while block:
                stop += len(block)
                row += block.count(b"\n")
                if block.endswith(b"\n"):
                    break
                block = stream.readline(BLOCK_BYTES)  # a long line is not held
            if stop >= whole.entry.size:
                break
            yield _piece(whole, start, stop, first)
            start, first = stop, row
    yield _piece(whole, start, whole.entry.size, first)


def _cut_parquet(place: Place, whole: Part, part_bytes: int) -> Iterator[Part]:
    with open_random(place, whole.entry) as stream, pq.ParquetFile(stream) as file:
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        sizes, rows = [group.total_byte_size for group in groups], [group.num_rows for group in groups]
    start, first = 0, 1
    while start < len(groups):
        stop, size = start + 1, sizes[start]
        while stop < len(groups) and size + sizes[stop] <= part_bytes:
            size += sizes[stop]
            stop += 1
        yield replace(_piece(whole, start, stop, first), bytes=size)
        first += sum(rows[start:stop])
        start = stop


def _cut_text(place: Place, whole: Part, part_bytes: int) -> Iterator[Part]:
    """Parts made of whole pieces of `text_pieces`, so that reading them gives the pieces of the whole text."""
    with place.open(whole.entry) as stream:
        start, position, first = 0, 0, 1
        for row, piece in enumerate(text_pieces(stream, 0, whole.entry.size), start=1):
            position += len(piece)
            if position - start >= part_bytes and position < whole.entry.size:
                yield _piece(whole, start, position, first)
                start, first = position, row + 1
        yield _piece(whole, start, whole.entry.size, first)


def _piece(whole: Part, start: int, stop: int, row: int) -> Part:
    return replace(whole, start=start, stop=stop, row=row, bytes=stop - start)


CUTTERS: dict[str, Callable[[Place, Part, int], Iterator[Part]]] = {
    "csv": _cut_csv,
    "jsonl": _cut_jsonl,
    "text": _cut_text,
}
