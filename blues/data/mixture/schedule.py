"""Which source a sample comes from and in what order a source is read: pure functions of the sample's index.

In: weights as exact fractions, sizes, keys. Out: source and draw of every index, and keyed permutations.

- Which source: Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980). At every prefix
  of N samples, source s was drawn w_s N times, give or take less than one. Not random, so no run is unlucky. Nothing is
  rounded here: after any number of samples the counts are those of the exact weights.
- In what order: a keyed permutation, a Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary
  Finite Domains", 2002), so that an order of a billion windows takes no memory and no state.

A "draw" of a source is how many samples before this one came from the same source.

Legend: n indices, k sources.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 1 << 16
"""Draws of one period at most: the schedule of a period is kept in memory."""

FEISTEL_ROUNDS = 6
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def round_weights(weights: Sequence[Fraction]) -> list[Fraction]:
    """The weights as fractions over at most MAX_PERIOD that sum to 1: exactly if their common denominator allows it,
    else the nearest by largest remainders, where no positive weight becomes zero.

    Raises:
        ValueError: more than MAX_PERIOD positive weights.
    """
    total = sum(weights)
    exact = [Fraction(weight) / total for weight in weights]
    if math.lcm(*(weight.denominator for weight in exact)) <= MAX_PERIOD:
        return exact
    if sum(weight > 0 for weight in exact) > MAX_PERIOD:
        raise ValueError(f"{len(exact):,} weights, and at most {MAX_PERIOD:,} sources can have a share")
    shares = [max(int(weight * MAX_PERIOD), int(weight > 0)) for weight in exact]
    remainders = [weight * MAX_PERIOD - share for weight, share in zip(exact, shares, strict=True)]
    while (missing := MAX_PERIOD - sum(shares)) != 0:
        sign = 1 if missing > 0 else -1
        candidates = [s for s, share in enumerate(shares) if sign > 0 or share > 1]
        chosen = max(candidates, key=lambda s: sign * remainders[s])
        shares[chosen] += sign
        remainders[chosen] -= sign
    return [Fraction(share, MAX_PERIOD) for share in shares]


def shares_of(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole draws of each source in the shortest period in which all weights come out exactly.

    Raises:
        ValueError: the period is longer than MAX_PERIOD (`round_weights` makes weights whose period is not).
    """
    total = sum(weights)
    exact = [Fraction(weight) / total for weight in weights]
    period = math.lcm(*(weight.denominator for weight in exact))
    if period > MAX_PERIOD:
        raise ValueError(f"weights with the common denominator {period:,}, more than {MAX_PERIOD:,}")
    return tuple(int(weight * period) for weight in exact)


@dataclass(frozen=True)
class Stretch:
    """From sample `start` on, until the next stretch, sources are drawn in proportion to `shares`."""

    start: int
    shares: tuple[int, ...]


class Schedule:
    """The draws of a mixture whose weights may change: within each stretch the bound holds from its own start, and
    every source goes on with the draw after its last one."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        """The first stretch starts at 0, the others later and later; all have a share for each of the same sources."""
        self.stretches = tuple(stretches)
        self._starts = np.array([stretch.start for stretch in stretches], dtype=np.int64)
        periods = [_period(stretch.shares) for stretch in stretches]
        self._periods = periods
        self._before = [np.zeros(len(stretches[0].shares), dtype=np.int64)]
        for stretch, following, period in zip(stretches, stretches[1:], periods, strict=False):
            self._before.append(self._before[-1] + period.counts(following.start - stretch.start))

    def draws(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and draw of each index: int64[n], int64[n]."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        first, last = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
        if first == last:
            return self._draws(first, indices)
        sources, draws = np.empty_like(indices), np.empty_like(indices)
        for number in range(first, last + 1):
            here = numbers == number
            sources[here], draws[here] = self._draws(number, indices[here])
        return sources, draws

    def _draws(self, number: int, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        period = self._periods[number]
        whole, places = np.divmod(indices - self._starts[number], len(period.sources))
        sources = period.sources[places].astype(np.int64)
        return sources, self._before[number][sources] + whole * period.shares[sources] + period.ranks[places]


@dataclass(frozen=True)
class _Period:
    """One period of a schedule: the source of each place, how many earlier places have the same, and of each source
    how many places it has."""

    sources: NDArray[np.int32]
    ranks: NDArray[np.int32]
    shares: NDArray[np.int64]

    def counts(self, draws: int) -> NDArray[np.int64]:
        """How many of the first `draws` draws each source has."""
        whole, rest = divmod(draws, len(self.sources))
        return whole * self.shares + np.bincount(self.sources[:rest], minlength=len(self.shares))


@functools.lru_cache(maxsize=16)
def _period(shares: tuple[int, ...]) -> _Period:
    sources = chairman_schedule(shares)
    ranks = np.empty(len(sources), dtype=np.int32)
    for source in np.unique(sources):
        places = np.flatnonzero(sources == source)
        ranks[places] = np.arange(len(places))
    return _Period(sources, ranks, np.bincount(sources, minlength=len(shares)).astype(np.int64))


def chairman_schedule(shares: Sequence[int]) -> NDArray[np.int32]:
    """int32[period]: the source of each draw, with |draws of s among the first n - n shares[s] / period| < 1.

    Tijdeman's rule as earliest deadline first: with k sources and a slack of 1/(2k - 2), draw j of a source may happen
    once its ideal count reaches j + slack and must before it exceeds j + 1 - slack + 1 draw. Runs in O(period log k).
    """
    period, active = sum(shares), [s for s, share in enumerate(shares) if share > 0]
    if len(active) == 1:
        return np.full(1, active[0], dtype=np.int32)
    parts = 2 * len(active) - 2
    waiting: list[tuple[int, int, int]] = []  # (first allowed draw, source, j)
    ready: list[tuple[int, int, int]] = []  # (last allowed draw, source, j)

    def plan(source: int, j: int) -> None:
        first = -(-(j * parts + 1) * period // (parts * shares[source]))
        heapq.heappush(waiting, (first, source, j))

    for source in active:
        plan(source, 0)
    schedule = np.empty(period, dtype=np.int32)
    for n in range(1, period + 1):
        while waiting and waiting[0][0] <= n:
            _, source, j = heapq.heappop(waiting)
            last = ((j + 1) * parts - 1) * period // (parts * shares[source]) + 1
            heapq.heappush(ready, (last, source, j))
        _, source, j = heapq.heappop(ready)
        schedule[n - 1] = source
        plan(source, j + 1)
    return schedule


def permute(place: int, size: int, key: int) -> int:
    """Where a keyed permutation of `[0, size)` sends `place`: a Feistel network over the next even power of two, walked
    until it lands inside (at most four steps in the mean). The reference for `permute_all`."""
    half = _half_bits(size)
    mask = (1 << half) - 1
    value = place
    while True:
        left, right = value >> half, value & mask
        for round in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right + ((key + round * GOLDEN) & MASK)) & mask)
        value = left << half | right
        if value < size:
            return value


def permute_all(places: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`permute(places[i], size, keys[i])` for every i, in a few dozen numpy operations: int64[n]."""
    half, mask = np.uint64(_half_bits(size)), np.uint64((1 << _half_bits(size)) - 1)
    out = np.empty(len(places), dtype=np.int64)
    pending, values = np.arange(len(places)), places.astype(np.uint64)
    while len(pending):
        left, right = values >> half, values & mask
        for round in range(FEISTEL_ROUNDS):
            mixed = right + (keys + np.uint64(round * GOLDEN & MASK))
            left, right = right, left ^ (_mix_all(mixed) & mask)
        values = left << half | right
        inside = values < np.uint64(size)
        out[pending[inside]] = values[inside]
        outside = ~inside
        pending, values, keys = pending[outside], values[outside], keys[outside]
    return out


def _half_bits(size: int) -> int:
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _mix(value: int) -> int:
    """The finalizer of splitmix64."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def _mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of each element, in place; uint64 arithmetic wraps."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
