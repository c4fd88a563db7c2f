"""Arrays made and read without pandas are those that pyarrow's own ways give."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hyp

from blues.data.storage.arrays import flags, of_flags, positions, strings, whole, whole_numbers

LAW = settings(max_examples=60, deadline=None)
texts = hyp.lists(hyp.text(hyp.characters(exclude_categories=["Cs"]), max_size=6), max_size=20)


@LAW
@given(values=texts)
def test_strings(values):
    assert strings(values).equals(pa.array(values, pa.string()))


def test_a_string_that_is_no_unicode_is_refused():
    with pytest.raises(UnicodeEncodeError):
        strings(["a", "\udc80"])


@LAW
@given(values=hyp.lists(hyp.integers(0, 2**64 - 1), max_size=20))
def test_whole_numbers(values):
    assert whole_numbers(np.array(values, dtype=np.uint64), pa.uint64()).equals(pa.array(values, pa.uint64()))
    small = [value % 1000 for value in values]
    assert whole_numbers(np.array(small, dtype=np.int64)[::-1], pa.int32()).to_pylist() == small[::-1]


@LAW
@given(values=hyp.lists(hyp.booleans(), max_size=40), start=hyp.integers(0, 40))
def test_flags(values, start):
    made = flags(np.array(values, dtype=bool))
    assert made.equals(pa.array(values, pa.bool_()))
    assert of_flags(made.slice(start)).tolist() == values[start:]
    assert of_flags(pa.chunked_array([made, made], pa.bool_())).tolist() == values + values


@LAW
@given(values=texts, among=texts.map(lambda found: list(dict.fromkeys(found))))
def test_positions(values, among):
    expected = [among.index(value) if value in among else -1 for value in values]
    for one, other in ((strings(values), strings(among)), (chunked(values), chunked(among))):
        assert positions(one, other).tolist() == expected


def chunked(values: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([strings(values[:2]), strings(values[2:])])


def test_no_pieces_are_an_empty_array():
    assert whole(pa.chunked_array([], pa.string())).equals(strings([]))


def test_none_of_it_imports_pandas():
    program = (
        "import sys, numpy as np, pyarrow as pa\n"
        "from blues.data.storage.arrays import *\n"
        "names = strings(['a', 'b'])\n"
        "positions(names.filter(flags(np.array([True, False]))), names)\n"
        "of_flags(flags(np.array([True])))\n"
        "whole_numbers(np.arange(3), pa.int64())\n"
        "whole(pa.chunked_array([], pa.int64()))\n"
        "sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
