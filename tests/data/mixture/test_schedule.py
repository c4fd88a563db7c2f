"""Weights hold at every prefix, a source goes on where it stood when they change, and an order is a permutation."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as hyp

from blues.data.mixture.schedule import (
    MAX_PERIOD,
    Schedule,
    Stretch,
    chairman_schedule,
    permute,
    permute_all,
    round_weights,
    shares_of,
)

LAW = settings(max_examples=50, deadline=None)
fractions = hyp.fractions(min_value=0, max_value=1, max_denominator=60)


def bound(shares: tuple[int, ...] | list[int]) -> Fraction:
    """Tijdeman's: how far the draws of a source may be from its share of them."""
    active = sum(share > 0 for share in shares)
    return Fraction(0) if active == 1 else 1 - Fraction(1, 2 * active - 2)


# Weights.


@LAW
@given(shares=hyp.lists(hyp.integers(0, 60), min_size=1, max_size=7))
@example(shares=[1, 59, 59])
@example(shares=[1] * 7)
@example(shares=[0, 5, 0])
def test_the_schedule_keeps_every_prefix_within_tijdemans_bound(shares):
    assume(any(shares))
    schedule, period = chairman_schedule(shares), sum(shares)
    draws = np.tile(schedule, -(-2 * period // len(schedule)))[: 2 * period]
    counts = [0] * len(shares)
    for n, source in enumerate(draws.tolist(), start=1):
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - Fraction(n * share, period)) <= bound(shares)


@LAW
@given(weights=hyp.lists(fractions, min_size=1, max_size=4))
def test_weights_with_a_small_denominator_stay_as_they_are(weights):
    assume(any(weights))
    exact, rounded = [weight / sum(weights) for weight in weights], round_weights(weights)
    shares = shares_of(rounded)
    assert sum(shares) <= MAX_PERIOD and [Fraction(share, sum(shares)) for share in shares] == rounded
    if math.lcm(*(weight.denominator for weight in exact)) <= MAX_PERIOD:
        assert rounded == exact


@LAW
@given(weights=hyp.lists(hyp.floats(0, 1e6), min_size=1, max_size=6))
@example(weights=[1e-9, 1e-9, 1e-9, 1.0])
@example(weights=[1 / 3, 0.1234567, 0.0])
def test_other_weights_are_rounded_once_and_no_source_is_lost(weights):
    assume(any(weights))
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    rounded = round_weights(exact)
    assert sum(rounded) == 1 and sum(shares_of(rounded)) <= MAX_PERIOD
    assert round_weights(rounded) == rounded
    for share, weight in zip(rounded, exact, strict=True):
        assert (share > 0) == (weight > 0)
        assert abs(share - weight) <= Fraction(len(weights), MAX_PERIOD)


def test_a_period_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="the common denominator 65,537, more than 65,536"):
        shares_of([Fraction(1, 65_537), Fraction(65_536, 65_537)])
    with pytest.raises(ValueError, match="at most 65,536 sources can have a share"):
        round_weights([Fraction(1)] * 65_537)


def test_a_large_period_is_scheduled_in_a_second():
    began = time.monotonic()
    shares = shares_of(round_weights([Fraction(1, 3), Fraction(1, 65_537), 1 - Fraction(1, 3) - Fraction(1, 65_537)]))
    schedule = chairman_schedule(shares)
    assert len(schedule) == sum(shares) and tuple(np.bincount(schedule)) == shares
    assert time.monotonic() - began < 5


# Weights that change.


@hyp.composite
def plans(draw) -> list[Stretch]:
    sources = draw(hyp.integers(1, 4))
    shares = hyp.lists(hyp.integers(0, 9), min_size=sources, max_size=sources).filter(any).map(tuple)
    starts = sorted(draw(hyp.sets(hyp.integers(1, 150), max_size=4)))
    return [Stretch(start, shares_of([Fraction(share) for share in draw(shares)])) for start in [0, *starts]]


@LAW
@given(plan=plans(), order=hyp.randoms(use_true_random=False))
def test_draws_follow_the_weights_of_their_stretch_and_every_source_goes_on_where_it_stood(plan, order):
    """Against counting from the start, one index after the other; asked for in any order."""
    indices = list(range(250))
    order.shuffle(indices)
    sources, draws = Schedule(plan).draws(np.array(indices))
    found = {index: (int(s), int(d)) for index, s, d in zip(indices, sources, draws, strict=True)}
    ever = [0] * len(plan[0].shares)
    for stretch, following in zip(plan, [*plan[1:], Stretch(250, ())], strict=True):
        counts, period = [0] * len(ever), sum(stretch.shares)
        for n, index in enumerate(range(stretch.start, following.start), start=1):
            source, draw = found[index]
            assert draw == ever[source], "nothing is left out and nothing comes again"
            counts[source] += 1
            ever[source] += 1
            for count, share in zip(counts, stretch.shares, strict=True):
                assert abs(count - Fraction(n * share, period)) <= bound(stretch.shares)


def test_there_is_no_last_draw():
    schedule = Schedule([Stretch(0, (3, 1)), Stretch(10, (1, 3))])
    sources, draws = schedule.draws(np.array([10**15, 10**15 + 1, 10**15 + 2, 10**15 + 3]))
    assert sorted(sources.tolist()) == [0, 1, 1, 1]
    assert abs(int(draws[0]) - 10**15 * (1 if sources[0] == 0 else 3) // 4) < 20
    assert schedule.draws(np.array([], dtype=np.int64))[0].shape == (0,)


# The order of windows.


@LAW
@given(size=hyp.integers(1, 600), key=hyp.integers(0, (1 << 64) - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(place, size, key) for place in range(size)) == list(range(size))


@LAW
@given(
    size=hyp.integers(1, 1 << 40),
    keys=hyp.lists(hyp.integers(0, (1 << 64) - 1), max_size=20),
    places=hyp.randoms(use_true_random=False),
)
def test_many_at_a_time_are_sent_where_each_alone_is(size, keys, places):
    chosen = [places.randrange(size) for _ in keys]
    found = permute_all(np.array(chosen, dtype=np.int64), size, np.array(keys, dtype=np.uint64))
    assert found.dtype == np.int64
    assert found.tolist() == [permute(place, size, key) for place, key in zip(chosen, keys, strict=True)]


def test_permutations_of_other_keys_differ_and_look_random():
    places = np.arange(1000)
    orders = np.array([permute_all(places, 1000, np.full(1000, key, dtype=np.uint64)) for key in range(50)])
    assert len({tuple(order) for order in orders.tolist()}) == 50
    firsts = orders[:, :100].ravel()
    assert abs(firsts.mean() - 499.5) < 5 * 288.7 / len(firsts) ** 0.5
    assert np.mean(np.abs(np.diff(orders, axis=1)) == 1) < 0.01, "neighbours are torn apart"


def test_the_order_is_the_same_in_every_release():
    """A changed order would end bit-exact resuming of runs that are under way."""
    assert [permute(place, 10, 0) for place in range(10)] == [8, 7, 6, 1, 3, 4, 9, 0, 5, 2]
    assert chairman_schedule([5, 3, 2]).tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
