"""Shingles, signatures and bands: against sets of tuples, and against the probabilities that the theory promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from blues.data.dedup import minhash
from blues.data.dedup.minhash import Bands, Settings
from blues.errors import ConfigError

tokens = some.lists(some.integers(0, 9), max_size=30)


def naive_shingles(document: list[int], ngram: int) -> set[tuple[int, ...]]:
    if len(document) < ngram:
        return {tuple(document)}
    return {tuple(document[start : start + ngram]) for start in range(len(document) - ngram + 1)}


def naive_jaccard(left: list[int], right: list[int], ngram: int) -> float:
    one, other = naive_shingles(left, ngram), naive_shingles(right, ngram)
    return len(one & other) / len(one | other)


def end_to_end(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = np.array([token for document in documents for token in document], dtype=np.uint32)
    return flat, np.cumsum([len(document) for document in documents])


def overlapping(similarity: float, shingles: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of hashes with this Jaccard index."""
    rng = np.random.default_rng(seed)
    common = round(2 * shingles * similarity / (1 + similarity))
    left = rng.integers(0, 2**64, shingles, dtype=np.uint64)
    right = left.copy()
    right[common:] = rng.integers(0, 2**64, shingles - common, dtype=np.uint64)
    return left, right


@settings(max_examples=100, deadline=None)
@given(tokens, tokens, some.integers(1, 7))
def test_jaccard_is_that_of_the_sets_of_tuples(left, right, ngram):
    sets = [minhash.shingle_set(np.array(document, dtype=np.uint32), ngram) for document in (left, right)]
    for found, document in zip(sets, (left, right), strict=True):
        assert len(found) == len(naive_shingles(document, ngram)) and np.all(found[1:] > found[:-1])
    assert minhash.jaccard(*sets) == pytest.approx(naive_jaccard(left, right, ngram))


@settings(max_examples=100, deadline=None)
@given(some.lists(tokens, min_size=1, max_size=6), some.integers(1, 7))
def test_documents_end_to_end_have_the_shingles_that_each_has_alone(documents, ngram):
    flat, ends = end_to_end(documents)
    hashes = minhash.flat_shingles(flat, ends, ngram)
    assert len(hashes) == len(flat)
    for document, part in zip(documents, np.split(hashes, ends[:-1]), strict=True):
        if document:
            alone = minhash.shingle_set(np.array(document, dtype=np.uint32), ngram)
            assert np.array_equal(np.unique(part), alone)


@settings(max_examples=50, deadline=None)
@given(some.lists(tokens, min_size=1, max_size=6), some.integers(1, 6))
def test_a_signature_depends_on_the_set_of_shingles_alone(documents, ngram):
    flat, ends = end_to_end(documents)
    together = minhash.signatures(flat, ends, ngram, 32)
    assert together.shape == (len(documents), 32) and together.dtype == np.uint32
    for row, document in enumerate(documents):
        alone = minhash.signatures(*end_to_end([document]), ngram, 32)
        assert np.array_equal(together[row], alone[0])
        for other in range(row):
            if naive_shingles(document, ngram) == naive_shingles(documents[other], ngram):
                assert np.array_equal(together[row], together[other])


@pytest.mark.parametrize("similarity", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("shingles", [15, 150, 3000])
def test_places_of_a_signature_agree_with_the_probability_of_the_similarity(similarity, shingles):
    """One token is one shingle here, so the sets can be given."""
    from rensa import RMinHash

    places, trials, agreed, marked, true = 128, 60, [], [], 0.0
    for trial in range(trials):
        left, right = overlapping(similarity, shingles, trial)
        true += minhash.jaccard(np.sort(left), np.sort(right)) / trials
        both, offsets = np.concatenate((left, right)), np.array([0, shingles, 2 * shingles], dtype=np.uint64)
        rows = RMinHash.digest_matrix_from_flat_token_hashes(both, offsets, places, trial).to_rows()
        signature = np.array(rows, dtype=np.uint32)
        agreed.append(np.mean(signature[0] == signature[1]))
        marks = minhash.marks(signature)
        marked.append(minhash.estimate(marks[:1], marks[1:])[0])
    error = 4 * (true * (1 - true) / (places * trials)) ** 0.5
    assert np.mean(agreed) == pytest.approx(true, abs=error)
    assert np.mean(marked) == pytest.approx(true, abs=error)
    assert np.std(agreed) <= 1.5 * (true * (1 - true) / places) ** 0.5


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8])
def test_bands_find_pairs_as_often_as_the_s_curve_says(similarity):
    from rensa import RMinHash

    bands, trials = Settings(threshold=0.7).bands, 400
    pairs = [overlapping(similarity, 120, seed) for seed in range(trials)]
    flat = np.concatenate([part for pair in pairs for part in pair])
    offsets = np.arange(0, len(flat) + 1, 120).astype(np.uint64)
    signatures = np.array(RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, 128, 7).to_rows(), np.uint32)
    keys = minhash.band_keys(signatures, bands)
    assert keys.shape == (bands.bands, 2 * trials)
    found = np.mean(np.any(keys[:, 0::2] == keys[:, 1::2], axis=0))
    true = np.mean([minhash.jaccard(np.sort(left), np.sort(right)) for left, right in pairs])
    assert found == pytest.approx(bands.recall(float(true)), abs=0.06)


def test_keys_are_equal_exactly_where_the_whole_band_is():
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 3, (50, 13), dtype=np.uint32)
    keys = minhash.band_keys(signatures, Bands(4, 3))
    for band in range(4):
        parts = [tuple(row[3 * band : 3 * band + 3]) for row in signatures.tolist()]
        for one in range(50):
            for other in range(50):
                assert (keys[band, one] == keys[band, other]) == (parts[one] == parts[other])


@settings(max_examples=60, deadline=None)
@given(some.integers(16, 512), some.floats(0.3, 1.0))
def test_the_bands_chosen_find_a_pair_at_the_threshold_and_no_longer_rows_would(permutations, threshold):
    bands = Bands.choose(permutations, threshold)
    assert bands.bands * bands.rows <= permutations
    assert bands.recall(threshold) >= minhash.RECALL
    longer = range(bands.rows + 1, permutations + 1)
    assert all(Bands(permutations // rows, rows).recall(threshold) < minhash.RECALL for rows in longer)


def test_the_default_finds_more_than_the_figure_that_is_promised():
    bands = Settings().bands
    assert (bands.bands, bands.rows) == (25, 5)
    assert bands.recall(0.7) > 0.98 and bands.recall(0.8) > 0.999


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"threshold": 0}, "threshold 0 is not a similarity"),
        ({"threshold": 1.01}, "threshold 1.01 is not a similarity"),
        ({"threshold": float("nan")}, "threshold nan is not a similarity"),
        ({"ngram": 0}, "ngram 0 is not a number of tokens"),
        ({"permutations": 0}, "permutations 0 is outside 1 ... 4096"),
        ({"permutations": 4, "threshold": 0.3}, "4 permutations cannot find pairs of similarity 0.3"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Settings(**values)
