"""Removing duplicates from datasets: new versions that share every chunk, once, and the same for any parallelism."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from blues.cluster import dedup as module
from blues.cluster.dedup import REMOVED, Request, dedup
from blues.data.dedup.minhash import Settings
from blues.data.merging.merge import merge, open_dataset
from blues.data.storage import versions
from blues.data.storage.store import SPLITS, Store
from blues.data.tokenizer import Tokenizer
from blues.errors import DataError
from tests.data.datasets import make_store, snapshot
from tests.data.dedup.test_dedup import near_copies


def text(seed: int, changed: int = 0) -> list[int]:
    """A document of 200 tokens, some of its last ones rewritten."""
    tokens = np.random.default_rng(seed).integers(0, 250, 200)
    tokens[200 - changed :] = np.random.default_rng(1000 + seed).integers(0, 250, changed)
    return tokens.tolist()


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """code: 1 repeats itself, 4 nearly repeats what text holds out. text: 2 nearly, 3 exactly repeat what code has."""
    code = make_store(
        tmp_path / "code", train=[[text(1), text(2), text(1)], [text(3), text(4, changed=10)]], validation=[[text(5)]]
    )
    other = make_store(tmp_path / "text", train=[[text(2, changed=12), text(6)], [text(3)]], validation=[[text(4)]])
    return [code, other]


def contents(store: Store) -> dict[str, list[list[int]]]:
    return {split: [d.tokens.tolist()[:-1] for d in store.documents(split)] for split in SPLITS}


def removed_of(store: Store) -> list[dict]:
    [record] = [tree for tree in store.manifest["attachments"] if tree["file"].endswith(REMOVED)]
    return pq.read_table(store.path / record["file"]).to_pylist()


def test_each_dataset_gets_a_version_without_its_duplicates_and_keeps_the_old_one(paths):
    before = [contents(Store.open(path)) for path in paths]
    chunks = {path: snapshot(path / "chunks") for path in paths}
    result = dedup(paths, Request())
    code, other = result.after
    assert (code.version, other.version) == (2, 2)
    assert contents(code) == {"train": [text(1), text(2), text(3)], "validation": [text(5)]}
    assert contents(other) == {"train": [text(6)], "validation": [text(4)]}
    for path, old, store in zip(paths, before, result.after, strict=True):
        assert snapshot(path / "chunks") == chunks[path]
        assert Store.open(path).checksum == store.checksum and store.check() == []
        assert contents(Store.open(f"{path}@1")) == old


def test_the_version_says_what_was_removed_and_why(paths):
    code, other = dedup(paths, Request()).after
    rows = removed_of(code)
    assert [(row["id"], row["kind"], row["kept_dataset"], row["kept_id"]) for row in rows] == [
        ("train-0-2", "exact", "code", "train-0-0"),
        ("train-1-1", "near", "text", "validation-0-0"),
    ]
    assert rows[1]["kept_split"] == "validation" and rows[1]["tokens"] == 201
    assert [(row["id"], row["kind"], row["kept_dataset"]) for row in removed_of(other)] == [
        ("train-0-0", "near", "code"),
        ("train-1-0", "exact", "code"),
    ]
    operation = code.manifest["operation"]
    assert operation["kind"] == "dedup" and operation == other.manifest["operation"]
    assert [(d["name"], d["exact"], d["near"]) for d in operation["datasets"]] == [("code", 1, 1), ("text", 1, 1)]
    assert operation["settings"]["near"] == {"threshold": 0.7, "ngram": 5, "permutations": 128}
    assert str(paths[0].parent) not in str(code.manifest)


def test_the_second_time_nothing_is_removed_and_no_version_is_made(paths, monkeypatch):
    dedup(paths, Request())
    before = {path: snapshot(path) for path in paths}
    assert dedup(paths, Request()).done_before
    assert {path: snapshot(path) for path in paths} == before
    monkeypatch.setattr(module, "_is_done", lambda *_: False)
    again = dedup(paths, Request())
    assert len(again.summary.removed) == 0 and [store.version for store in again.after] == [2, 2]
    assert {path: snapshot(path) for path in paths} == before


def test_another_request_is_not_taken_for_one_that_was_done(paths):
    dedup(paths, Request(settings=None))
    assert [store.version for store in dedup(paths, Request()).after] == [2 + 1, 2 + 1]
    assert dedup(paths, Request()).done_before
    assert not dedup(paths[:1], Request()).done_before
    versions.drop_documents(Store.open(paths[1]), {"train": [0]}, {"kind": "other"})
    assert not dedup(paths, Request()).done_before


def test_a_dataset_without_duplicates_keeps_its_version_and_still_counts_as_done(paths, tmp_path):
    clean = make_store(tmp_path / "clean", train=[[text(50)]])
    result = dedup([clean, *paths], Request())
    assert [store.version for store in result.after] == [1, 2, 2]
    assert dedup([clean, *paths], Request()).done_before


def test_exact_copies_only(paths):
    code, other = dedup(paths, Request(settings=None)).after
    assert [row["kind"] for row in removed_of(code) + removed_of(other)] == ["exact", "exact"]


def test_across_only_lets_each_dataset_repeat_itself(paths):
    code, other = dedup(paths, Request(across_only=True)).after
    assert [row["id"] for row in removed_of(code)] == ["train-1-1"]
    assert contents(code)["train"] == [text(1), text(2), text(1), text(3)]
    assert contents(other)["train"] == [text(6)]


def test_a_dry_run_changes_nothing(paths):
    before = {path: snapshot(path) for path in paths}
    result = dedup(paths, Request(), dry_run=True)
    assert len(result.summary.removed) == 4 and result.after == result.before
    assert {path: snapshot(path) for path in paths} == before


def test_an_interruption_while_it_searches_changes_nothing(paths):
    before = {path: snapshot(path) for path in paths}

    def interrupt(progress):
        if progress.stage == "near":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dedup(paths, Request(), report=interrupt)
    assert {path: snapshot(path) for path in paths} == before


def test_a_failure_between_two_datasets_is_made_good_by_the_same_command(paths, monkeypatch):
    drop, failures = versions.drop_documents, [True]

    def fail_once(store, *arguments):
        if store.path == paths[1] and failures:
            failures.clear()
            raise OSError(28, "No space left on device")
        return drop(store, *arguments)

    monkeypatch.setattr(versions, "drop_documents", fail_once)
    with pytest.raises(OSError):
        dedup(paths, Request())
    assert [Store.open(path).version for path in paths] == [2, 1]
    code, other = dedup(paths, Request()).after
    assert contents(code)["train"] == [text(1), text(2), text(3)] and contents(other)["train"] == [text(6)]
    assert [Store.open(path).check() for path in paths] == [[], []]


def test_the_order_of_the_datasets_says_who_keeps_a_document(paths):
    other, code = dedup(paths[::-1], Request()).after
    assert contents(other)["train"] == [text(2, changed=12), text(6), text(3)]
    assert contents(code)["train"] == [text(1)]


def test_a_dataset_may_lose_its_last_training_document(tmp_path):
    one = make_store(tmp_path / "one", train=[[text(1)]], validation=[[text(2)]])
    copy = make_store(tmp_path / "copy", train=[[text(1)]], validation=[[text(2)]])
    result = dedup([one, copy], Request())
    assert [result.after[1].num_documents(split) for split in SPLITS] == [0, 0]
    assert result.after[1].check() == [] and len(result.summary.notes()) == 2
    with pytest.raises(DataError, match="has no training tokens; leave it out"):
        merge([one, copy], tmp_path / "mix", strategy="equal")


def test_a_merged_dataset_keeps_the_old_versions_until_it_is_merged_again(paths, tmp_path):
    mix = tmp_path / "mix"
    merge(paths, mix, strategy="equal")
    dedup(paths, Request())
    assert [store.version for store in open_dataset(mix).stores] == [1, 1]
    merge(paths, mix, strategy="equal", overwrite=True)
    assert [store.version for store in open_dataset(mix).stores] == [2, 2]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("code", "is named twice"),
        ("text@1", "is not the newest version, 2; name the dataset without a version"),
        ("mix", "is a merged dataset; name its sources instead, and then merge them again: "),
        ("small", "has vocab_size 280 and .* has 300; only datasets of one tokenizer"),
        ("absent", "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(paths, tmp_path, name, sentence):
    merge(paths, tmp_path / "mix", strategy="equal")
    dedup(paths, Request(settings=None))
    make_store(tmp_path / "small", train=[[[1, 2]]], tokenizer=Tokenizer.Config(vocab_size=280))
    with pytest.raises(DataError, match=sentence):
        dedup([paths[0], tmp_path / name], Request())


def test_equal_folder_names_are_told_apart(tmp_path):
    stores = [make_store(tmp_path / place / "notes", train=[[text(1)]], validation=[[text(9)]]) for place in "ab"]
    result = dedup(stores, Request(), dry_run=True)
    assert result.summary.names == ("notes (1)", "notes (2)") and result.summary.matrix() == [[0, 0], [2, 0]]


@pytest.mark.ray
def test_the_result_is_the_same_on_a_cluster(tmp_path, monkeypatch):
    documents = [[token % 250 for token in document] for document in near_copies(0.85, pairs=30)]
    paths = [tmp_path / "here", tmp_path / "there"]
    for path in paths:
        make_store(path, train=[documents[:25], documents[25:50]], validation=[documents[50:]])
    monkeypatch.setattr(module, "TASK_TOKENS", 2000)
    ray.init(address="local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False)
    try:
        seen = []
        here = dedup(paths[:1], Request(Settings()), report=lambda progress: seen.append(progress.stage))
        there = dedup(paths[1:], Request(Settings()), num_workers=2)
    finally:
        ray.shutdown()
    assert removed_of(here.after[0]) == [
        {**row, "source": "here.txt", "kept_source": "here.txt", "kept_dataset": "here"}
        for row in removed_of(there.after[0])
    ]
    assert len(here.summary.removed) == 30 and here.after[0].fingerprint == there.after[0].fingerprint
    assert seen.count("signatures") > 5 and set(seen) == {"signatures", "near", "choice"}
