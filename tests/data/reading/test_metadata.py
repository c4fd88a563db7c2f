"""Metadata is JSON whatever the column held; a value that cannot be said is told, not changed."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.data.reading.metadata import MOST_NESTED, Unusable, column_values, jsonable

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(value=values)
def test_what_came_from_json_is_kept(value):
    try:
        found = jsonable(value)
    except Unusable:
        with pytest.raises(UnicodeEncodeError):  # a lone surrogate, which JSON can escape and UTF-8 cannot hold
            json.dumps(value, ensure_ascii=False).encode()
        return
    assert json.loads(json.dumps(found, allow_nan=False, ensure_ascii=False).encode()) == found
    assert found == _without_odd_floats(value)


def _without_odd_floats(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_odd_floats(item) for key, item in value.items()}
    return [_without_odd_floats(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (datetime.datetime(2026, 1, 2, 3, 4, 5, 6), "2026-01-02T03:04:05.000006"),
        (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "2026-01-02T00:00:00+00:00"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(seconds=90), 90.0),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("ünï".encode(), "ünï"),
        (b"\xff\xfe", "//4="),
        ({"a": [b"x", None, (1, 2)]}, {"a": ["x", None, [1, 2]]}),
        (float("nan"), None),
        (-math.inf, None),
        (2**80, 2**80),
    ],
)
def test_forms(value, said):
    assert jsonable(value) == said


def test_what_cannot_be_said():
    with pytest.raises(Unusable, match="invalid text at position 1"):
        jsonable({"a": ["x\ud800"]})
    with pytest.raises(Unusable, match="invalid text"):
        jsonable({"\ud800": 1})
    with pytest.raises(Unusable, match="a object has no form in JSON"):
        jsonable([object()])
    deep: list = []
    for _ in range(MOST_NESTED + 1):
        deep = [deep]
    with pytest.raises(Unusable, match=f"nested more than {MOST_NESTED} levels"):
        jsonable(deep)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (pa.array([1, None], pa.int8()), [1, None]),
        (pa.array([1, None], pa.timestamp("ns", "UTC")), ["1970-01-01T00:00:00.000000001+00:00", None]),
        (pa.array([10**17], pa.timestamp("us")), ["5138-11-16T09:46:40"]),
        (pa.array([3 * 10**17, None], pa.timestamp("us")), ["11476-08-15 05:20:00.000000", None]),
        (pa.array([10**9], pa.duration("ns")), [1.0]),
        (pa.array([decimal.Decimal("1.50")], pa.decimal128(5, 2)), ["1.50"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())), [[["k", 1]]]),
        (pa.array([{"a": 1, "b": [b"x"]}]), [{"a": 1, "b": ["x"]}]),
        (pa.array([b"x", b"\xff"]), ["x", "/w=="]),
        (pa.array([True, None]), [True, None]),
        (pa.array([1.5, math.nan]), [1.5, None]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_columns(array, said):
    assert column_values(array) == said
    json.dumps(said)


def test_one_bad_value_leaves_the_others():
    raw = pa.array([b"good", b"\xff", b"fine", None]).view(pa.string())
    first, bad, third, none = column_values(raw)
    assert (first, third, none) == ("good", "fine", None) and isinstance(bad, Unusable)
    assert isinstance(column_values(pa.array([10**18], pa.timestamp("us")))[0], Unusable)
    nested = pa.StructArray.from_arrays([raw], ["s"])
    first, bad, third, none = column_values(nested)
    assert (first, third, none) == ({"s": "good"}, {"s": "fine"}, {"s": None}) and isinstance(bad, Unusable)
