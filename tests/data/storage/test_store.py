"""A dataset gives back what was written; whatever is damaged afterwards is detected and named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hyp

from blues.data.storage.chunks import ChunkWriter
from blues.data.storage.manifest import MANIFEST, read_checked_json, write_checked_json
from blues.data.storage.store import Store
from blues.data.tokenizer import Tokenizer
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, make_store, snapshot

TRAIN = [["one two", "three"], ["", "four five six"], ["seven"]]
VALIDATION = [["eight nine"]]


@pytest.fixture
def path(tmp_path) -> Path:
    return make_store(tmp_path / "data", train=TRAIN, validation=VALIDATION)


def all_tokens(chunks) -> list[int]:
    tokenizer = TOKENIZER.build()
    return [id for chunk in chunks for text in chunk for id in [*tokenizer.encode(text), tokenizer.eot_id]]


def edit_manifest(path: Path, change) -> None:
    """Change the manifest as someone with an editor would: the checksum stays."""
    tree = json.loads((path / MANIFEST).read_bytes())
    change(tree)
    (path / MANIFEST).write_text(json.dumps(tree))


def resign_manifest(path: Path, change) -> None:
    """Change the manifest and its checksum: what a faulty writer would leave."""
    tree = json.loads((path / MANIFEST).read_bytes())
    del tree["checksum"]
    change(tree)
    for place in (path, path / "versions" / "00001"):
        write_checked_json(place / MANIFEST, tree)


def test_documents_and_counts_come_back(path):
    store = Store.open(path)
    tokenizer = store.tokenizer.build()
    for split, chunks in (("train", TRAIN), ("validation", VALIDATION)):
        texts = [text for chunk in chunks for text in chunk]
        found = list(store.documents(split))
        assert [tokenizer.decode(document.tokens[:-1]) for document in found] == texts
        assert all(document.tokens[-1] == tokenizer.eot_id for document in found)
        assert store.num_documents(split) == len(texts)
        assert store.num_tokens(split) == len(all_tokens(chunks))
        assert store.text_bytes(split) == sum(len(text.encode()) for text in texts)
    [_, _, first, second, _] = store.documents("train")
    assert [store.document("train", number).id for number in range(5)] == [d.id for d in store.documents("train")]
    assert np.array_equal(store.document("train", 3).tokens, second.tokens)
    assert (first.id, second.id, second.source) == ("train-1-0", "train-1-1", "data.txt")
    assert second.metadata == {"place": 1} and second.text_bytes == 13
    assert store.tokenizer == TOKENIZER and store.check() == []


def test_any_window_is_a_slice_of_the_chunks_end_to_end(path):
    store, expected = Store.open(path), np.array(all_tokens(TRAIN))
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            window = store.read("train", start, stop)
            assert window.dtype == np.uint32 and np.array_equal(window, expected[start:stop])
    for start, stop in ((-1, 1), (2, 1), (0, len(expected) + 1)):
        with pytest.raises(IndexError):
            store.read("train", start, stop)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunks=hyp.lists(hyp.lists(hyp.lists(hyp.integers(0, 298), max_size=6), max_size=4), max_size=4),
    cut=hyp.tuples(hyp.floats(0, 1), hyp.floats(0, 1)),
)
def test_round_trip_of_any_chunks_even_empty_ones(tmp_path_factory, chunks, cut):
    store = Store.open(make_store(tmp_path_factory.mktemp("any") / "data", train=chunks))
    expected = [id for chunk in chunks for ids in chunk for id in [*ids, 299]]
    assert store.num_tokens("train") == len(expected) and store.num_tokens("validation") == 0
    start, stop = sorted(round(share * len(expected)) for share in cut)
    assert store.read("train", start, stop).tolist() == expected[start:stop]
    assert [document.tokens.tolist() for document in store.documents("train")] == [
        [*ids, 299] for chunk in chunks for ids in chunk
    ]
    assert store.check() == []


def test_read_tokens_are_the_readers_own_and_the_file_stays_whole(path):
    store = Store.open(path)
    before = snapshot(path)
    store.read("train", 0, 3)[:] = 0
    next(store.documents("train")).tokens[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        store.chunk("train", 0)[0] = 0
    assert snapshot(path) == before and Store.open(path).check() == []


def test_stores_opened_twice_are_equal(path):
    assert Store.open(path) == Store.open(path)


def test_a_store_pickles_as_its_path_also_from_another_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(Store.open("data"))
    assert len(packed) < 1000
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(packed).read("train", 0, 2).tolist() == all_tokens(TRAIN)[:2]


def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(path, tmp_path):
    again = make_store(tmp_path / "again" / "data", train=TRAIN, validation=VALIDATION)
    assert snapshot(again) == snapshot(path)
    prints = {Store.open(path).fingerprint}
    others = [
        {"train": [*TRAIN[:2], ["Seven"]], "validation": VALIDATION},
        {"train": TRAIN, "validation": []},
        {"train": [TRAIN[1], TRAIN[0], TRAIN[2]], "validation": VALIDATION},
        {"train": TRAIN, "validation": VALIDATION, "tokenizer": Tokenizer.Config(vocab_size=301)},
    ]
    for number, other in enumerate(others):
        prints.add(Store.open(make_store(tmp_path / f"other{number}", **other)).fingerprint)
    assert len(prints) == 1 + len(others)


def test_a_dataset_made_again_at_the_same_place_is_read_anew(tmp_path):
    first = Store.open(make_store(tmp_path / "data", train=[["aaaa"]]))
    before = first.read("train", 0, 2).tolist()
    (tmp_path / "data").rename(tmp_path / "old")
    second = Store.open(make_store(tmp_path / "data", train=[["bbbb"]]))
    assert second.read("train", 0, 2).tolist() != before
    assert second.read("train", 0, 2).tolist() == TOKENIZER.build().encode("bbbb")[:2]


def test_token_files_are_little_endian_words(path):
    content = (path / "chunks" / "train-00001-00000.tokens").read_bytes()
    assert np.frombuffer(content, "<u4").tolist() == all_tokens(TRAIN[:1])


def test_an_interrupted_writer_leaves_no_chunk(tmp_path):
    writer = ChunkWriter(tmp_path, "train", 0)
    writer.add(np.array([1, 299], np.uint32), id="a", source="s", text_bytes=1, metadata={})
    assert not list((tmp_path / "chunks").glob("train*")), "nothing has its name before it is whole"
    writer.abort()
    assert list((tmp_path / "chunks").iterdir()) == []


def test_names_that_are_not_utf8_survive_the_manifest(tmp_path):
    tree = {"format": "x", "format_version": 1, "name": os.fsdecode(b"caf\xe9.csv"), "plain": "café"}
    write_checked_json(tmp_path / "a.json", tree)
    found = read_checked_json(tmp_path, "a.json", "x", 1)
    assert {key: found[key] for key in tree} == tree
    assert "café" in (tmp_path / "a.json").read_text(encoding="utf-8")


# What is damaged is detected when the dataset is opened, or by `check`, and named.


CHUNK_FILES = (
    "chunks/train-00001-00001.tokens",
    "chunks/train-00001-00001.documents.parquet",
    "chunks/validation-00001-00000.tokens",
)
VERSION_FILES = ("versions/00001/quarantine.jsonl", "versions/00001/files.parquet")


@pytest.mark.parametrize("name", [*CHUNK_FILES, *VERSION_FILES])
def test_a_missing_or_resized_file_is_named_at_once(path, name):
    file = path / name
    content = file.read_bytes()
    changes = {"grown": content + b"\0\0\0\0"}
    if content:
        changes |= {"truncated": content[:-4], "emptied": b""}
    for changed in changes.values():
        file.write_bytes(changed)
        with pytest.raises(DataError) as caught:
            Store.open(path)
        sentence = str(caught.value)
        assert name in sentence and f"{len(changed):,} bytes" in sentence and f"{len(content):,}" in sentence
        assert "restore the file or prepare the dataset again" in sentence
    file.unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(No such file"):
        Store.open(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=hyp.sampled_from(CHUNK_FILES), place=hyp.floats(0, 1, exclude_max=True), bit=hyp.integers(0, 7))
def test_any_flipped_bit_is_found_by_check(path, name, place, bit):
    file = path / name
    whole = file.read_bytes()
    content = bytearray(whole)
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)
    try:
        [issue] = Store.open(path).check()
        assert issue.where == name and "checksum" in issue.what
    finally:
        file.write_bytes(whole)


def test_several_damages_are_all_listed(path):
    store = Store.open(path)
    for name in CHUNK_FILES[:2]:
        content = bytearray((path / name).read_bytes())
        content[0] ^= 1
        (path / name).write_bytes(content)
    (path / CHUNK_FILES[2]).unlink()
    assert {issue.where for issue in store.check()} == set(CHUNK_FILES)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["splits"]["train"]["chunks"][0].update(tokens=3),
        lambda tree: tree["tokenizer"]["config"].update(vocab_size=4096),
        lambda tree: tree.update(fingerprint="0" * 32),
        lambda tree: tree.update(note="hand-made"),
        lambda tree: tree.pop("checksum"),
    ],
)
def test_an_edited_manifest_is_refused(path, change):
    edit_manifest(path, change)
    with pytest.raises(DataError, match=r"manifest\.json' was changed after it was written; restore it"):
        Store.open(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_an_unreadable_manifest_is_refused(path, content):
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json' is damaged .*make the dataset again"):
        Store.open(path)


def test_another_format_or_version_is_refused(path):
    resign_manifest(path, lambda tree: tree.update(format_version=99))
    with pytest.raises(DataError, match=r"version 99, and this Blues reads 'blues-store' version 2"):
        Store.open(path)


def test_a_manifest_that_lacks_a_key_is_refused(path):
    resign_manifest(path, lambda tree: tree.pop("splits"))
    with pytest.raises(DataError, match=r"manifest\.json' lacks or cannot use 'splits'; prepare the dataset again"):
        Store.open(path)


def write_wrong(path: Path, content: list[list[int]], changes: dict[str, int]) -> Store:
    """A dataset whose checksums hold but whose first chunk says something else than it holds."""
    make_store(path, train=[content])
    resign_manifest(path, lambda tree: tree["splits"]["train"]["chunks"][0].update(changes))
    return Store.open(path)


@pytest.mark.parametrize(
    ("content", "changes", "where", "words"),
    [
        ([[5]], {"documents": 7}, "versions/00001/manifest.json", "lists 1 documents where the manifest says 7"),
        ([[5]], {"text_bytes": 99}, "versions/00001/manifest.json", "text bytes of chunks/train-00001-00000.documents"),
        ([[5, 300]], {}, "chunks/train-00001-00000.tokens", "token 300 is outside the vocabulary of 300 ids"),
        ([[5, 299, 6]], {}, "chunks/train-00001-00000.tokens", "does not stand exactly at the end of each document"),
    ],
)
def test_tokens_index_and_manifest_must_agree(tmp_path, content, changes, where, words):
    [issue] = write_wrong(tmp_path / "data", content, changes).check()
    assert issue.where == where and words in issue.what


def test_a_place_that_is_no_dataset_gets_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; make it with `blues prepare"):
        Store.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is not a Blues dataset \(it has no manifest.json\)"):
        Store.open(tmp_path / "empty")
    (tmp_path / ".half.partial").mkdir()
    with pytest.raises(DataError, match=r"half' is not finished; run the same command again"):
        Store.open(tmp_path / "half")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not a Blues dataset"):
        Store.open(tmp_path / "file")


def test_an_unknown_split_names_the_nearest(path):
    with pytest.raises(DataError, match="unknown split 'valid'. Did you mean 'validation'"):
        Store.open(path).num_tokens("valid")
