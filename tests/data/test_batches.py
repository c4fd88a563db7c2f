"""Samples are a pure function of their index: weights hold at every prefix, no window comes twice in an epoch."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as hyp

from blues import config as cfg
from blues.data import batches
from blues.data.batches import Mixture, chairman_schedule, period_shares, permute, rank_indices
from blues.data.merge import merge
from blues.data.store import Store
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError
from tests.data.datasets import TOKENIZER, make_numbered, make_store

LENGTH = 8
WINDOWS = {"a": 40, "b": 11, "c": 5}
FIRST = {"a": 0, "b": 100, "c": 200}
LAW = settings(max_examples=50, deadline=None)

fractions = hyp.fractions(min_value=0, max_value=1, max_denominator=60)


def open_mixture(path: Path, *, split: str = "train", **settings) -> Mixture:
    return Mixture.Config(path=str(path), tokenizer=TOKENIZER, **{"sequence_length": LENGTH, **settings}).build(
        split=split
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three datasets whose windows are told apart by their first token, and their mixture 0.5 0.3 0.2."""
    folder = tmp_path_factory.mktemp("batches")
    for name, windows in WINDOWS.items():
        make_numbered(folder / name, windows=windows, length=LENGTH, first=FIRST[name])
    merge([folder / name for name in WINDOWS], folder / "mix", weights=[0.5, 0.3, 0.2])
    return folder


@pytest.fixture(scope="module")
def mixture(folder) -> Mixture:
    return open_mixture(folder / "mix")


# The schedule of sources.


@LAW
@given(shares=hyp.lists(hyp.integers(0, 60), min_size=1, max_size=7))
@example(shares=[1, 59, 59])
@example(shares=[1] * 7)
@example(shares=[0, 5, 0])
def test_the_schedule_keeps_every_prefix_within_tijdemans_bound(shares):
    assume(any(shares))
    schedule, period = chairman_schedule(shares), sum(shares)
    active = sum(share > 0 for share in shares)
    bound = Fraction(0) if active == 1 else 1 - Fraction(1, 2 * active - 2)
    draws = np.tile(schedule, -(-2 * period // len(schedule)))[: 2 * period]
    counts = [0] * len(shares)
    for n, source in enumerate(draws.tolist(), start=1):
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - Fraction(n * share, period)) <= bound


@LAW
@given(weights=hyp.lists(fractions, min_size=1, max_size=4))
def test_shares_are_exact_where_the_period_allows(weights):
    assume(any(weights))
    shares, total = period_shares(weights), sum(weights)
    if sum(shares) < batches.MAX_PERIOD:
        assert [Fraction(share, sum(shares)) for share in shares] == [weight / total for weight in weights]


@LAW
@given(weights=hyp.lists(hyp.floats(0, 1e6), min_size=1, max_size=6))
@example(weights=[1e-9, 1e-9, 1e-9, 1.0])
@example(weights=[1 / 3, 0.1234567, 0.0])
def test_other_weights_are_rounded_and_no_source_is_lost(weights):
    assume(any(weights))
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    shares = period_shares(exact)
    assert sum(shares) <= batches.MAX_PERIOD
    for share, weight in zip(shares, exact, strict=True):
        assert (share > 0) == (weight > 0)
        assert abs(Fraction(share, sum(shares)) - weight) <= Fraction(len(shares), batches.MAX_PERIOD)


@settings(max_examples=25, deadline=None)
@given(weights=hyp.lists(hyp.decimals(0, 1, places=2), min_size=3, max_size=3))
def test_weights_of_a_merged_dataset_hold_at_every_prefix(folder, tmp_path_factory, weights):
    assume(any(weights))
    output = tmp_path_factory.mktemp("weights") / "mix"
    merge([folder / name for name in WINDOWS], output, weights=[float(weight) for weight in weights])
    mixture = open_mixture(output)
    asked = [Fraction(weight) / Fraction(sum(weights)) for weight in weights]
    assert mixture.weights == pytest.approx([float(weight) for weight in asked])
    counts = [0, 0, 0]
    for n in range(1, 701):
        counts[mixture.source_of(n - 1)] += 1
        assert all(abs(count - weight * n) <= 1 for count, weight in zip(counts, asked, strict=True))


def test_a_large_period_is_scheduled_in_seconds():
    began = time.monotonic()
    shares = period_shares([Fraction(1, 3), Fraction(1, 65_537), 1 - Fraction(1, 3) - Fraction(1, 65_537)])
    schedule = chairman_schedule(shares)
    assert len(schedule) == sum(shares) and np.bincount(schedule).tolist() == shares
    assert time.monotonic() - began < 10


# The order of windows.


@LAW
@given(size=hyp.integers(1, 600), key=hyp.integers(0, (1 << 64) - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(place, size, key) for place in range(size)) == list(range(size))


def test_permutations_of_other_keys_differ_and_look_random():
    orders = [[permute(place, 1000, key) for place in range(1000)] for key in range(50)]
    assert len({tuple(order) for order in orders}) == 50
    firsts = np.array([order[:100] for order in orders]).ravel()
    assert abs(firsts.mean() - 499.5) < 5 * 288.7 / len(firsts) ** 0.5
    steps = np.diff(np.array(orders), axis=1)
    assert np.mean(np.abs(steps) == 1) < 0.01, "neighbours are torn apart"


def test_the_order_is_the_same_in_every_release():
    """A changed order would end bit-exact resuming of runs that are under way."""
    assert [permute(place, 10, 0) for place in range(10)] == [8, 7, 6, 1, 3, 4, 9, 0, 5, 2]
    assert chairman_schedule([5, 3, 2]).tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


def test_every_epoch_of_every_source_visits_each_window_once(mixture):
    """Read from the tokens themselves: the first token of a sample names its window."""
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in range(400):
        tokens, source = mixture.sample(index)
        seen[source].append(int(tokens[0]))
    for (name, windows), drawn in zip(WINDOWS.items(), seen.values(), strict=True):
        epochs = [drawn[start : start + windows] for start in range(0, len(drawn) - windows + 1, windows)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert sorted(epoch) == list(range(FIRST[name], FIRST[name] + windows))
        assert epochs[0] != epochs[1], "every epoch has an order of its own"


def test_windows_overlap_by_one_token_so_that_no_target_is_lost(folder):
    store, mixture = Store.open(folder / "c"), open_mixture(folder / "c")
    tokens = store.read("train", 0, store.num_tokens("train")).tolist()
    windows = {}
    for index in range(WINDOWS["c"]):
        sample = mixture.sample(index)
        assert sample.tokens.dtype == torch.int64 and sample.tokens.shape == (LENGTH + 1,)
        windows[mixture.window_of(index)[1]] = sample.tokens.tolist()
    targets = [token for window in sorted(windows) for token in windows[window][1:]]
    assert targets == tokens[1:]


def test_a_sample_depends_on_its_index_alone(folder, mixture):
    expected = {index: mixture.sample(index) for index in range(120)}
    again = open_mixture(folder / "mix")
    for index in np.random.default_rng(0).permutation(120).tolist():
        sample = again.sample(index)
        assert sample.source == expected[index].source == again.source_of(index) == again.window_of(index)[0]
        assert torch.equal(sample.tokens, expected[index].tokens)
    copied = pickle.loads(pickle.dumps(mixture))
    assert torch.equal(copied.sample(7).tokens, expected[7].tokens)
    sample = mixture.sample(10**15)
    assert sample.tokens.shape == (LENGTH + 1,), "there is no last sample"
    with pytest.raises(IndexError):
        mixture.sample(-1)


def test_samples_do_not_depend_on_where_the_data_lie(folder, tmp_path, mixture):
    for name, windows in WINDOWS.items():
        make_numbered(tmp_path / "moved" / name, windows=windows, length=LENGTH, first=FIRST[name])
    merge([tmp_path / "moved" / name for name in WINDOWS], tmp_path / "m", weights=[5, 3, 2])
    moved = open_mixture(tmp_path / "m")
    assert moved.fingerprint == mixture.fingerprint
    assert all(torch.equal(moved.sample(index).tokens, mixture.sample(index).tokens) for index in range(60))


def test_the_seed_the_weights_and_the_length_change_the_fingerprint(folder, tmp_path, mixture):
    merge([folder / name for name in WINDOWS], tmp_path / "m", weights=[0.5, 0.2, 0.3])
    prints = [
        mixture.fingerprint,
        open_mixture(folder / "mix", seed=1).fingerprint,
        open_mixture(folder / "mix", sequence_length=4).fingerprint,
        open_mixture(tmp_path / "m").fingerprint,
        open_mixture(folder / "a").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    other = open_mixture(folder / "mix", seed=1)
    assert [other.window_of(index) for index in range(50)] != [mixture.window_of(index) for index in range(50)]


def test_a_single_dataset_is_a_mixture_of_one(folder):
    single = open_mixture(folder / "b")
    assert (single.source_names, single.weights, single.num_windows) == (["b"], [1.0], [11])
    assert single.num_samples_per_epoch == 11
    assert sorted(int(single.sample(index).tokens[0]) for index in range(11)) == list(range(100, 111))


def test_validation_is_another_split_with_its_own_windows(folder):
    held_out = open_mixture(folder / "mix", split="validation")
    assert held_out.num_windows == [2, 2, 2] and held_out.source_names == ["a", "b", "c"]
    assert {int(held_out.sample(index).tokens[0]) for index in range(20)} == {0, 1, 100, 101, 200, 201}


# Ranks and batches.


@LAW
@given(
    step=hyp.integers(0, 1000),
    world_size=hyp.integers(1, 8),
    micro_batch_size=hyp.integers(1, 5),
    micro_steps=hyp.integers(1, 4),
)
def test_ranks_and_micro_steps_cover_the_global_batch_once(step, world_size, micro_batch_size, micro_steps):
    size = world_size * micro_batch_size * micro_steps
    lists = [
        rank_indices(step, micro_step, rank, world_size, micro_batch_size, size)
        for micro_step in range(micro_steps)
        for rank in range(world_size)
    ]
    assert all(len(indices) == micro_batch_size for indices in lists)
    assert [index for indices in lists for index in indices] == list(range(step * size, (step + 1) * size))


def test_any_world_size_trains_on_the_same_global_batches(mixture):
    def global_batch(step: int, world_size: int, micro_batch_size: int) -> torch.Tensor:
        micro_steps = 8 // (world_size * micro_batch_size)
        parts = [
            mixture.batch(rank_indices(step, micro_step, rank, world_size, micro_batch_size, 8)).tokens
            for micro_step in range(micro_steps)
            for rank in range(world_size)
        ]
        return torch.cat(parts)

    for step in range(5):
        expected = mixture.batch(range(8 * step, 8 * step + 8)).tokens
        for world_size, micro_batch_size in ((1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)):
            assert torch.equal(global_batch(step, world_size, micro_batch_size), expected)


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"global_batch_size: 10 is not a multiple of 4 workers x micro_batch_size 1"):
        rank_indices(0, 0, 0, 4, 1, 10)
    for micro_step, rank in ((2, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(IndexError):
            rank_indices(0, micro_step, rank, 4, 1, 8)


def test_a_batch_stacks_its_samples(mixture):
    batch = mixture.batch([3, 0, 17])
    assert batch.tokens.shape == (3, LENGTH + 1) and batch.sources.dtype == batch.tokens.dtype == torch.int64
    for row, index in enumerate([3, 0, 17]):
        tokens, source = mixture.sample(index)
        assert torch.equal(batch.tokens[row], tokens) and batch.sources[row] == source


# Reading ahead.


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_read_ahead" in thread.name]


@pytest.mark.parametrize("depth", [0, 1, 2, 50])
def test_reading_ahead_equals_reading_directly_and_the_thread_ends(mixture, depth):
    lists = [list(range(start, start + 4)) for start in range(0, 80, 4)]
    found = list(mixture.prefetch(lists, depth=depth))
    assert len(found) == len(lists)
    for batch, indices in zip(found, lists, strict=True):
        assert torch.equal(batch.tokens, mixture.batch(indices).tokens)
        assert torch.equal(batch.sources, mixture.batch(indices).sources)
    assert not reading_threads()


def test_closing_early_ends_the_thread_and_an_endless_plan_is_read_only_so_far(mixture):
    asked = []

    def endless() -> Iterator[list[int]]:
        for index in range(1 << 40):
            asked.append(index)
            yield [index]

    ahead = mixture.prefetch(endless(), depth=3)
    for _ in range(5):
        next(ahead)
    time.sleep(0.05)
    assert len(asked) <= 5 + 3 + 1, "five read, three in the queue, one in hand"
    assert len(reading_threads()) == 1
    ahead.close()
    assert not reading_threads()


def test_an_error_while_reading_ahead_comes_at_its_batch(mixture):
    def lists() -> Iterator[list[int]]:
        yield [0]
        yield [1]
        raise DataError("the disk went away")

    ahead = mixture.prefetch(lists(), depth=5)
    assert torch.equal(next(ahead).tokens, mixture.batch([0]).tokens)
    next(ahead)
    with pytest.raises(DataError, match="the disk went away"):
        next(ahead)
    assert not reading_threads()
    with pytest.raises(IndexError):
        list(mixture.prefetch([[0], [-1]]))


# What cannot be trained on says so.


def test_another_tokenizer_is_refused_with_the_override(tmp_path):
    make_store(tmp_path / "small", train=[["x" * 100]])
    make_store(tmp_path / "whole", train=[["x" * 1000]], tokenizer=Tokenizer.Config())

    def refusal(name: str, vocab_size: int | None) -> str:
        with pytest.raises(DataError) as caught:
            config = Mixture.Config(path=str(tmp_path / name), sequence_length=4, tokenizer=tokenizer(vocab_size))
            config.build()
        return str(caught.value)

    def tokenizer(vocab_size: int | None) -> Tokenizer.Config:
        return Tokenizer.Config(vocab_size=vocab_size)

    sentence = refusal("small", 4096)
    assert "'small' was prepared with vocab_size 300" in sentence and "--vocab-size 4096" in sentence
    assert "set data.tokenizer.vocab_size=300" in sentence
    assert "the whole vocabulary (no --vocab-size)" in refusal("small", None)
    assert "set data.tokenizer.vocab_size=null" in refusal("whole", 300)


def test_the_override_that_the_refusal_names_works(tmp_path):
    path = make_store(tmp_path / "whole", train=[["x y z " * 100]], tokenizer=Tokenizer.Config())
    tree = {"path": str(path), "sequence_length": 4, "tokenizer": {"vocab_size": None}}
    assert cfg.load(Mixture.Config, tree).build().sample(0).tokens.shape == (5,)


def test_another_release_of_the_tokenizer_is_refused(tmp_path, monkeypatch):
    path = make_store(tmp_path / "old", train=[["x" * 100]])
    monkeypatch.setattr("blues.data.tokenizer.PATTERN", r"\S+|\s+")
    with pytest.raises(DataError, match="'old' was prepared with another release of the tokenizer; prepare it again"):
        open_mixture(path)


def test_too_small_a_dataset_is_refused_with_the_remedy(folder):
    with pytest.raises(DataError) as caught:
        open_mixture(folder / "mix", sequence_length=100)
    assert str(caught.value) == (
        "the train split of dataset 'b' holds 89 tokens, too few for one sequence of 100 + 1; lower "
        "data.sequence_length, or prepare it with more input"
    )
    with pytest.raises(DataError, match=r"validation split of dataset 'a' holds 17 tokens.*--validation-fraction"):
        open_mixture(folder / "mix", sequence_length=17, split="validation")


def test_a_sequence_may_take_all_but_one_token(folder):
    assert open_mixture(folder / "c", sequence_length=40).num_windows == [1]
    with pytest.raises(DataError, match="holds 41 tokens, too few for one sequence of 41"):
        open_mixture(folder / "c", sequence_length=41)


def test_a_source_of_weight_zero_may_be_too_small(folder, tmp_path):
    merge([folder / "a", folder / "c"], tmp_path / "m", weights=[1, 0])
    mixture = open_mixture(tmp_path / "m", sequence_length=100)
    assert mixture.weights == [1.0, 0.0] and {mixture.sample(index).source for index in range(50)} == {0}


def test_no_path_no_dataset_and_an_impossible_length_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no dataset: name one with --data-cache-dir DIR"):
        Mixture.Config().build()
    with pytest.raises(DataError, match="does not exist; make it with `blues prepare"):
        open_mixture(tmp_path / "absent")
    with pytest.raises(ConfigError, match="sequence_length: 0 must be at least 1"):
        Mixture.Config(sequence_length=0)


def test_every_seed_is_measured_on_the_same_held_out_windows(folder):
    first, other = (open_mixture(folder / "mix", seed=seed, split="validation") for seed in (0, 1))
    assert [first.window_of(index) for index in range(20)] == [other.window_of(index) for index in range(20)]
