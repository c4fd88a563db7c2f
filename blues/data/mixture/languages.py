"""The language of every token: the metadata `language` of its document, as a number.

In: the stores of a dataset. Out: the languages' names, and the numbers of any windows.

Source code has the language of its file's suffix; documents of a table have one if the table has such a column that was
kept (`--metadata-columns language`). An input is of the document of its target, so the `<|endoftext|>` before a
document is of that document's language.

Legend: n windows, T sequence length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from blues.data.mixture.packing import Windows
from blues.data.storage.store import SPLITS, Store
from blues.errors import DataError

KEY = "language"
UNKNOWN = "unknown"


class Languages:
    """The languages of one split. `names[0]` is `unknown`; the others are numbered from 1 by their names' order among
    all splits and sources of the dataset, so that both splits have the same numbers."""

    def __init__(self, stores: Sequence[Store], split: str) -> None:
        """Reads the document indexes, which takes seconds for a million documents.

        Raises:
            DataError: no document of the dataset has a language.
        """
        found = {
            (number, part): [_languages(table) for table in store.tables(part, ["metadata"])]
            for number, store in enumerate(stores)
            for part in SPLITS
        }
        known = {name for tables in found.values() for names in tables for name in names if name}
        if not known:
            raise DataError(
                f"data.languages=true, and no document of {str(stores[0].path)!r} has the metadata {KEY!r}; prepare it "
                f"from source code or from tables with such a column (--metadata-columns {KEY}), or leave it false"
            )
        self.names = (UNKNOWN, *sorted(known))
        number_of = {name: number for number, name in enumerate(self.names)} | {"": 0}
        self._ends = [store.document_ends(split) for store in stores]
        self._numbers = [
            np.array([number_of[name] for names in found[number, split] for name in names], dtype=np.int32)
            for number in range(len(stores))
        ]

    def read(self, source: int, windows: NDArray[np.int64], plan: Windows, length: int) -> NDArray[np.int64]:
        """int64[n, T]: the numbers of the languages of these windows of a source, 0 for padding. `plan`: where they
        lie."""
        languages_nT = np.zeros((len(windows), length), dtype=np.int64)
        for row, window in enumerate(windows.tolist()):
            pieces = plan.pieces(window)
            sizes = pieces[:, 1] - pieces[:, 0]
            positions = np.arange(sizes.sum()) + np.repeat(pieces[:, 0] - (np.cumsum(sizes) - sizes), sizes)
            documents = np.searchsorted(self._ends[source], positions, side="right")
            languages_nT[row, : len(positions)] = self._numbers[source][documents]
        return languages_nT


def _languages(table: pa.Table) -> list[str]:
    """Of every document of an index; "" for none."""
    column = table["metadata"].combine_chunks().dictionary_encode()
    names = [_language(text) for text in column.dictionary.to_pylist()]
    return [names[number] for number in column.indices.to_pylist()]


def _language(metadata: str) -> str:
    language = json.loads(metadata).get(KEY)
    return language if isinstance(language, str) else ""
