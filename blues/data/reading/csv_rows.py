"""Rows of CSV files, read so that a bad row costs its own line and nothing else.

In: a stream of UTF-8. Out: lists of cells, and the errors that stand for rows that are none.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from blues.data.reading.streams import MAX_DOCUMENT_BYTES, UTF8_MARK, Lines, LineTooLong, longer_than

TOO_LONG = b"\n\n"
"""Stands for a line that is longer than a row may be; no line has two ends."""


class RowTooLong(csv.Error):
    """A row longer than a document may be, or what a quote that is never closed makes of the lines behind it."""


class CsvRows:
    """Rows of a CSV stream: lists of cells, or the `csv.Error` that stands for a bad one.

    `position` is the byte behind the last row, so that a new `CsvRows` started there goes on with the next one. Bytes
    that are not UTF-8 come through as surrogates, for `clean_text` to find. A bad row, such as one with a quote that is
    never closed, costs the line it began on: reading goes on at the next line. So does one
    of more than `limit` bytes.
    """

    def __init__(self, stream: BinaryIO, delimiter: str, start: int = 0, limit: int = MAX_DOCUMENT_BYTES) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), limit + 1))  # of the process; `_feed` keeps to our own
        self.position, self._delimiter, self._limit = start, delimiter, limit
        self._lines = _numbered(Lines(stream, start, limit))
        self._held = _HeldLines()
        # Of the row that is being read: whether it has begun, where its first line and its last line so far end in the
        # file, and where its second line is held.
        self._begun, self._first_end, self._last_end, self._second = False, start, start, 0

    def __iter__(self) -> Iterator[list[str] | Exception]:
        reader = self._reader()
        while True:
            self._begun = False
            value: list[str] | Exception
            try:
                value = next(reader)
                self.position = self._last_end
                if self._held.count:
                    self._held.forget()
            except StopIteration:
                return
            except csv.Error as error:
                value = error
                self.position = self._first_end
                self._held.next = self._second
                reader = self._reader()
            if value:
                yield value

    def _reader(self) -> Iterator[list[str]]:
        # Strict: a stray quote is an error of its row, not a different reading of the rest of the file.
        return csv.reader(self._feed(), delimiter=self._delimiter, strict=True)

    def _feed(self) -> Iterator[str]:
        held, size = self._held, 0
        while True:
            fresh = held.next == held.count
            taken = next(self._lines, None) if fresh else held.take()
            if taken is None:
                return
            line, self._last_end = taken
            if not self._begun:
                self._begun, self._first_end, self._second = True, self._last_end, held.next
                size = 0
            elif fresh:
                held.add(line, self._last_end)
            size += len(line)
            if line == TOO_LONG or size > self._limit:
                raise RowTooLong(f"{longer_than(self._limit)}, or close a quote that is open")
            yield line.decode("utf-8", "surrogateescape")


class _HeldLines:
    """Lines that may have to be read again: `count` of them, `next` has been read. They lie end to end in one buffer,
    because a quote that is never closed can make a row of millions of short ones."""

    def __init__(self) -> None:
        self._text, self._ends, self._positions = bytearray(), array("q"), array("q")
        self.next = self.count = 0

    def add(self, line: bytes, position: int) -> None:
        """Hold a line that has just been read, and ends at `position` in the file."""
        self._text += line
        self._ends.append(len(self._text))
        self._positions.append(position)
        self.count += 1
        self.next = self.count

    def take(self) -> tuple[bytes, int]:
        """The next line and where it ends in the file."""
        start = self._ends[self.next - 1] if self.next else 0
        self.next += 1
        return bytes(self._text[start : self._ends[self.next - 1]]), self._positions[self.next - 1]

    def forget(self) -> None:
        """Drop the lines that have been read, as soon as it is worth moving the others."""
        if self.next == self.count:
            self._text, self._ends, self._positions = bytearray(), array("q"), array("q")
        elif self.next >= 4096 and 2 * self.next >= self.count:
            start = self._ends[self.next - 1]
            del self._text[:start]
            self._ends = array("q", (end - start for end in self._ends[self.next :]))
            del self._positions[: self.next]
        else:
            return
        self.next, self.count = 0, len(self._ends)


def _numbered(lines: Lines) -> Iterator[tuple[bytes, int]]:
    """Each line and the byte behind it; TOO_LONG in the place of an over-long one."""
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except LineTooLong:
            line = TOO_LONG
        yield line.removeprefix(UTF8_MARK) if lines.position == len(line) else line, lines.position


def csv_delimiter(file: str) -> str:
    """Tab for .tsv files, comma otherwise."""
    return "\t" if ".tsv" in Path(file.lower()).suffixes else ","


def csv_header(rows: Iterator[list[str] | Exception]) -> list[str] | None:
    """The first row as column names; None for a file without a usable one, such as one in another encoding."""
    first = next(rows, None)
    if first is None or isinstance(first, Exception):
        return None
    try:
        return None if any("\0" in name for name in first) or not "".join(first).encode("utf-8") else first
    except UnicodeEncodeError:
        return None
