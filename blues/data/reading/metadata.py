"""Values of metadata columns as JSON.

In: cells of CSV, values of JSON, columns of Arrow. Out: what JSON can say, the same for equal input on every machine.

Times become ISO 8601, decimals their digits, durations seconds, bytes their text (base64 where they are none), numbers
that are not finite null. For a value that cannot be said there is an `Unusable` with the reason: its row is set aside.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import math
import uuid
from typing import Any

import pyarrow as pa

MOST_NESTED = 64
"""Levels of lists and objects in one value."""


class Unusable(Exception):
    """Why a value cannot be metadata."""


def jsonable(value: Any, depth: int = 0) -> Any:
    """The value as JSON would hold it.

    Raises:
        Unusable: text that is not Unicode, a type without a JSON form, or nesting beyond MOST_NESTED.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise Unusable(f"invalid text at position {error.start}") from None
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth == MOST_NESTED:
        raise Unusable(f"nested more than {MOST_NESTED} levels deep")
    if isinstance(value, dict):
        return {str(jsonable(str(key), depth + 1)): jsonable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item, depth + 1) for item in value]
    return _of_arrow(value)


def _of_arrow(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode("ascii")
    raise Unusable(f"a {type(value).__name__} has no form in JSON")


def column_values(column: pa.Array) -> list[Any]:
    """The values of an Arrow column as JSON would hold them, with an `Unusable` in the place of each that it cannot."""
    try:
        values = column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException):  # one bad value fails them all
        values = [_scalar(scalar) for scalar in column]
    return [value if isinstance(value, Unusable) else _try(value) for value in values]


def _scalar(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException) as error:
        text = scalar.cast(pa.string()).as_py() if pa.types.is_temporal(scalar.type) else "<"
        if not text.startswith("<"):  # a year that Python has not, but Arrow
            return text
        return Unusable(" ".join(str(error).split())[:200])


def _try(value: Any) -> Any:
    try:
        return jsonable(value)
    except Unusable as error:
        return error
