"""Samples are a pure function of their index: weights hold at every prefix, no window comes twice in an epoch."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import assume, given, settings
from hypothesis import strategies as hyp

from blues import config as cfg
from blues.data.merging.merge import merge
from blues.data.mixture.batches import Batch, Mixture, rank_indices
from blues.data.mixture.packing import IGNORED, BestFit
from blues.data.mixture.schedule import permute
from blues.data.storage.store import Store
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError
from tests.data.datasets import make_numbered, make_store
from tests.data.mixtures import FIRST, LENGTH, WINDOWS, equal, first_tokens, joined, make_folder, open_mixture, phases

LAW = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("batches"))


@pytest.fixture(scope="module")
def mixture(folder) -> Mixture:
    return open_mixture(folder / "mix")


KINDS = {
    "stream": {},
    "isolated": {"isolate_documents": True},
    "best_fit": {"packing": BestFit.Config()},
    "isolated best_fit": {"packing": BestFit.Config(), "isolate_documents": True},
    "phases": {"phases": phases((7, [1, 0]), (30, [0.25, 0.75]), (31, [0, 1]))},
}


@pytest.fixture(scope="module")
def mixtures(folder) -> dict[str, Mixture]:
    return {name: open_mixture(folder / "prose", **settings) for name, settings in KINDS.items()}


kinds = hyp.sampled_from(sorted(KINDS))


# Which samples.


@LAW
@given(kind=kinds, indices=hyp.lists(hyp.integers(0, 5000), max_size=12))
def test_windows_are_those_found_one_at_a_time(mixtures, kind, indices):
    """Against counting draws from the first sample on and the scalar permutation."""
    mixture = mixtures[kind]
    last = max(indices, default=-1)
    sources = mixture.windows_of(range(last + 1))[0].tolist()
    drawn = [0] * len(mixture.source_names)
    expected = {}
    for index, source in enumerate(sources):
        epoch, place = divmod(drawn[source], mixture.num_windows[source])
        drawn[source] += 1
        if index in indices:
            key = f"{mixture.config.seed}:{mixture.dataset.stores[source].fingerprint}:train:{epoch}"
            order_key = xxhash.xxh3_64_intdigest(key.encode())
            expected[index] = source, permute(place, mixture.num_windows[source], order_key)
    found = zip(*(array.tolist() for array in mixture.windows_of(indices)), strict=True)
    assert list(found) == [expected[index] for index in indices]


def test_the_tokens_of_a_window_are_those_of_the_store(folder):
    store, mixture = Store.open(folder / "texts"), open_mixture(folder / "texts", isolate_documents=True)
    batch = mixture.batch(range(50))
    assert batch.inputs.dtype == batch.targets.dtype == batch.sources.dtype == torch.int64
    assert batch.documents.dtype == torch.int32
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous(), "to be pinned and copied as they are"
    eot = store.manifest["tokenizer"]["eot_id"]
    for row, window in enumerate(mixture.windows_of(range(50))[1].tolist()):
        tokens = store.read("train", window * LENGTH, window * LENGTH + LENGTH + 1).tolist()
        assert batch.inputs[row].tolist() == tokens[:-1] and batch.targets[row].tolist() == tokens[1:]
        assert batch.documents[row].tolist() == [tokens[: place + 1].count(eot) for place in range(LENGTH)]


@settings(max_examples=25, deadline=None)
@given(weights=hyp.lists(hyp.decimals(0, 1, places=2), min_size=3, max_size=3))
def test_weights_of_a_merged_dataset_hold_by_tokens_at_every_prefix(folder, tmp_path_factory, weights):
    assume(any(weights))
    output = tmp_path_factory.mktemp("weights") / "mix"
    merge([folder / name for name in WINDOWS], output, weights=[float(weight) for weight in weights])
    mixture = open_mixture(output)
    asked = [Fraction(weight) / Fraction(sum(weights)) for weight in weights]
    assert mixture.weights_at() == pytest.approx([float(weight) for weight in asked])
    assert mixture.num_targets(range(700)) == 700 * LENGTH
    for source, weight in enumerate(asked):
        tokens = np.cumsum(mixture.windows_of(range(700))[0] == source) * LENGTH
        for n, count in enumerate(tokens.tolist(), start=1):
            assert abs(Fraction(count, n * LENGTH) - weight) <= Fraction(1, n)


@settings(max_examples=10, deadline=None)
@given(weights=hyp.lists(hyp.floats(0.001, 1), min_size=3, max_size=3))
def test_odd_weights_are_exactly_those_that_the_merge_recorded(folder, tmp_path_factory, weights):
    output = tmp_path_factory.mktemp("weights") / "mix"
    recorded = merge([folder / name for name in WINDOWS], output, weights=weights, report=lambda message: None).weights
    counts = [0, 0, 0]
    for n, source in enumerate(open_mixture(output).windows_of(range(3000))[0].tolist(), start=1):
        counts[source] += 1
        assert all(abs(count - weight * n) <= 1 for count, weight in zip(counts, recorded, strict=True))
    period = math.lcm(*(weight.denominator for weight in recorded))
    sources = open_mixture(output).windows_of(10**15 + np.arange(period))[0]
    assert np.bincount(sources, minlength=3).tolist() == [period * weight for weight in recorded], "for ever"


def test_every_epoch_of_every_source_visits_each_window_once(mixture):
    """Read from the tokens themselves: the first token of a sample names its window."""
    batch = mixture.batch(range(400))
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for token, source in zip(batch.inputs[:, 0].tolist(), batch.sources.tolist(), strict=True):
        seen[source].append(token)
    for (name, windows), drawn in zip(WINDOWS.items(), seen.values(), strict=True):
        epochs = [drawn[start : start + windows] for start in range(0, len(drawn) - windows + 1, windows)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert sorted(epoch) == list(range(FIRST[name], FIRST[name] + windows))
        assert epochs[0] != epochs[1], "every epoch has an order of its own"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_and_nothing_comes_twice_within_an_epoch(mixtures, kind):
    """For both packings, and whatever the phases: the windows of a source in its own order of draws."""
    mixture = mixtures[kind]
    sources, windows = mixture.windows_of(range(1500))
    for source, size in enumerate(mixture.num_windows):
        drawn = windows[sources == source].tolist()
        epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) >= 2 or kind == "phases"
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        rest = drawn[len(epochs) * size :]
        assert len(set(rest)) == len(rest)


def test_windows_overlap_by_one_token_so_that_no_target_is_lost(folder):
    store, mixture = Store.open(folder / "c"), open_mixture(folder / "c")
    tokens = store.read("train", 0, store.num_tokens("train")).tolist()
    order = mixture.windows_of(range(WINDOWS["c"]))[1]
    targets = mixture.batch(range(WINDOWS["c"])).targets[np.argsort(order)]
    assert targets.ravel().tolist() == tokens[1:]


def test_an_epoch_of_best_fit_has_every_token_as_a_target_once(folder):
    store = Store.open(folder / "texts")
    mixture = open_mixture(folder / "texts", packing=BestFit.Config())
    batch = mixture.batch(range(mixture.num_samples_per_epoch))
    targets = batch.targets[batch.targets != IGNORED]
    assert sorted(targets.tolist()) == sorted(store.read("train", 0, store.num_tokens("train")).tolist())
    assert mixture.num_targets(range(mixture.num_samples_per_epoch)) == len(targets)
    assert (batch.targets == IGNORED).any(), "some are padded"


@LAW
@given(kind=kinds, indices=hyp.lists(hyp.integers(0, 10**12), min_size=1, max_size=9))
def test_a_batch_depends_on_its_indices_alone(mixtures, kind, indices):
    alone = [mixtures[kind].batch([index]) for index in indices]
    assert equal(mixtures[kind].batch(indices), joined(alone))
    copied = pickle.loads(pickle.dumps(mixtures[kind]))
    assert equal(copied.batch(indices), joined(alone))


def test_an_empty_batch_and_a_negative_index(mixture):
    assert mixture.batch([]).inputs.shape == (0, LENGTH)
    for call in (mixture.batch, mixture.windows_of):
        with pytest.raises(IndexError, match="sample -1: indices start at 0"):
            call([3, -1])


DIGEST = """
import hashlib, sys
from blues import config as cfg
from blues.data.mixture.batches import Mixture
mixture = cfg.from_yaml(Mixture.Config, sys.argv[1]).build()
digest = hashlib.sha256()
for batch in mixture.prefetch([range(start, start + 50) for start in range(0, 1000, 50)]):
    for tensor in batch:
        digest.update(b"" if tensor is None else tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_first_thousand_samples_are_the_same_in_every_process(mixtures):
    kinds = ("phases", "isolated best_fit")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST, cfg.to_yaml(mixtures[kind].config)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"},
        )
        for number, kind in enumerate(kinds)
    ]
    for run, kind in zip(runs, kinds, strict=True):
        digest = hashlib.sha256()
        for start in range(0, 1000, 50):
            for tensor in mixtures[kind].batch(range(start, start + 50)):
                digest.update(b"" if tensor is None else tensor.numpy().tobytes())
        assert run.communicate()[0].strip() == digest.hexdigest() and run.returncode == 0


def test_samples_do_not_depend_on_where_the_data_lie(folder, tmp_path, mixture):
    for name, windows in WINDOWS.items():
        make_numbered(tmp_path / "moved" / name, windows=windows, length=LENGTH, first=FIRST[name])
    merge([tmp_path / "moved" / name for name in WINDOWS], tmp_path / "m", weights=[5, 3, 2])
    moved = open_mixture(tmp_path / "m")
    assert moved.fingerprint == mixture.fingerprint
    assert equal(moved.batch(range(60)), mixture.batch(range(60)))


def test_the_seed_the_weights_the_length_and_the_packing_change_the_fingerprint(folder, tmp_path, mixture):
    merge([folder / name for name in WINDOWS], tmp_path / "m", weights=[0.5, 0.2, 0.3])
    prints = [
        mixture.fingerprint,
        open_mixture(folder / "mix", seed=1).fingerprint,
        open_mixture(folder / "mix", sequence_length=4).fingerprint,
        open_mixture(folder / "mix", packing=BestFit.Config()).fingerprint,
        open_mixture(folder / "mix", phases=phases((1000, [1, 1, 1]))).fingerprint,
        open_mixture(tmp_path / "m").fingerprint,
        open_mixture(folder / "a").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert open_mixture(folder / "mix", max_cached_batches=1, pin_memory=False).fingerprint == mixture.fingerprint
    other = open_mixture(folder / "mix", seed=1)
    assert first_tokens(other, range(50)) != first_tokens(mixture, range(50))


def test_a_single_dataset_is_a_mixture_of_one(folder):
    single = open_mixture(folder / "b")
    assert (single.source_names, single.weights_at(), single.num_windows) == (["b"], [1.0], [11])
    assert single.num_samples_per_epoch == 11
    assert sorted(first_tokens(single, range(11))) == list(range(100, 111))


def test_validation_is_another_split_with_its_own_windows(folder):
    held_out = open_mixture(folder / "mix", split="validation")
    assert held_out.num_windows == [2, 2, 2] and held_out.source_names == ["a", "b", "c"]
    assert set(first_tokens(held_out, range(20))) == {0, 1, 100, 101, 200, 201}


def test_every_seed_and_every_phase_is_measured_on_the_same_held_out_windows(folder, mixture):
    changes = ({}, {"seed": 1}, {"phases": phases((0, [0, 0, 1]), (9, [1, 1, 0]))})
    held_out = [open_mixture(folder / "mix", split="validation", **change) for change in changes]
    assert all(equal(other.batch(range(20)), held_out[0].batch(range(20))) for other in held_out[1:])


# Ranks and batches.


@settings(max_examples=50, deadline=None)
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


@LAW
@given(
    kind=kinds,
    spread=hyp.sampled_from([(1, 12), (1, 1), (1, 4), (2, 6), (2, 3), (3, 4), (3, 1), (4, 3), (4, 1)]),
    start=hyp.integers(0, 40),
    ahead=hyp.integers(0, 9),
)
def test_any_workers_resume_point_and_reading_ahead_give_the_same_global_batches(mixtures, kind, spread, start, ahead):
    """Two updates of 12 samples from any update on, by every worker of a run, against the whole batch at once."""
    world_size, micro_batch_size = spread
    micro_steps = 12 // (world_size * micro_batch_size)
    config = mixtures[kind].config.replace(max_cached_batches=ahead)
    found: dict[tuple[int, int, int], Batch] = {}
    for rank in range(world_size):
        plan = [(step, micro) for step in (start, start + 1) for micro in range(micro_steps)]
        lists = [rank_indices(step, micro, rank, world_size, micro_batch_size, 12) for step, micro in plan]
        for (step, micro), batch in zip(plan, config.build().prefetch(lists), strict=True):
            found[step, micro, rank] = batch
    for step in (start, start + 1):
        own = [found[key] for key in sorted(found) if key[0] == step]
        assert equal(joined(own), mixtures[kind].batch(range(12 * step, 12 * step + 12)))


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"global_batch_size: 10 is not a multiple of 4 workers x micro_batch_size 1"):
        rank_indices(0, 0, 0, 4, 1, 10)
    for micro_step, rank in ((2, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(IndexError):
            rank_indices(0, micro_step, rank, 4, 1, 8)


# Reading ahead.


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_reading_ahead_equals_reading_directly(folder, mixture, ahead):
    lists = [list(range(start, start + 4)) for start in range(0, 8000, 4)]
    found = list(open_mixture(folder / "mix", max_cached_batches=ahead).prefetch(lists))
    assert len(found) == len(lists)
    assert all(equal(batch, mixture.batch(indices)) for batch, indices in zip(found, lists, strict=True))


def test_an_endless_plan_is_read_only_so_far(folder, monkeypatch):
    mixture, read = open_mixture(folder / "mix", max_cached_batches=3), []
    own = mixture.read
    monkeypatch.setattr(mixture, "read", lambda *plan: read.append(plan) or own(*plan))
    ahead = mixture.prefetch([index] for index in range(1 << 40))
    for _ in range(5):
        next(ahead)
    ahead.close()
    assert 5 <= len(read) <= 5 + 3


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_an_error_while_reading_ahead_comes_at_its_batch(folder, mixture, ahead, monkeypatch):
    def lists(last: list[int]) -> Iterator[list[int]]:
        yield [0]
        yield [1]
        if not last:
            raise DataError("the plan ended")
        yield last

    eager = open_mixture(folder / "mix", max_cached_batches=ahead)

    def check(last: list[int], error: type[Exception], words: str) -> None:
        batches = eager.prefetch(lists(last))
        assert equal(next(batches), mixture.batch([0])) and equal(next(batches), mixture.batch([1]))
        with pytest.raises(error, match=words):
            next(batches)

    check([], DataError, "the plan ended")
    check([-1], IndexError, "indices start at 0")
    own = eager.read
    calls = iter(range(100))

    def broken(*plan) -> Batch:
        if next(calls) == 2:
            raise OSError("the disk went away")
        return own(*plan)

    monkeypatch.setattr(eager, "read", broken)
    check([2], OSError, "the disk went away")


def test_pinning_needs_cuda(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert next(open_mixture(folder / "mix").prefetch([[0]], torch.device("cpu"))).inputs.shape == (1, LENGTH)
    with pytest.raises(ConfigError, match="data.pin_memory=true needs CUDA, and there is none here"):
        open_mixture(folder / "mix", pin_memory=True).prefetch([[0]], torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 4])
def test_batches_for_cuda_come_in_pinned_memory_and_arrive_whole(folder, mixtures, ahead):
    device = torch.device("cuda")
    for pin_memory in ("auto", True, False):
        config = mixtures["isolated best_fit"].config.replace(max_cached_batches=ahead, pin_memory=pin_memory)
        lists = [range(start, start + 64) for start in range(0, 6400, 64)]
        for batch, indices in zip(config.build().prefetch(lists, device), lists, strict=True):
            assert all(tensor.is_pinned() == bool(pin_memory) for tensor in batch)
            there = batch.to(device)
            del batch  # its memory may be used again only after the copy
            assert equal(there.to(torch.device("cpu")), mixtures["isolated best_fit"].batch(indices))


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
    assert cfg.load(Mixture.Config, tree).build().batch([0]).inputs.shape == (1, 4)


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
    assert mixture.weights_at() == [1.0, 0.0] and set(mixture.batch(range(50)).sources.tolist()) == {0}


def test_no_path_no_dataset_and_an_impossible_length_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no dataset: name one with --data-cache-dir DIR"):
        Mixture.Config().build()
    with pytest.raises(DataError, match="does not exist; make it with `blues prepare"):
        open_mixture(tmp_path / "absent")
    with pytest.raises(ConfigError, match="sequence_length: 0 must be at least 1"):
        Mixture.Config(sequence_length=0)
    with pytest.raises(ConfigError, match="max_cached_batches: -1 must be at least 0"):
        Mixture.Config(max_cached_batches=-1)


def test_weights_that_no_merge_of_this_release_wrote_are_refused(folder, monkeypatch):
    dataset = merge([folder / "a", folder / "b"], folder / "odd", strategy="equal", overwrite=True)
    odd = Fraction(1, 65_537)
    changed = type(dataset)(**{**vars(dataset), "weights": (odd, 1 - odd)})
    monkeypatch.setattr("blues.data.merging.merge.open_dataset", lambda path: changed)
    with pytest.raises(DataError, match="has weights with the common denominator 65,537, more than 65,536; merge"):
        open_mixture(folder / "odd")
