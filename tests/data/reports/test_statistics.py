"""The numbers of a split, and what splits share, against plain loops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hyp

from blues.data.reports.statistics import Lengths, coverage, describe, entropy, histogram, overlap
from blues.data.storage.checking import Documents
from tests.data.datasets import TOKENIZER

contents = hyp.lists(hyp.lists(hyp.integers(0, 6), max_size=12), min_size=1, max_size=4)


@given(hyp.lists(hyp.integers(1, 1 << 40), max_size=50))
def test_the_histogram_counts_by_powers_of_two(lengths):
    counts = Counter(length.bit_length() - 1 for length in lengths)
    assert histogram(np.array(lengths, dtype=np.int64)) == tuple(counts[k] for k in range(max(counts, default=-1) + 1))


@given(hyp.lists(hyp.integers(1, 10_000), min_size=1, max_size=60))
def test_lengths_are_those_of_numpy(lengths):
    found = Lengths.of(np.array(lengths, dtype=np.int64))
    assert found.mean == pytest.approx(np.mean(lengths)) and found.median == np.median(lengths)
    assert found.p95 == pytest.approx(np.percentile(lengths, 95)) and found.longest == max(lengths)
    assert Lengths.of(np.zeros(0, dtype=np.int64)) == Lengths(0.0, 0.0, 0.0, 0, ())


@given(hyp.lists(hyp.integers(0, 50), min_size=1, max_size=30))
def test_entropy_and_coverage_are_those_of_the_definition(counts):
    total = sum(counts)
    expected = -sum(count / total * math.log2(count / total) for count in counts if count) if total else 0.0
    assert entropy(np.array(counts)) == pytest.approx(expected, abs=1e-12)
    points = coverage(np.array(counts))
    ranked = sorted(counts, reverse=True)
    for n, share in points:
        assert share == pytest.approx(sum(ranked[:n]) / total)
    if total:
        assert points[-1] == (sum(count > 0 for count in counts), pytest.approx(1.0))
        assert [n for n, _ in points] == sorted({n for n, _ in points})


@given(train=contents, validation=contents)
def test_overlap_is_that_of_plain_sets(train, validation):
    splits = [*train, *validation]
    names = [(str(n), "train") for n in range(len(train))] + [(str(n), "validation") for n in range(len(validation))]
    found = overlap(names, [np.array(split, dtype=np.uint64) for split in splits])
    seen: set[int] = set()
    held_out = {digest for split in validation for digest in split}
    for row, (split, (_, kind)) in enumerate(zip(splits, names, strict=True)):
        for column, other in enumerate(splits):
            copies = len(split) - len(set(split)) if row == column else sum(digest in other for digest in split)
            assert found.shared[row][column] == copies
        copies = 0
        for digest in split:
            copies += digest in seen
            seen.add(digest)
        assert found.duplicates[row] == copies
        assert found.leaked[row] == (sum(digest in held_out for digest in split) if kind == "train" else 0)


def test_a_split_is_described_by_its_documents_and_counts():
    tokenizer = TOKENIZER.build()
    counts_V = np.zeros(300, dtype=np.int64)
    counts_V[[tokenizer.eot_id, 65, 66]] = [2, 5, 3]
    documents = Documents(np.array([4, 6]), np.array([3, 9]), np.array([1, 1], dtype=np.uint64))
    found = describe("name", "train", 0.5, documents, counts_V, tokenizer)
    assert (found.documents, found.tokens, found.text_bytes, found.used_ids, found.vocabulary) == (2, 10, 12, 3, 300)
    assert [(token.id, token.count) for token in found.top_tokens] == [(65, 5), (66, 3), (tokenizer.eot_id, 2)]
    assert found.top_tokens[0].text == tokenizer.decode([65]) and found.bytes_per_token == 12 / 8
    empty = Documents(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.uint64)))
    found = describe("name", "train", 0.5, empty, np.zeros(300, dtype=np.int64), tokenizer)
    assert (found.tokens, found.top_tokens, found.coverage, found.entropy, found.bytes_per_token) == (
        0,
        (),
        (),
        0.0,
        0.0,
    )
