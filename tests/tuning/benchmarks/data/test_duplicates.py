"""The copies have all similarities, brute force knows them, and what Blues finds is counted right."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from blues.data.store import Store
from tests.data.datasets import make_store
from tuning.benchmarks.data import duplicates
from tuning.benchmarks.worker import Meter


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The folder of a dataset of 40 documents of 200 random tokens with a copy of most, and what was made."""
    folder = tmp_path_factory.mktemp("copies")
    documents = [np.random.default_rng(seed).integers(0, 256, 200).tolist() for seed in range(40)]
    make_store(folder / "source", train=[documents], validation=[[[1, 2, 3]]])
    made = duplicates.write_copies(Meter, str(folder / "source"), str(folder / "made"), 40, copies=0.8, seed=0)
    found = duplicates.brute_force(Meter, str(folder / "made"), str(folder / "pairs.npy"))
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
    expected = sorted(pair for pair, value in index.items() if value >= duplicates.SIMILARITY)
    assert sorted(map(tuple, np.load(folder / "pairs.npy").tolist())) == expected and found["pairs"] == len(expected)
    assert any(0.55 < value < 0.8 for value in index.values())  # and some that need not be found


def test_what_is_found_is_counted(copies, tmp_path):
    folder, made, _ = copies
    store = str(folder / "made")
    figures = duplicates.remove(Meter, store, made["bytes"], str(folder / "pairs.npy"))
    assert figures["recall %"] == 100 and figures["strangers"] == 0 and figures["MB/s a core"] > 0
    assert set(duplicates.remove(Meter, store, made["bytes"])) == {"MB/s a core", "s", "growth MB"}
    np.save(tmp_path / "more.npy", np.array([[0, 1]] * 3))  # pairs that are none, and none of the others
    figures = duplicates.remove(Meter, store, made["bytes"], str(tmp_path / "more.npy"))
    assert figures["recall %"] in (0.0, 100.0) and figures["strangers"] > 0
    assert Store.open(folder / "made").version == 1
