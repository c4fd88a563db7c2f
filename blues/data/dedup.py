"""Find the documents that repeat another: exactly, or nearly (MinHash LSH by token n-grams), in one dataset or several.

In: a `Corpus`, the documents of one or several datasets in the order of their right to stay. Out: `Removal`, which
documents go, which one stays for each, why, and how similar they are.

Documents are joined into groups, and of each group the first stays. Validation documents come before all training
documents, so a training document that repeats a validation document goes, whichever dataset it is of (decontamination);
then the order of the datasets counts, then that of the documents.

1. Exact: equal digests propose, the tokens themselves decide.
2. Near: of each band, the documents with equal keys are candidates (`blues.data.minhash`). A pair whose marks say that
   it may be similar enough is read, and the exact Jaccard index of its shingles decides: no pair is joined by chance.

The work stays linear where a bucket of equal keys is large: copies were joined before, pairs that are joined already or
were decided in an earlier band are passed over, every member is compared with the first and with its next `WINDOW`
followers, and who failed `MOST_FAILURES` times in a bucket is left alone. The result depends on the documents and
settings alone, not on how the work was divided.

Shapes: N documents of the corpus, numbered in their order; D of a range of it; B bands; P places of a signature.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from blues.data import minhash
from blues.data.minhash import Settings
from blues.data.sketches import Sketches
from blues.data.store import Store

PRECEDENCE = ("validation", "train")
"""Whose documents stay rather than the other's."""
WINDOW = 1000
MOST_FAILURES = 32
SET_CACHE_BYTES = 1 << 28
PAIR_BLOCK = 1 << 16
"""Pairs whose marks are compared at a time."""
BLOCK_TOKENS = 1 << 18
"""Tokens hashed at a time; the working set stays in the cache of a core."""
_NO_DOCUMENTS = pa.schema([("length", pa.int64()), ("digest", pa.uint64())]).empty_table()


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `exact` and `signatures` count documents, `near` counts bands."""

    stage: str
    done: int
    total: int


Report = Callable[[Progress], None]
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


class Groups:
    """Union-find over document numbers; the root of a group is its first document."""

    def __init__(self, documents: int) -> None:
        self._parent = np.arange(documents, dtype=np.int64)

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """The first document of the group of each of these."""
        found = self._parent[numbers]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        self._parent[numbers] = found
        return found

    def root(self, number: int) -> int:
        """The first document of the group of this one."""
        while (above := int(self._parent[number])) != number:
            number = above
        return number

    def join(self, left: int, right: int) -> None:
        """Make one group of the groups of two documents."""
        first, second = sorted((self.root(left), self.root(right)))
        self._parent[second] = first


@dataclass(frozen=True)
class Removal:
    """The documents that go, in rising order, with the one that stays for each.

    numbers, kept: int64[R] numbers of the corpus. exact: bool[R], the two are equal token by token. similarity:
    float64[R], their Jaccard index; it may lie below the threshold where a chain of similar documents joins them.
    """

    numbers: np.ndarray
    kept: np.ndarray
    exact: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def only(self, chosen: np.ndarray) -> Removal:
        """Those for which `chosen` (bool[R]) holds."""
        return Removal(self.numbers[chosen], self.kept[chosen], self.exact[chosen], self.similarity[chosen])


def find_duplicates(
    corpus: Corpus, settings: Settings, sketches: Sketches | None, *, report: Report = lambda _: None
) -> Removal:
    """Which documents of the corpus repeat an earlier one. sketches: of all documents; None for exact copies only."""
    groups = Groups(len(corpus))
    join_equal(corpus, groups, report)
    copies_N = groups.roots(np.arange(len(corpus)))
    near = _Near(corpus, settings, sketches, groups) if sketches is not None else None
    if near is not None:
        near.join(np.flatnonzero(copies_N == np.arange(len(corpus))), report)
    roots_N = groups.roots(np.arange(len(corpus)))
    numbers = np.flatnonzero(roots_N != np.arange(len(corpus)))
    kept, original = roots_N[numbers], copies_N[numbers]
    exact = original == kept
    similarity = np.ones(len(numbers))
    for place in np.flatnonzero(~exact).tolist():
        assert near is not None
        similarity[place] = near.similarity(int(kept[place]), int(original[place]))
    return Removal(numbers, kept, exact, similarity)


def join_equal(corpus: Corpus, groups: Groups, report: Report = lambda _: None) -> None:
    """Join the documents whose tokens are equal: equal digests propose, the tokens decide."""
    order = np.argsort(corpus.digests_N, kind="stable")
    digests = corpus.digests_N[order]
    borders = _borders(digests)
    several = np.diff(borders) > 1
    starts, stops = borders[:-1][several], borders[1:][several]
    total, done = int((stops - starts).sum()), 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        rest = order[start:stop]
        while len(rest) > 1:  # once, unless different documents share a digest
            first, tokens = int(rest[0]), corpus.tokens(int(rest[0]))
            equal = np.array([np.array_equal(corpus.tokens(int(other)), tokens) for other in rest[1:]])
            for other in rest[1:][equal].tolist():
                groups.join(first, other)
            rest = rest[1:][~equal]
        done += stop - start
        report(Progress("exact", done, total))


def _borders(ordered: np.ndarray) -> np.ndarray:
    """Where the runs of equal values of a sorted array begin, and its length at the end."""
    changes = np.ones(len(ordered) + 1, dtype=bool)
    changes[1:-1] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(changes) if len(ordered) else np.zeros(1, dtype=np.int64)


@dataclass
class _Buckets:
    """The documents that share their key of one band with another, bucket by bucket, each in rising order.

    members: document numbers; starts, sizes: of each bucket, by place in `members`; failures: of each member.
    """

    members: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    failures: np.ndarray

    @classmethod
    def of(cls, numbers: np.ndarray, keys: np.ndarray) -> _Buckets:
        """numbers: rising document numbers; keys: theirs."""
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        borders = _borders(ordered)
        buckets = cls(numbers[order], borders[:-1], np.diff(borders), np.zeros(len(order), dtype=np.int64))
        return buckets.keep(buckets.sizes > 1)

    def keep(self, chosen: np.ndarray) -> _Buckets:
        """Only these buckets (bool for each)."""
        if chosen.all():
            return self
        members = np.repeat(chosen, self.sizes)
        sizes = self.sizes[chosen]
        starts = np.cumsum(sizes) - sizes
        return _Buckets(self.members[members], starts, sizes, self.failures[members])

    def pairs(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in `members` of candidate pairs. Step 0: every member with the first of its bucket. Step s: every
        member but the first with its s-th follower."""
        bucket = np.repeat(np.arange(len(self.sizes)), self.sizes)
        place = np.arange(len(self.members))
        within = place - self.starts[bucket]
        if step == 0:
            right = place[within > 0]
            return self.starts[bucket[right]], right
        left = place[(within > 0) & (within + step < self.sizes[bucket])]
        return left, left + step


class _Near:
    """Joins similar documents, one band after the other."""

    def __init__(self, corpus: Corpus, settings: Settings, sketches: Sketches, groups: Groups) -> None:
        self.corpus, self.settings, self.sketches, self.groups = corpus, settings, sketches, groups
        self._joined: dict[tuple[int, int], float] = {}
        self._sets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._set_bytes = 0

    def join(self, numbers: np.ndarray, report: Report) -> None:
        """Join those of these documents (rising numbers) that are similar."""
        bands = len(self.sketches.keys_BN)
        for band in range(bands):
            if len(numbers):
                self._join_band(band, _Buckets.of(numbers, self.sketches.keys_BN[band][numbers]))
            report(Progress("near", band + 1, bands))

    def _join_band(self, band: int, buckets: _Buckets) -> None:
        for step in range(WINDOW + 1):
            roots = self.groups.roots(buckets.members)
            if not len(roots):
                return
            apart = np.minimum.reduceat(roots, buckets.starts) != np.maximum.reduceat(roots, buckets.starts)
            buckets = buckets.keep(apart & (buckets.sizes > step + (step > 0)))
            left, right = buckets.pairs(step)
            for begin in range(0, len(left), PAIR_BLOCK):
                block = slice(begin, begin + PAIR_BLOCK)
                self._join_pairs(buckets, *self._promising(band, buckets, left[block], right[block]), step)

    def _promising(
        self, band: int, buckets: _Buckets, left: np.ndarray, right: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Those of the pairs (places in the buckets) that are worth reading, in the order of their documents."""

        members, failures = buckets.members, buckets.failures
        keys_BN, marks_NP = self.sketches.keys_BN, self.sketches.marks_NP
        likely = (failures[left] < MOST_FAILURES) & (failures[right] < MOST_FAILURES)
        left, right = left[likely], right[likely]
        likely = self.groups.roots(members[left]) != self.groups.roots(members[right])
        left, right = left[likely], right[likely]
        likely = minhash.estimate(marks_NP[members[left]], marks_NP[members[right]]) >= self.settings.least_estimate
        left, right = left[likely], right[likely]
        for earlier in range(band):
            likely = keys_BN[earlier][members[left]] != keys_BN[earlier][members[right]]
            left, right = left[likely], right[likely]
        order = np.lexsort((members[right], members[left]))
        return left[order], right[order]

    def _join_pairs(self, buckets: _Buckets, left: np.ndarray, right: np.ndarray, step: int) -> None:
        """Read these pairs; join the documents of a pair, or count a failure of both (none of the first of a bucket, to
        which all are compared)."""
        for one_place, other_place in zip(left.tolist(), right.tolist(), strict=True):
            one, other = int(buckets.members[one_place]), int(buckets.members[other_place])
            if self.groups.root(one) == self.groups.root(other):
                continue
            similarity = minhash.jaccard(self._set(one), self._set(other))
            if similarity >= self.settings.threshold:
                self.groups.join(one, other)
                self._joined[one, other] = similarity
            else:
                buckets.failures[other_place] += 1
                buckets.failures[one_place] += step > 0

    def similarity(self, one: int, other: int) -> float:
        """The exact Jaccard index of two documents, the first with the smaller number."""
        found = self._joined.get((one, other))
        return minhash.jaccard(self._set(one), self._set(other)) if found is None else found

    def _set(self, number: int) -> np.ndarray:
        """The shingles of a document, from the last ones that were asked for if they are there."""
        if number in self._sets:
            self._sets.move_to_end(number)
            return self._sets[number]
        shingles = minhash.shingle_set(self.corpus.tokens(number), self.settings.ngram)
        self._sets[number] = shingles
        self._set_bytes += shingles.nbytes
        while self._set_bytes > SET_CACHE_BYTES and len(self._sets) > 1:
            self._set_bytes -= self._sets.popitem(last=False)[1].nbytes
        return shingles
