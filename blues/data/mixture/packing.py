"""How the documents of a dataset become windows of equal length: the family `Packing`.

In: a split of a store and a length T. Out: `Windows`, which fills the rows of a batch with inputs, targets and the
numbers of documents, and says how much it pads and cuts.

A window has T inputs and T targets. The `<|endoftext|>` before a document is its first input, as a beginning-of-text
would be; the one after it is only a target. So a document of n stored tokens, `<|endoftext|>` included, is n targets.

- `stream`: the split end to end, cut every T tokens. Nothing is padded; documents are cut wherever a window ends.
- `best_fit`: whole documents side by side (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv
  2404.10830). Only those longer than T are cut, into pieces of T; what is left of a window is padding.

Legend: n windows, m pieces of documents, T sequence length.
"""

from __future__ import annotations

import abc
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from blues import config as cfg
from blues.data.storage.store import Store

IGNORED = -100
"""The target of an input without one: padding. The model's cross-entropy leaves it out."""

Rows = NDArray[np.int64] | slice


@dataclass(frozen=True)
class Statistics:
    """What a packing makes of a split: windows of `length` tokens, documents, those cut in two or more (or by the end
    of the split), padded inputs, and tokens at the end that no window has as a target."""

    packing: str
    length: int
    windows: int
    documents: int
    truncated: int
    padding: int
    dropped: int

    @property
    def padding_share(self) -> float:
        """Padded inputs of all inputs."""
        return self.padding / max(1, self.windows * self.length)

    @property
    def truncated_share(self) -> float:
        """Documents that were cut of all documents."""
        return self.truncated / max(1, self.documents)


class Windows(abc.ABC):
    """The windows of one split of a store; made by a `Packing`."""

    num_windows: int
    padded: ClassVar[bool]
    """Whether a window may have fewer than T targets."""

    @abc.abstractmethod
    def fill(
        self,
        windows: NDArray[np.int64],
        rows: Rows,
        inputs_BT: NDArray[np.int64],
        targets_BT: NDArray[np.int64],
        documents_BT: NDArray[np.int32] | None,
    ) -> None:
        """Write these windows (int64[n]) into those rows: token ids, `IGNORED` for targets that are none, and numbers
        that are equal where two inputs belong to the same document."""

    @abc.abstractmethod
    def num_targets(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[n]: targets of each window that are not `IGNORED`."""

    @abc.abstractmethod
    def pieces(self, window: int) -> NDArray[np.int64]:
        """int64[m, 2]: where in the split the targets of a window lie, piece by piece in their order: start and end."""

    @abc.abstractmethod
    def statistics(self) -> Statistics:
        """Reads the document index of the split."""


class Packing(cfg.Configurable, family="packing"):
    """A way to cut a split into windows."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def pack(self, store: Store, split: str, length: int) -> Windows:
        """Cut a split into windows of `length` tokens, the same ones on every machine."""


class Stream(Packing, variant="stream"):
    """Windows of the stream of tokens that overlap by one, so that no target is lost (GPT-3, arXiv 2005.14165)."""

    def pack(self, store: Store, split: str, length: int) -> Windows:
        return StreamWindows(store, split, length)


class BestFit(Packing, variant="best_fit"):
    """Documents whole, by best-fit-decreasing bin packing (Ding et al. 2024, arXiv 2404.10830).

    Planned once, in O(m log m) time and 20 bytes a piece.
    """

    def pack(self, store: Store, split: str, length: int) -> Windows:
        return BestFitWindows(store, split, length)


class StreamWindows(Windows):
    """Window w reads tokens [w T, w T + T] of the split."""

    padded = False

    def __init__(self, store: Store, split: str, length: int) -> None:
        self.store, self.split, self.length = store, split, length
        self.num_windows = max(0, store.num_tokens(split) - 1) // length
        self._eot = store.manifest["tokenizer"]["eot_id"]

    def fill(
        self,
        windows: NDArray[np.int64],
        rows: Rows,
        inputs_BT: NDArray[np.int64],
        targets_BT: NDArray[np.int64],
        documents_BT: NDArray[np.int32] | None,
    ) -> None:
        tokens = self.store.read_windows(self.split, windows * self.length, self.length + 1)
        inputs_BT[rows], targets_BT[rows] = tokens[:, :-1], tokens[:, 1:]
        if documents_BT is not None:
            documents_BT[rows] = np.cumsum(tokens[:, :-1] == self._eot, axis=1, dtype=np.int32)

    def num_targets(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full(len(windows), self.length, dtype=np.int64)

    def pieces(self, window: int) -> NDArray[np.int64]:
        return np.array([[window * self.length + 1, (window + 1) * self.length + 1]])

    def statistics(self) -> Statistics:
        ends = self.store.document_ends(self.split)
        # Target p is in window (p - 1) // T; token 0 is no target. The last "window" is the rest that is dropped.
        first = (np.maximum(np.concatenate(([0], ends))[:-1], 1) - 1) // self.length
        last = (ends - 2) // self.length
        return Statistics(
            packing="stream",
            length=self.length,
            windows=self.num_windows,
            documents=len(ends),
            truncated=int((first < last).sum()),
            padding=0,
            dropped=max(0, self.store.num_tokens(self.split) - 1 - self.num_windows * self.length),
        )


class BestFitWindows(Windows):
    """Window w holds pieces `_offsets[w]` to `_offsets[w + 1]`, in the order of the split, then padding."""

    padded = True

    def __init__(self, store: Store, split: str, length: int) -> None:
        self.store, self.split, self.length = store, split, length
        self._eot = store.manifest["tokenizer"]["eot_id"]
        ends = store.document_ends(split)
        self._documents = len(ends)
        self._truncated = int((np.diff(ends, prepend=0) > length).sum())
        starts, sizes = cut_documents(ends, length)
        bins = best_fit_decreasing(sizes, length)
        order = np.argsort(bins, kind="stable")
        self._starts, self._sizes = starts[order], sizes[order]
        self._offsets = np.concatenate(([0], np.cumsum(np.bincount(bins), dtype=np.int64)))
        self._filled = np.bincount(bins, weights=sizes).astype(np.int32)
        self.num_windows = len(self._filled)

    def fill(
        self,
        windows: NDArray[np.int64],
        rows: Rows,
        inputs_BT: NDArray[np.int64],
        targets_BT: NDArray[np.int64],
        documents_BT: NDArray[np.int32] | None,
    ) -> None:
        inputs_BT[rows], targets_BT[rows] = self._eot, IGNORED
        if documents_BT is not None:
            counts = self._offsets[windows + 1] - self._offsets[windows]
            documents_BT[rows] = counts[:, None]  # the number of the padding, after those of the pieces
        places = np.arange(len(inputs_BT))[rows]
        pieces, window_of, number_of, column_of = self._layout(windows)
        row_of = places[window_of].tolist()
        numbers, columns, sizes = number_of.tolist(), column_of.tolist(), self._sizes[pieces].tolist()
        for piece, tokens, before in self._read(pieces):
            row, column, size = row_of[piece], columns[piece], sizes[piece]
            targets_BT[row, column : column + size] = tokens[:size]
            inputs_BT[row, column] = before
            inputs_BT[row, column + 1 : column + size] = tokens[: size - 1]
            if documents_BT is not None:
                documents_BT[row, column : column + size] = numbers[piece]

    def num_targets(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._filled[windows].astype(np.int64)

    def pieces(self, window: int) -> NDArray[np.int64]:
        own = slice(self._offsets[window], self._offsets[window + 1])
        return np.stack([self._starts[own], self._starts[own] + self._sizes[own]], axis=1)

    def statistics(self) -> Statistics:
        return Statistics(
            packing="best_fit",
            length=self.length,
            windows=self.num_windows,
            documents=self._documents,
            truncated=self._truncated,
            padding=self.num_windows * self.length - self.store.num_tokens(self.split),
            dropped=0,
        )

    def _layout(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """The pieces of these windows one after the other; of each its window, its number there and its column."""
        firsts = self._offsets[windows]
        counts = self._offsets[windows + 1] - firsts
        window_of = np.repeat(np.arange(len(windows)), counts)
        number_of = np.arange(len(window_of)) - (np.cumsum(counts) - counts)[window_of]
        pieces = firsts[window_of] + number_of
        before = np.cumsum(self._sizes[pieces], dtype=np.int64) - self._sizes[pieces]
        filled = self._filled[windows].astype(np.int64)
        return pieces, window_of, number_of, before - (np.cumsum(filled) - filled)[window_of]

    def _read(self, pieces: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint32], int]]:
        """Of each piece, in any order: its place in `pieces`, its tokens (and some more), and the token before it.

        Lengths are rounded up to powers of two, so that a batch takes a dozen reads however many pieces it has.
        """
        total = self.store.num_tokens(self.split)
        starts, lengths = self._starts[pieces] - 1, self._sizes[pieces].astype(np.int64) + 1
        spans = np.minimum(1 << np.ceil(np.log2(lengths)).astype(np.int64), total)
        for span in np.unique(spans).tolist():
            chosen = np.flatnonzero(spans == span)
            begins = np.clip(starts[chosen], 0, total - span)
            offsets = starts[chosen] - begins
            block = self.store.read_windows(self.split, begins, span)
            for piece, tokens, offset in zip(chosen.tolist(), block, offsets.tolist(), strict=True):
                # Before the first token of all stands no `<|endoftext|>`; a window begins with one there too.
                yield piece, tokens[offset + 1 :], int(tokens[offset]) if offset >= 0 else self._eot


def cut_documents(ends: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Documents that end there as pieces of at most `length` tokens: their starts int64[m] and sizes int32[m]."""
    begins = np.concatenate(([0], ends))[:-1]
    counts = -(-(ends - begins) // length)
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + numbers * length
    return starts, np.minimum(length, np.repeat(ends, counts) - starts).astype(np.int32)


def best_fit_decreasing(sizes: NDArray[np.int32], capacity: int) -> NDArray[np.int64]:
    """The bin of each piece, int64[m]: the longest first, each into the fullest bin that still has room for it.

    Pieces of equal size come in order, and of bins with equal room the one that has had it longest is taken. Pieces of
    one size are placed together, as many at a time as there are bins of one room: O(capacity^2) steps at most, and
    never more than pieces, after sorting. `best_fit_naive` is the definition.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), dtype=np.int64)
    waiting: dict[int, deque[NDArray[np.int64]]] = {}  # bins by their room
    rooms: list[int] = []  # those with bins, rising

    def put(room: int, some: NDArray[np.int64]) -> None:
        if room == 0 or not len(some):
            return
        if room not in waiting:
            waiting[room] = deque()
            insort(rooms, room)
        waiting[room].append(some)

    made = place = 0
    for size, count in _runs(sizes[order]):
        stop = place + count
        while place < stop:
            found = bisect_left(rooms, size)
            room = rooms[found] if found < len(rooms) else capacity
            each = room // size
            wanted = -(-(stop - place) // each)
            if found < len(rooms):
                some = waiting[room].popleft()
                if len(some) > wanted:
                    waiting[room].appendleft(some[wanted:])
                elif not waiting[room]:
                    del waiting[room], rooms[found]
                some = some[:wanted]
            else:
                some, made = np.arange(made, made + wanted), made + wanted
            placed = min(stop - place, len(some) * each)
            bins[order[place : place + placed]] = np.repeat(some, each)[:placed]
            whole, rest = divmod(placed, each)
            put(room - each * size, some[:whole])
            put(room - rest * size, some[whole : whole + 1])
            place += placed
    return bins


def best_fit_naive(sizes: NDArray[np.int32], capacity: int) -> NDArray[np.int64]:
    """The reference for `best_fit_decreasing`: one piece at a time."""
    bins = np.empty(len(sizes), dtype=np.int64)
    waiting: dict[int, deque[int]] = {}
    made = 0
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        size = int(sizes[piece])
        room = min((room for room, some in waiting.items() if some and room >= size), default=None)
        if room is None:
            room, bin, made = capacity, made, made + 1
        else:
            bin = waiting[room].popleft()
        bins[piece] = bin
        waiting.setdefault(room - size, deque()).append(bin)
    return bins


def _runs(values: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """(value, how many) of each run of equal values."""
    borders = np.flatnonzero(np.diff(values)) + 1
    starts = np.concatenate(([0], borders, [len(values)]))
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if stop > start:
            yield int(values[start]), stop - start


def packing_statistics(store: Store, split: str, length: int) -> list[Statistics]:
    """What each packing would make of a split."""
    return [
        kind.Config().build().pack(store, split, length).statistics() for _, kind in sorted(Packing.variants.items())
    ]
