"""Find the documents that repeat another: exactly, or nearly (MinHash LSH by token n-grams), in one dataset or several.

In: a `Corpus`, the documents of one or several datasets in the order of their right to stay. Out: `Removal`: a document
goes if an earlier one that stays has the same tokens, or shingles with a Jaccard index of at least the threshold. So
whatever goes is similar to something that stays, and a chain of small changes does not pull its far end along.

Validation documents come before all training documents, so a training document that repeats a validation document goes,
whichever dataset it is of (decontamination); then the order of the datasets counts, then that of the documents.

1. Exact: equal digests propose, the tokens themselves decide.
2. Near: of each band, the documents with equal keys are candidates (`minhash`). A pair whose marks say that it
   may be similar enough is read, and the exact Jaccard index of its shingles decides. Similar ones form a group.
3. Within each group the documents are taken in order: the first stays, and every further one that is similar to none
   of those that stay.

The work stays linear where a bucket of equal keys is large: copies were joined before, pairs that are joined already or
were decided in an earlier band are passed over, every member is compared with the first and with its next `WINDOW`
followers, and who failed `MOST_FAILURES` times in a bucket is left alone. The result depends on the documents and
settings alone, not on how the work was divided.

Shapes: N documents of the corpus, numbered in their order; B bands; P places of a signature; R documents that go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from blues.data.dedup import minhash
from blues.data.dedup.corpus import Corpus
from blues.data.dedup.minhash import Settings
from blues.data.dedup.sketches import Sketches

WINDOW = 1000
MOST_FAILURES = 32
MOST_COMPARED = 1 << 14
"""Documents of a group that stay and that a further one is compared with: the last so many."""
SET_CACHE_BYTES = 1 << 28
PAIR_BLOCK = 1 << 16
"""Pairs whose marks are compared at a time."""


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `exact` and `signatures` count documents, `near` bands, `choice` groups."""

    stage: str
    done: int
    total: int


Report = Callable[[Progress], None]


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
    """The documents that go, in rising order, with one that stays for each.

    numbers, kept: int64[R] numbers of the corpus. exact: bool[R], the two are equal token by token. similarity:
    float64[R], their Jaccard index.
    """

    numbers: np.ndarray
    kept: np.ndarray
    exact: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)


def find_duplicates(
    corpus: Corpus,
    settings: Settings,
    sketches: Sketches | None,
    *,
    across_only: bool = False,
    report: Report = lambda _: None,
) -> Removal:
    """Which documents of the corpus repeat an earlier one that stays.

    Args:
        sketches: of all documents; None for exact copies only.
        across_only: a document goes only for one of another dataset, so each dataset may repeat itself.
    """
    all_N = np.arange(len(corpus))
    groups = Groups(len(corpus))
    join_equal(corpus, groups, report)
    copies_N = groups.roots(all_N)
    near = None
    if sketches is not None:
        near = _Near(corpus, settings, sketches, groups)
        near.join(np.flatnonzero(copies_N == all_N), report)
    units_N = _first_of_equals(copies_N, corpus.shelf_of(all_N)) if across_only else copies_N
    choice = _Choice(corpus, copies_N, near, across_only)
    choice.decide(groups, np.flatnonzero(units_N == all_N), report)
    goes_N = choice.kept_N[units_N] != (units_N if across_only else all_N)
    numbers, units, kept = all_N[goes_N], units_N[goes_N], choice.kept_N[units_N[goes_N]]
    exact = copies_N[numbers] == copies_N[kept]
    return Removal(numbers, kept, exact, np.where(exact, 1.0, choice.similarity_N[units]))


def _first_of_equals(copies_N: np.ndarray, shelves_N: np.ndarray) -> np.ndarray:
    """The first document with the same tokens on the same shelf: where a shelf may repeat itself, they share a fate."""
    both = copies_N * (int(shelves_N.max(initial=0)) + 1) + shelves_N
    _, first, place = np.unique(both, return_index=True, return_inverse=True)
    return first[place]


class _Choice:
    """Decides who stays.

    kept_N: int64, the document that stays for each (itself if it stays). similarity_N: float64, of the two.
    """

    def __init__(self, corpus: Corpus, copies_N: np.ndarray, near: _Near | None, across_only: bool) -> None:
        self.copies_N, self.near = copies_N, near
        self.kept_N, self.similarity_N = np.arange(len(corpus)), np.ones(len(corpus))
        self._datasets_N = corpus.dataset_of(self.kept_N) if across_only else None

    def decide(self, groups: Groups, units: np.ndarray, report: Report) -> None:
        """Decide on these documents, rising numbers, of which no two have the same fate from the start."""
        roots = groups.roots(units)
        order = np.argsort(roots, kind="stable")
        borders = _borders(roots[order])
        several = np.flatnonzero(np.diff(borders) > 1)
        for done, group in enumerate(several.tolist(), start=1):
            self._decide_group(units[order[borders[group] : borders[group + 1]]])
            report(Progress("choice", done, len(several)))

    def _decide_group(self, members: np.ndarray) -> None:
        stay, count = np.empty_like(members), 0
        for number in members.tolist():
            found = self._original(number, stay[max(0, count - MOST_COMPARED) : count])
            if found is None:
                stay[count] = number
                count += 1
            else:
                self.kept_N[number], self.similarity_N[number] = found

    def _original(self, number: int, stay: np.ndarray) -> tuple[int, float] | None:
        """Which of those that stay a document repeats, and how similar they are."""
        if self._datasets_N is not None:
            stay = stay[self._datasets_N[stay] != self._datasets_N[number]]
        equal = stay[self.copies_N[stay] == self.copies_N[number]]
        if len(equal):
            return int(equal[0]), 1.0
        if self.near is None or not len(stay):
            return None
        found = self.near.find(int(self.copies_N[number]), self.copies_N[stay])
        return None if found is None else (int(stay[found[0]]), found[1])


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
            similarity = self._similarity(one, other)
            if similarity >= self.settings.threshold:
                self.groups.join(one, other)
                self._joined[min(one, other), max(one, other)] = similarity
            else:
                buckets.failures[other_place] += 1
                buckets.failures[one_place] += step > 0

    def find(self, number: int, others: np.ndarray) -> tuple[int, float] | None:
        """The place of a similar one among others (int64[n], n > 0), and how similar; the likeliest are tried first."""
        marks_NP = self.sketches.marks_NP
        estimates = minhash.estimate(marks_NP[number][None], marks_NP[others])
        likely = np.flatnonzero(estimates >= self.settings.least_estimate)
        likely = likely[np.argsort(-estimates[likely], kind="stable")][:MOST_FAILURES]
        for place in likely.tolist():
            similarity = self._similarity(number, int(others[place]))
            if similarity >= self.settings.threshold:
                return place, similarity
        return None

    def _similarity(self, one: int, other: int) -> float:
        """The exact Jaccard index of two documents."""
        found = self._joined.get((min(one, other), max(one, other)))
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
