"""Weights that change in mid-run: the shares change, and nothing else; the past can be told to be the same."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hyp

from blues.data.merging.merge import merge
from blues.data.mixture.batches import Mixture, Phase
from blues.errors import ConfigError, DataError
from tests.data.mixtures import WINDOWS, equal, make_folder, open_mixture, phases

LAW = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("phases"))


@pytest.fixture(scope="module")
def mixture(folder) -> Mixture:
    return open_mixture(folder / "mix")


@hyp.composite
def plans(draw) -> tuple[Phase, ...]:
    starts = sorted(draw(hyp.sets(hyp.integers(0, 150), max_size=4)))
    weights = hyp.lists(hyp.sampled_from([0, 0.1, 0.25, 1, 3]), min_size=3, max_size=3).filter(any)
    return phases(*((start, draw(weights)) for start in starts))


@LAW
@given(plan=plans())
def test_phases_change_the_shares_and_nothing_else(folder, mixture, plan):
    """Each source comes in the order in which it comes without phases, and by the new weights from each start on."""
    changed = open_mixture(folder / "mix", phases=plan)
    sources, windows = changed.windows_of(range(300))
    plain_sources, plain_windows = mixture.windows_of(range(1500))
    for source in range(3):
        own = windows[sources == source].tolist()
        assert own == plain_windows[plain_sources == source][: len(own)].tolist()
    first = plan[0].start if plan else 300
    assert sources[:first].tolist() == plain_sources[:first].tolist()
    for number, phase in enumerate(plan):
        following = plan[number + 1].start if number + 1 < len(plan) else 300
        assert changed.weights_at(phase.start) == pytest.approx([w / sum(phase.weights) for w in phase.weights])
        exact = [Fraction(repr(float(weight))) for weight in phase.weights]
        counts = [0, 0, 0]
        for n, source in enumerate(sources[phase.start : following].tolist(), start=1):
            counts[source] += 1
            for count, weight in zip(counts, exact, strict=True):
                assert abs(Fraction(count, n) - weight / sum(exact)) <= Fraction(1, n)
                assert weight or not count, "a weight of zero is a pause"


@LAW
@given(plan=plans(), other=plans(), index=hyp.integers(1, 200))
def test_the_fingerprint_until_a_sample_tells_whether_the_past_is_the_same(folder, plan, other, index):
    first, second = (open_mixture(folder / "mix", phases=each) for each in (plan, other))
    same = first.fingerprint_until(index) == second.fingerprint_until(index)
    if same:
        assert equal(first.batch(range(index)), second.batch(range(index)))
    before = [[phase for phase in each if phase.start < index] for each in (plan, other)]
    assert same or before[0] != before[1]
    assert first.fingerprint_until(10**9) == first.fingerprint


def test_a_phase_from_the_first_sample_on_is_another_merge(folder, tmp_path, mixture):
    merge([folder / name for name in WINDOWS], tmp_path / "m", weights=[0.1, 0.1, 0.8])
    merged, phase = open_mixture(tmp_path / "m"), open_mixture(folder / "mix", phases=phases((0, [1, 1, 8])))
    assert merged.fingerprint == phase.fingerprint
    assert equal(merged.batch(range(100)), phase.batch(range(100)))


def test_phases_that_do_not_fit_say_so(folder):
    with pytest.raises(ConfigError) as caught:
        open_mixture(folder / "mix", phases=phases((5, [1, 1])))
    assert str(caught.value) == (
        f"data.phases[0].weights: 2 weights for the 3 sources of {str(folder / 'mix')!r}; give one for each of a, b, "
        "c, in this order"
    )
    with pytest.raises(ConfigError, match=r"phases\[1\].start: 5 must be above that of the phase before, 5"):
        Mixture.Config(phases=phases((5, [1]), (5, [1])))
    for weights in ([], [0, 0], [-1, 2], [float("nan"), 1], [float("inf")]):
        with pytest.raises(ConfigError, match="weights: .* must be zero or positive numbers, at least one positive"):
            Phase(start=0, weights=tuple(weights))
    with pytest.raises(ConfigError, match="start: -1 must be a sample's index, 0 or more"):
        Phase(start=-1, weights=(1.0,))
    with pytest.raises(DataError, match="dataset 'c' holds 41 tokens, too few"):
        open_mixture(folder / "mix", sequence_length=50, phases=phases((0, [1, 0, 0]), (10, [1, 0, 1])))
