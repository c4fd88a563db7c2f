"""The documents of one dataset or several, numbered in one order, read and sketched in runs.

In: stores. Out: `Corpus`, where every document has a number, the smaller the better its right to stay when another one
repeats it; and `Run`, neighbouring documents whose signatures are made in one go, by any process.

Shapes: N documents of the corpus; D of a shelf or run; T tokens of a block; B bands; P places of a signature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from blues.data.dedup import minhash
from blues.data.dedup.minhash import Settings
from blues.data.storage.store import Store

PRECEDENCE = ("validation", "train")
"""Whose documents stay rather than the other's."""
BLOCK_TOKENS = 1 << 18
"""Tokens hashed at a time; the working set stays in the cache of a core."""
_NO_DOCUMENTS = pa.schema([("length", pa.int64()), ("digest", pa.uint64())]).empty_table()

Read = Callable[[int, int], np.ndarray]
"""Tokens `[start, stop)` of a shelf as uint32."""


@dataclass(frozen=True)
class Shelf:
    """The documents of one split of one dataset.

    ends_D: int64, exclusive end of each in tokens, its `<|endoftext|>` included; digests_D: uint64, equal for equal
    tokens.
    """

    dataset: int
    split: str
    ends_D: np.ndarray
    digests_D: np.ndarray
    read: Read


class Corpus:
    """Shelves end to end: documents numbered from 0 in the order of their right to stay."""

    def __init__(self, shelves: Sequence[Shelf]) -> None:
        self.shelves = tuple(shelves)
        self.starts = np.cumsum([0, *(len(shelf.ends_D) for shelf in shelves)], dtype=np.int64)
        self.digests_N = np.concatenate([np.empty(0, np.uint64), *(shelf.digests_D for shelf in shelves)])
        lengths = (np.diff(shelf.ends_D, prepend=0) for shelf in shelves)
        self.lengths_N = np.concatenate([np.empty(0, np.int64), *lengths])
        """Tokens of each document, its `<|endoftext|>` included."""

    @classmethod
    def of(cls, stores: Sequence[Store]) -> Corpus:
        """The documents of these datasets: all validation documents, then all training documents."""
        shelves = []
        for split in PRECEDENCE:
            for dataset, store in enumerate(stores):
                columns = pa.concat_tables([_NO_DOCUMENTS, *store.tables(split, _NO_DOCUMENTS.column_names)])
                ends_D = np.cumsum(columns["length"].to_numpy(), dtype=np.int64)
                read = functools.partial(store.read, split)
                shelves.append(Shelf(dataset, split, ends_D, columns["digest"].to_numpy(), read))
        return cls(shelves)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shelf_of(self, numbers: np.ndarray) -> np.ndarray:
        """Which shelf each of these documents stands on."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def dataset_of(self, numbers: np.ndarray) -> np.ndarray:
        """Which dataset each of these documents is of."""
        return np.array([shelf.dataset for shelf in self.shelves], dtype=np.int64)[self.shelf_of(numbers)]

    def tokens(self, number: int) -> np.ndarray:
        """A document without its `<|endoftext|>`: uint32[n]."""
        place = int(np.searchsorted(self.starts, number, side="right")) - 1
        shelf, end = self.shelves[place], int(self.shelves[place].ends_D[number - self.starts[place]])
        return shelf.read(end - int(self.lengths_N[number]), end - 1)

    def runs(self, tokens: int) -> list[Run]:
        """All documents in order, cut into runs of about this many tokens (one document at least)."""
        runs = []
        for first_number, shelf in zip(self.starts.tolist(), self.shelves, strict=False):
            first, begin = 0, 0
            while first < len(shelf.ends_D):
                last = max(first + 1, int(np.searchsorted(shelf.ends_D, begin + tokens, side="right")))
                runs.append(Run(first_number + first, shelf.dataset, shelf.split, begin, shelf.ends_D[first:last]))
                first, begin = last, int(shelf.ends_D[last - 1])
        return runs


@dataclass(frozen=True)
class Run:
    """Neighbouring documents of a shelf, which are sketched in one go.

    number: of the first, in the corpus. begin: its first token; ends_D: int64, exclusive end of each, in the shelf.
    """

    number: int
    dataset: int
    split: str
    begin: int
    ends_D: np.ndarray

    def blocks(self, read: Read) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The documents about BLOCK_TOKENS at a time, without their `<|endoftext|>`: uint32[T], int64[D] their ends."""
        first, begin = 0, self.begin
        while first < len(self.ends_D):
            last = max(first + 1, int(np.searchsorted(self.ends_D, begin + BLOCK_TOKENS, side="right")))
            ends_D = self.ends_D[first:last] - begin
            tokens_T = np.delete(read(begin, begin + int(ends_D[-1])), ends_D - 1)
            yield tokens_T, ends_D - np.arange(1, len(ends_D) + 1)
            first, begin = last, int(self.ends_D[last - 1])

    def sketch(self, read: Read, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
        """Band keys uint64[B, D] and marks uint8[D, P] of the documents. read: that of the shelf."""
        keys, marks = [], []
        for tokens_T, ends_D in self.blocks(read):
            signatures_DP = minhash.signatures(tokens_T, ends_D, settings.ngram, settings.permutations)
            keys.append(minhash.band_keys(signatures_DP, settings.bands))
            marks.append(minhash.marks(signatures_DP))
        return np.concatenate(keys, axis=1), np.concatenate(marks)
