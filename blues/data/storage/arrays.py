"""Arrow arrays from lists and numpy arrays and back, without the detour that imports pandas (a quarter of a second).

In: strings, whole numbers, flags. Out: `pa.Array`s that share their memory where they can, and numpy arrays of them.

`pa.array`, `pa.scalar`, `to_numpy` and comparisons with a Python value look whether they were given something of
pandas, and import it to know. What is here does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Strings(Sequence[str]):
    """The strings of an array as a Python sequence, each without its first `skip` characters, made when asked for."""

    def __init__(self, array: pa.Array, skip: int = 0) -> None:
        self.array, self.skip = array, skip

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Strings: ...
    def __getitem__(self, number: int | slice) -> str | Strings:
        if isinstance(number, slice):
            return Strings(self.array[number], self.skip)
        return self.array[number].as_py()[self.skip :]


def strings(values: Sequence[str]) -> pa.Array:
    """`pa.array(values, pa.string())`.

    Raises:
        UnicodeEncodeError: a string is no Unicode.
        pa.ArrowInvalid: they are more than 2 GiB.
    """
    if isinstance(values, Strings) and not values.skip:
        return values.array
    encoded = [value.encode() for value in values]
    ends = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=ends[1:])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(values), buffers).cast(pa.string())


def whole_numbers(values: np.ndarray, type: pa.DataType) -> pa.Array:
    """`pa.array(values, type)`: the numbers of an array that has that type."""
    values = np.ascontiguousarray(values, dtype=np.dtype(str(type)))
    return pa.Array.from_buffers(type, len(values), [None, pa.py_buffer(values)])


def flags(values: np.ndarray) -> pa.Array:
    """`pa.array(values, pa.bool_())`, what `filter` takes: bool[n]."""
    return pa.Array.from_buffers(
        pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little").tobytes())]
    )


def of_flags(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Flags, none of them null, as bool[n]."""
    return np.from_dlpack(whole(values.cast(pa.uint8()))).astype(np.bool_)


def positions(values: pa.Array | pa.ChunkedArray, among: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Where each value is in `among`, whose values are all different; -1 if it is not there: int32[n]."""
    absent = whole_numbers(np.array([-1]), pa.int32())[0]
    return np.from_dlpack(whole(pc.fill_null(pc.index_in(values, value_set=whole(among)), absent)))


def whole(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The values in one piece."""
    if isinstance(values, pa.Array):
        return values
    return values.combine_chunks() if values.num_chunks else pa.nulls(0, values.type)
