"""Columns of a table stand under one another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blues.table import align

cells = st.text("ab 1", min_size=1, max_size=6).map(str.strip).filter(bool)


def test_the_first_column_stands_left_and_numbers_right():
    assert align([("source", "tokens"), ("a", "1,234"), ("longer name", "7")]) == [
        "source       tokens",
        "a             1,234",
        "longer name       7",
    ]


def test_no_line_ends_in_blanks_and_one_row_needs_no_padding():
    assert align([("name", ""), ("n", "")]) == ["name", "n"]
    assert align([("a", "b", "c")]) == ["a  b  c"]


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[cells] * width), min_size=1, max_size=6)))
def test_every_cell_ends_or_starts_where_its_column_does(rows):
    lines = align(rows)
    assert len(lines) == len(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for line, row in zip(lines, rows, strict=True):
        padded, start = line.ljust(sum(widths) + 2 * len(widths)), 0
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            field = padded[start : start + width]
            assert field == (cell.rjust(width) if column else cell.ljust(width))
            start += width + 2


def test_rows_of_unequal_length_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="zip"):
        align([("a", "b"), ("c",)])
