"""Large files cut between two rows, so that several processes can share them.

In: a `Part` that is a whole file. Out: parts of about `part_bytes` that give, end to end, exactly the records of the
whole: CSV by reading its quotes, JSON Lines at line ends, Parquet at row groups, text at the ends of its pieces.
Compressed files and files in another encoding than UTF-8 cannot be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from blues.data.places import Place
from blues.data.readers import CsvRows, Part, csv_delimiter, text_pieces
from blues.data.streams import BLOCK_BYTES, UTF8, compression_of, open_random, open_stream
from blues.errors import DataError


def cut(place: Place, whole: Part, part_bytes: int, above: int) -> list[Part]:
    """The parts of a file, in order; the file itself if it is not larger than `above` or cannot be cut.

    Raises:
        DataError: it vanished, changed since it was planned, or cannot be read.
    """
    try:
        if whole.kind == "parquet":
            parts = list(_cut_parquet(place, whole, part_bytes)) if whole.entry.seeks else [whole]
        elif whole.kind not in CUTTERS or whole.entry.size <= above or not _is_plain(place, whole):
            return [whole]
        else:
            parts = list(CUTTERS[whole.kind](place, whole, part_bytes))
        place.check(whole.entry)
        return parts
    except pa.ArrowException as error:
        place.check(whole.entry)
        raise DataError(f"{place.where(whole.file)} is damaged: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise DataError(f"cannot read {place.where(whole.file)}: {error.strerror or error}") from None


def _is_plain(place: Place, whole: Part) -> bool:
    """Whether a byte of the file is a byte of its text, so that a part can start at it."""
    if compression_of(whole.file) is not None or not whole.entry.seeks:
        return False
    stream, encoding = open_stream(place, whole.entry, whole.encoding)
    stream.close()
    return encoding == UTF8


def _cut_csv(place: Place, whole: Part, part_bytes: int) -> Iterator[Part]:
    """Parts that end between two rows. The whole file is read for its quotes."""
    with place.open(whole.entry) as stream:
        rows = CsvRows(stream, csv_delimiter(whole.file))
        values = iter(rows)
        next(values, None)  # the header
        start, first = 0, 1
        for row, _ in enumerate(values, start=1):
            if rows.position - start >= part_bytes and rows.position < whole.entry.size:
                yield _piece(whole, start, rows.position, first)
                start, first = rows.position, row + 1
        yield _piece(whole, start, whole.entry.size, first)


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
