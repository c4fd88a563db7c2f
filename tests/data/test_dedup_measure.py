"""The figures of the search for near duplicates, and the brute force they are measured against."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from blues.data.dedup_measure import Figures, measure, measure_datasketch, similar_pairs
from blues.data.minhash import Settings
from tests.data.test_dedup import near_copies
from tests.data.test_minhash import naive_jaccard


def arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(document, dtype=np.uint32) for document in documents]


@settings(max_examples=60, deadline=None)
@given(
    some.lists(some.lists(some.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=8),
    some.integers(1, 4),
    some.sampled_from([0.2, 0.5, 1.0]),
)
def test_brute_force_finds_the_pairs_of_the_sets_of_tuples(documents, ngram, similarity):
    found = similar_pairs(arrays(documents), ngram, similarity)
    pairs = combinations(range(len(documents)), 2)
    expected = [[a, b] for a, b in pairs if naive_jaccard(documents[a], documents[b], ngram) >= similarity]
    assert found.tolist() == expected


def test_recall_at_the_promised_similarity():
    documents = [document for j in (0.81, 0.85, 0.9, 0.95) for document in near_copies(j, pairs=100, seed=int(100 * j))]
    figures = measure(arrays(documents), text_bytes=4 * 300 * len(documents), settings=Settings())
    assert figures.pairs >= 350 and figures.recall >= 0.99 and figures.left == figures.pairs - figures.found
    assert figures.bytes_per_second == figures.text_bytes / figures.seconds > 0


def test_datasketch_is_measured_on_the_same_documents():
    pytest.importorskip("datasketch")
    documents = near_copies(0.9, pairs=20)
    figures = measure_datasketch(arrays(documents), 1000, Settings())
    assert figures.documents == 40 and figures.pairs == 20 and figures.found >= 15 and figures.left is None


def test_without_similar_pairs_nothing_is_missed():
    assert Figures(documents=2, text_bytes=1, seconds=1.0, pairs=0, found=0, left=0).recall == 1.0
