"""The copies have all similarities, brute force knows them, and what Blues finds is counted right."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from blues.data.storage.store import Store
from tests.data.datasets import make_store
from tuning.benchmarks.data import dedup, duplicates
from tuning.benchmarks.worker import Meter


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The folder of a dataset of 40 documents of 200 random tokens with a copy of most, and what was made."""
    folder = tmp_path_factory.mktemp("copies")
    documents = [np.random.default_rng(seed).integers(0, 256, 200).tolist() for seed in range(40)]
    make_store(folder / "source", train=[documents], validation=[[[1, 2, 3]]])
    made = duplicates.write_copies(Meter, str(folder / "source"), str(folder / "made"), 40, copies=0.8, seed=0)
    found = duplicates.brute_force(Meter, str(folder / "made"), str(folder / "known.npz"))
    return folder, made, found


def sets(folder) -> list[set[bytes]]:
    documents = [document.tokens[:-1] for document in Store.open(folder / "made").documents("train")]
    return [{tokens[start : start + 5].tobytes() for start in range(len(tokens) - 4)} for tokens in documents]


def test_the_copies_are_a_whole_dataset_and_the_same_arrays(copies):
    folder, made, _ = copies
    store = Store.open(folder / "made")
    assert store.check() == [] and store.num_documents("train") == made["documents"] > 60
    assert np.array_equal(np.load(folder / "made/ends.npy"), store.document_ends("train"))
    assert np.array_equal(np.load(folder / "made/tokens.npy"), store.read("train", 0, store.num_tokens("train")))


def test_brute_force_is_the_definition(copies):
    folder, _, found = copies
    shingles = sets(folder)
    index = {(a, b): len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
             for a, b in combinations(range(len(shingles)), 2)}  # fmt: skip
    with np.load(folder / "known.npz") as known:
        brute = {tuple(pair): value for pair, value in zip(known["pairs"].tolist(), known["index"], strict=True)}
    assert brute == {pair: pytest.approx(value) for pair, value in index.items() if value >= 0.7}
    assert found["pairs"] == sum(value >= duplicates.SIMILARITY for value in index.values()) > 0
    assert any(0.55 < value < 0.7 for value in index.values())  # and some that need not be found


def test_what_blues_removes_leaves_no_similar_pair_and_takes_nothing_else(copies):
    folder, made, _ = copies
    answer = duplicates.remove(Meter, str(folder / "made"), made["bytes"])
    figures = dedup.judged(str(folder / "known.npz"), answer)
    assert figures["recall %"] == 100 and figures["wrong"] == 0 and figures["MB/s a core"] > 0
    assert figures["removed"] == len(answer["removed"]) and Store.open(folder / "made").version == 1


def test_removals_are_judged_by_the_pairs(tmp_path):
    np.savez(tmp_path / "known.npz", pairs=[[0, 1], [1, 2], [3, 4], [5, 6]], index=[0.9, 0.8, 0.85, 0.75])
    figures = dedup.judged(str(tmp_path / "known.npz"), {"removed": [1, 6, 7]})
    assert figures == {"removed": 3, "recall %": pytest.approx(200 / 3), "wrong": 1}
