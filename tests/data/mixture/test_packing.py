"""Both packings against plain loops: no target is lost or comes twice, documents are cut only where they must be."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as hyp

from blues import config as cfg
from blues.data.mixture.batches import Mixture, Phase
from blues.data.mixture.packing import (
    IGNORED,
    BestFit,
    Packing,
    Stream,
    Windows,
    best_fit_decreasing,
    best_fit_naive,
    cut_documents,
    packing_statistics,
)
from blues.data.storage.store import Store
from blues.errors import ConfigError
from blues.kernels import linear_cross_entropy
from tests.data.datasets import make_store
from tuning import spaces
from tuning.experiments import resolve

LAW = settings(max_examples=60, deadline=None)
EOT = 7
lengths_of_documents = hyp.lists(hyp.integers(1, 30), max_size=25)


class Tokens:
    """What a packing needs of a store: documents of these lengths, whose tokens all differ and end in EOT."""

    manifest = {"tokenizer": {"eot_id": EOT}}

    def __init__(self, lengths: list[int]) -> None:
        self.ends = np.cumsum(np.array(lengths, dtype=np.int64), dtype=np.int64)
        self.tokens = np.arange(100, 100 + sum(lengths), dtype=np.uint32)
        self.tokens[self.ends - 1] = EOT

    def num_tokens(self, split: str) -> int:
        return len(self.tokens)

    def document_ends(self, split: str) -> np.ndarray:
        return self.ends

    def read_windows(self, split: str, starts: np.ndarray, length: int) -> np.ndarray:
        assert (starts >= 0).all() and (starts + length <= len(self.tokens)).all()
        return np.stack([self.tokens[start : start + length] for start in starts])

    def inputs_of(self, start: int, stop: int) -> list[int]:
        """What stands before each of the tokens [start, stop)."""
        return [EOT, *self.tokens.tolist()][start:stop]


def pack(packing: Packing.Config, lengths: list[int], length: int) -> tuple[Tokens, Windows]:
    tokens = Tokens(lengths)
    return tokens, packing.build().pack(tokens, "train", length)


def read(windows: Windows, chosen: list[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrays = [np.full((len(chosen), length), -7, dtype=dtype) for dtype in (np.int64, np.int64, np.int32)]
    windows.fill(np.array(chosen, dtype=np.int64), slice(None), *arrays)
    return arrays[0], arrays[1], arrays[2]


# stream


@LAW
@given(lengths=lengths_of_documents, length=hyp.integers(1, 12))
def test_a_stream_has_every_target_but_the_rest_once_and_counts_documents_by_their_ends(lengths, length):
    tokens, windows = pack(Stream.Config(), lengths, length)
    assert windows.num_windows == max(0, len(tokens.tokens) - 1) // length
    if not windows.num_windows:
        return
    inputs, targets, documents = read(windows, list(range(windows.num_windows)), length)
    used = windows.num_windows * length
    assert targets.ravel().tolist() == tokens.tokens[1 : used + 1].tolist()
    assert inputs.ravel().tolist() == tokens.tokens[:used].tolist()
    for row, numbers in zip(inputs.tolist(), documents.tolist(), strict=True):
        assert numbers == [row[: place + 1].count(EOT) for place in range(length)]
    assert windows.num_targets(np.arange(windows.num_windows)).tolist() == [length] * windows.num_windows
    assert windows.statistics().dropped == max(0, len(tokens.tokens) - 1) - used


@LAW
@given(lengths=lengths_of_documents, length=hyp.integers(1, 12))
def test_a_stream_counts_the_documents_it_cuts(lengths, length):
    tokens, windows = pack(Stream.Config(), lengths, length)
    cut = 0
    for start, end in zip([0, *tokens.ends.tolist()], tokens.ends.tolist(), strict=False):
        cut += len({(target - 1) // length for target in range(max(1, start), end)}) > 1
    found = windows.statistics()
    assert (found.truncated, found.documents, found.padding) == (cut, len(lengths), 0)
    assert found.truncated_share == cut / max(1, len(lengths)) and found.padding_share == 0


# best_fit


@LAW
@given(sizes=hyp.lists(hyp.integers(1, 40), max_size=80), capacity=hyp.integers(40, 60))
@example(sizes=[3] * 50, capacity=40)
@example(sizes=[20, 20, 20, 10, 10, 10, 10, 10, 5], capacity=40)
def test_fast_best_fit_decreasing_equals_one_piece_at_a_time(sizes, capacity):
    array = np.array(sizes, dtype=np.int32)
    found = best_fit_decreasing(array, capacity)
    assert found.tolist() == best_fit_naive(array, capacity).tolist()
    filled = np.bincount(found, weights=array)
    assert (filled > 0).all() and (filled <= capacity).all()


def test_half_a_million_documents_are_packed_in_seconds_and_with_hardly_any_padding():
    sizes = np.clip(np.random.default_rng(0).lognormal(6.3, 1.2, 500_000), 1, 2048).astype(np.int32)
    began = time.monotonic()
    bins = best_fit_decreasing(sizes, 2048)
    assert time.monotonic() - began < 5
    assert 1 - sizes.sum() / ((bins.max() + 1) * 2048) < 1e-3


@LAW
@given(lengths=lengths_of_documents, length=hyp.integers(1, 40))
@example(lengths=[1], length=40)
@example(lengths=[30], length=1)
def test_best_fit_has_every_token_as_a_target_once_after_the_one_before_it(lengths, length):
    tokens, windows = pack(BestFit.Config(), lengths, length)
    chosen = np.random.default_rng(0).permutation(windows.num_windows).tolist()
    inputs, targets, documents = read(windows, chosen, length)
    found: list[tuple[int, list[int], list[int]]] = []  # the document or piece, its inputs, its targets
    for row in range(len(chosen)):
        padded = targets[row] == IGNORED
        assert padded.tolist() == sorted(padded.tolist()), "padding comes last"
        assert (inputs[row][padded] == EOT).all()
        assert len(set(documents[row][padded])) <= 1
        assert not set(documents[row][padded]) & set(documents[row][~padded])
        for number in dict.fromkeys(documents[row][~padded].tolist()):
            here = documents[row] == number
            found.append((len(found), inputs[row][here].tolist(), targets[row][here].tolist()))
        assert windows.num_targets(np.array(chosen[row : row + 1])).tolist() == [int((~padded).sum())]
    expected = []
    for start, end in zip([0, *tokens.ends.tolist()], tokens.ends.tolist(), strict=False):
        for first in range(start, end, length):
            last = min(end, first + length)
            expected.append((tokens.inputs_of(first, last), tokens.tokens[first:last].tolist()))
    assert sorted((pair[1], pair[2]) for pair in found) == sorted(expected)


@LAW
@given(lengths=lengths_of_documents, length=hyp.integers(1, 12))
def test_best_fit_cuts_only_what_is_too_long(lengths, length):
    tokens, windows = pack(BestFit.Config(), lengths, length)
    found = windows.statistics()
    assert found.truncated == sum(size > length for size in lengths)
    assert found.padding == windows.num_windows * length - sum(lengths) and found.dropped == 0
    starts, sizes = cut_documents(tokens.ends, length)
    assert starts.dtype == np.int64 and sizes.dtype == np.int32 and sizes.sum() == sum(lengths)
    if lengths:
        assert found.windows * length >= sum(lengths)


def test_pieces_of_a_window_stand_in_the_order_of_the_split():
    _, windows = pack(BestFit.Config(), [3, 5, 2], 10)
    inputs, targets, documents = read(windows, [0], 10)
    assert inputs.tolist() == [[EOT, 100, 101, EOT, 103, 104, 105, 106, EOT, 108]]
    assert targets.tolist() == [[100, 101, EOT, 103, 104, 105, 106, EOT, 108, EOT]]
    assert documents.tolist() == [[0] * 3 + [1] * 5 + [2] * 2]


def test_a_piece_in_the_middle_of_a_document_follows_the_token_before_it():
    _, windows = pack(BestFit.Config(), [7], 4)
    inputs, targets, documents = read(windows, [0, 1], 4)
    assert inputs.tolist() == [[EOT, 100, 101, 102], [103, 104, 105, EOT]]
    assert targets.tolist() == [[100, 101, 102, 103], [104, 105, EOT, IGNORED]]
    assert documents.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


# Both.


def test_only_the_rows_that_are_named_are_filled():
    for packing in (Stream.Config(), BestFit.Config()):
        _, windows = pack(packing, [5, 9, 4], 4)
        whole = read(windows, [2, 0], 4)
        arrays = [np.full((5, 4), -7, dtype=dtype) for dtype in (np.int64, np.int64, np.int32)]
        windows.fill(np.array([2, 0]), np.array([3, 1]), *arrays)
        for array, expected in zip(arrays, whole, strict=True):
            assert array[[3, 1]].tolist() == expected.tolist() and (array[[0, 2, 4]] == -7).all()


def test_statistics_of_a_real_split(tmp_path: Path):
    store = Store.open(make_store(tmp_path / "a", train=[[[1] * 9, [2] * 3], [[3] * 5]]))
    best, stream = packing_statistics(store, "train", 8)
    assert (best.packing, best.windows, best.documents, best.truncated, best.padding, best.dropped) == (
        ("best_fit", 3, 3, 1, 4, 0)
    )
    assert (stream.packing, stream.windows, stream.truncated, stream.padding, stream.dropped) == ("stream", 2, 2, 0, 3)
    assert best.padding_share == 4 / 24 and best.truncated_share == 1 / 3


def test_packings_are_chosen_by_name():
    config = Mixture.Config().override({"packing": "best_fit"})
    assert config.packing == BestFit.Config() and cfg.load(Mixture.Config, cfg.dump(config)) == config
    with pytest.raises(ConfigError, match="unknown packing 'bestfit'.*Did you mean 'best_fit'"):
        Mixture.Config().override({"packing": "bestfit"})


def test_the_options_are_reached_by_overrides_and_by_sweeps():
    words = ["data.packing=best_fit", "data.isolate_documents=true", "data.phases=[{start: 80, weights: [1, 0.5]}]"]
    data = resolve("tiny", [*words, "data.max_cached_batches=2", "data.pin_memory=false"]).data
    assert data.packing == BestFit.Config() and data.isolate_documents
    assert data.phases == (Phase(start=80, weights=(1.0, 0.5)),)
    assert (data.max_cached_batches, data.pin_memory) == (2, False)
    base = resolve("tiny")
    space = spaces.parse("data.packing=stream,best_fit*data.isolate_documents=false,true", base)
    tried = {(base.override(point).data.packing, base.override(point).data.isolate_documents) for point in space}
    assert tried == set(itertools.product((Stream.Config(), BestFit.Config()), (False, True)))
    weights = spaces.parse("data.phases=[{start: 0, weights: [1, 1]}],[{start: 0, weights: [3, 1]}]", base)
    assert [base.override(point).data.phases[0].weights for point in weights] == [(1, 1), (3, 1)]


def test_the_model_ignores_what_is_no_target():
    assert IGNORED == linear_cross_entropy.IGNORED
