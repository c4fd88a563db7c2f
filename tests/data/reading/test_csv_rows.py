"""Rows of CSV are those of a plain reference, however quotes are scattered, and in bounded memory."""

from __future__ import annotations

import csv
import io
import random
import resource
from collections import deque
from pathlib import Path

import pytest

from blues.data.reading import csv_rows, streams
from blues.data.reading.csv_rows import CsvRows, csv_delimiter, csv_header


class PlainCsvRows:
    """The reference for CsvRows: it holds every line of a row as an object."""

    def __init__(self, stream: io.BufferedReader, limit: int) -> None:
        self.position, self.limit = 0, limit
        self.lines, self.again = csv_rows._numbered(streams.Lines(stream, limit=limit)), deque()
        self.row: list[tuple[bytes, int]] = []

    def __iter__(self):
        reader = self._reader()
        while True:
            self.row = []
            try:
                value = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                value = error
                first, *rest = self.row
                self.again.extendleft(reversed(rest))
                self.row, reader = [first], self._reader()
            self.position = self.row[-1][1]
            if value:
                yield value

    def _reader(self):
        return csv.reader(self._feed(), strict=True)

    def _feed(self):
        while (line := self.again.popleft() if self.again else next(self.lines, None)) is not None:
            self.row.append(line)
            if line[0] == csv_rows.TOO_LONG or sum(len(text) for text, _ in self.row) > self.limit:
                raise csv_rows.RowTooLong
            yield line[0].decode("utf-8", "surrogateescape")


PIECES = ['"', '""', '"a,\n"', ",", "\n", "\r\n", "\r", "a", "é", "\n\n", "x\n", "y,z\n", '"b""c"', "\0", "\ufeff"]


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_csv_are_those_of_the_plain_reference(seed):
    """Also where rows and resynchronisation span thousands of lines."""
    generator = random.Random(seed)
    limit = generator.choice([50, 9000, 30_000])
    weights = [generator.random() ** 3 for _ in PIECES]
    for length in [*(generator.randrange(40) for _ in range(40)), 10_000]:
        if length == 10_000:  # quotes are rare, so what they open is long
            weights = [weight / (300 if '"' in piece else 1) for piece, weight in zip(PIECES, weights, strict=True)]
        content = "".join(generator.choices(PIECES, weights, k=length)).encode()
        found = []
        for kind in (CsvRows, PlainCsvRows):
            stream = io.BufferedReader(io.BytesIO(content))
            rows = CsvRows(stream, ",", limit=limit) if kind is CsvRows else PlainCsvRows(stream, limit)
            found.append([(type(row) if isinstance(row, Exception) else row, rows.position) for row in rows])
        assert found[0] == found[1]


@pytest.mark.slow
def test_a_quote_that_is_never_closed_holds_bytes_and_not_lines(tmp_path: Path):
    """The row that it opens goes on until the longest text that may be, here eight million lines of two bytes."""
    (tmp_path / "t.csv").write_bytes(b'text\n"' + b"a\n" * 9_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(tmp_path / "t.csv", "rb") as stream:
        rows = iter(CsvRows(stream, ",", limit=16 << 20))
        assert next(rows) == ["text"] and isinstance(next(rows), csv.Error) and next(rows) == ["a"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10, "KiB; as objects it was 1.5 GB"


@pytest.mark.parametrize(("file", "delimiter"), [("a.csv", ","), ("a.TSV", "\t"), ("a.tsv.gz", "\t"), ("tsv", ",")])
def test_delimiters(file, delimiter):
    assert csv_delimiter(file) == delimiter


@pytest.mark.parametrize(
    ("rows", "header"),
    [
        ([["a", "b"], ["1", "2"]], ["a", "b"]),
        ([], None),
        ([csv.Error("bad")], None),
        ([["a\0"]], None),
        ([["caf\udce9"]], None),
        ([["", ""]], None),
    ],
)
def test_headers(rows, header):
    assert csv_header(iter(rows)) == header
