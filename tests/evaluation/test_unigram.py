"""The floor without context: entropies of known distributions, and of mixtures of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.data.merging.merge import merge
from blues.data.storage.store import Store
from blues.errors import DataError
from blues.evaluation import unigram
from blues.evaluation.unigram import cross_entropy, token_counts, unigram_entropy
from tests.evaluation.stores import make_store


def test_entropy_of_known_frequencies(tmp_path):
    path = make_store(tmp_path / "a", train=[[1, 1, 1]], validation=[[7, 8, 9], [7, 8, 9]])
    # held out: 7, 8, 9 and the end of text, twice each; trained: 1 three times, the end once, 300 ids plus one each
    found = unigram_entropy(path)
    assert found.own == pytest.approx(math.log(4))
    assert found.trained == pytest.approx(-(3 / 4 * math.log(1 / 304) + 1 / 4 * math.log(2 / 304)))


def test_a_mixture_is_the_sources_mixed_by_weight(tmp_path):
    first = make_store(tmp_path / "a", train=[[1]], validation=[[7] * 3])
    second = make_store(tmp_path / "b", train=[[2]], validation=[[8] * 300])
    dataset = merge([first, second], tmp_path / "both", weights=[3, 1])
    held = np.array([0.75 * 3 / 4, 0.25 * 300 / 301, 0.75 / 4 + 0.25 / 301])
    assert unigram_entropy(dataset).own == pytest.approx(-(held * np.log(held)).sum())
    alone = merge([first, second], tmp_path / "alone", weights=[1, 0])
    assert unigram_entropy(alone).own == pytest.approx(unigram_entropy(first).own)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=30))
def test_nothing_predicts_a_text_better_than_its_own_frequencies(pairs):
    held, other = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    if not held.sum():
        held[0] = 1
    held, other = held / held.sum(), other / other.sum()
    assert cross_entropy(held, held) <= cross_entropy(held, other) + 1e-12


def test_an_id_that_is_never_predicted_costs_everything():
    assert cross_entropy(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == math.inf


def test_counting_goes_block_by_block_and_skips_evenly_when_there_is_too_much(tmp_path, monkeypatch):
    store = Store.open(make_store(tmp_path / "a", train=[list(range(250))] * 8, validation=[[1]]))
    whole = token_counts(store, "train", 300)
    monkeypatch.setattr(unigram, "BLOCK", 100)
    assert (token_counts(store, "train", 300) == whole).all() and whole.sum() == 8 * 251
    monkeypatch.setattr(unigram, "MAX_COUNTED", 500)
    assert token_counts(store, "train", 300).sum() == 500


def test_a_split_without_tokens_is_named(tmp_path):
    path = make_store(tmp_path / "a", train=[[1]], validation=[])
    with pytest.raises(DataError, match="validation split of dataset .*holds no tokens"):
        unigram_entropy(path)
