"""All versions of a dataset are checked, each file once, with any number of threads; a manifest that contradicts what
lies there is named."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from blues.data.merging.merge import merge
from blues.data.reports.verify import verify
from blues.data.storage import checking
from blues.data.storage.chunks import RawReader
from blues.data.storage.manifest import MANIFEST, partial_directory, write_checked_json
from blues.data.storage.store import SPLITS, Store
from blues.data.storage.versions import drop_documents
from tests.data.datasets import make_store

TRAIN = [["one two", "three"], ["four five six", "three", "seven"], ["eight nine ten"]]
FIRST, SECOND = f"versions/00001/{MANIFEST}", f"versions/00002/{MANIFEST}"


@pytest.fixture
def path(tmp_path) -> Path:
    """A dataset of two versions, of which the second lacks three documents."""
    made = make_store(tmp_path / "data", train=TRAIN, validation=[["eleven", "twelve"]])
    drop_documents(Store.open(made), {"train": [1, 3], "validation": [0]}, {"kind": "dedup"})
    return made


def check(path: Path, **arguments) -> list[tuple[str, str]]:
    _, found = checking.check_dataset(path, **arguments)
    return [(issue.where, issue.what) for issue in found.issues]


def sign(path: Path, name: str, change) -> None:
    """Change a manifest and sign it again."""
    tree = json.loads((path / name).read_bytes())
    del tree["checksum"]
    change(tree)
    write_checked_json(path / name, tree)


def test_a_whole_dataset_has_no_issues_and_its_parts_are_those_of_the_store(path):
    for number in (1, 2):
        history, found = checking.check_dataset(path, number=number)
        store = Store.open(f"{path}@{number}")
        assert found.issues == [] and found.described == store and len(history.versions) == 2
        for split in SPLITS:
            tokens = store.read(split, 0, store.num_tokens(split))
            assert found.counts_V[split].tolist() == np.bincount(tokens, minlength=300).tolist()
            documents = checking.documents_of(store, split, found.contents)
            assert np.cumsum(documents.lengths).tolist() == store.document_ends(split).tolist()
            assert documents.text_bytes.sum() == store.text_bytes(split)
            digests = [digest for table in store.tables(split, ["digest"]) for digest in table["digest"].to_pylist()]
            assert documents.digests.tolist() == digests


def test_any_number_of_threads_finds_the_same(path):
    chunk = path / "chunks" / "train-00001-00000.tokens"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    _, one = checking.check_dataset(path)
    assert len(one.issues) == 1
    for workers in (2, 3, 8):
        _, found = checking.check_dataset(path, num_workers=workers)
        assert found.issues == one.issues
        assert all(np.array_equal(found.counts_V[split], one.counts_V[split]) for split in SPLITS)


def test_an_error_in_a_thread_is_raised_and_stops_the_others(path, monkeypatch):
    seen: list[int] = []

    def interrupted(self, out, start):
        seen.append(start)
        raise KeyboardInterrupt

    monkeypatch.setattr(RawReader, "read_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checking.check_dataset(path, num_workers=2)


def test_every_file_is_read_once_however_many_versions_share_it(path, monkeypatch):
    read: Counter[str] = Counter()
    opened = RawReader.__init__
    monkeypatch.setattr(RawReader, "__init__", lambda self, name: read.update([name]) or opened(self, name))
    assert check(path) == []
    assert read == Counter(str(path / chunk.data.file) for s in SPLITS for chunk in Store.open(path).chunks[s])


def test_progress_ends_with_all_bytes(path):
    told: list[tuple[int, int]] = []
    checking.check_dataset(path, report=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0 and told == sorted(told)
    checking.check_dataset(path, num_workers=2, report=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("name", [FIRST, SECOND, "versions/00001/quarantine.jsonl", "versions/00002/segments.parquet"])
def test_a_damaged_file_of_any_version_is_named_alone(path, name):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-2] if content else b"x")
    [(where, _)] = check(path)
    assert where == name


@pytest.mark.parametrize(
    "name",
    [
        *("manifest.json", FIRST, "versions/00001/quarantine.jsonl", "versions/00002/segments.parquet"),
        *("chunks/train-00001-00002.documents.parquet", "chunks/train-00001-00002.tokens"),
    ],
)
def test_a_pipe_in_place_of_a_file_is_damage_and_is_not_waited_for(path, name):
    (path / name).unlink()
    os.mkfifo(path / name)
    found = check(path)
    assert {where for where, _ in found} == {name} and "it is no regular file" in found[0][1]


def test_damage_beside_damaged_segments_is_found_too(path):
    for name in ("versions/00002/segments.parquet", "chunks/train-00001-00002.documents.parquet"):
        (path / name).write_bytes(b"")
    assert {where for where, _ in check(path)} == {
        "versions/00002/segments.parquet",
        "chunks/train-00001-00002.documents.parquet",
    }


def test_spaces_in_a_manifest_are_no_damage_but_are_seen(path):
    (path / SECOND).write_bytes((path / SECOND).read_bytes() + b"\n")
    assert check(path) == [(SECOND, checking.REWRITTEN)]
    Store.open(f"{path}@2")


def test_an_old_copy_of_the_manifest_is_an_issue_unless_a_command_was_stopped(path):
    (path / MANIFEST).write_bytes((path / FIRST).read_bytes())
    [(where, what)] = check(path)
    assert where == MANIFEST and f"it is that of version 1, while {SECOND} is there: an old copy" in what
    partial_directory(path).mkdir()
    _, found = checking.check_dataset(path)
    [issue] = found.issues
    assert issue.kind == "warning" and "the command that made it was stopped; run it again" in issue.what
    assert Store.open(path).check() == []


def test_a_missing_version_is_an_issue(path):
    (path / FIRST).unlink()
    [(where, what)] = check(path)
    assert where == FIRST and "versions/00001" in what
    (path / MANIFEST).unlink()
    assert {where for where, _ in check(path)} == {FIRST, MANIFEST}


def test_a_version_of_which_only_chunks_are_left_is_an_issue_unless_a_command_was_stopped(path):
    for suffix in ("tokens", "documents.parquet"):
        (path / "chunks" / f"train-00003-00000.{suffix}").write_bytes(b"of an update")
    [(where, what)] = check(path)
    assert where == f"versions/00003/{MANIFEST}" and "version 3 is gone: chunks/train-00003-00000.documents" in what
    assert not verify(path).good
    partial_directory(path).mkdir()
    assert check(path) == []
    [warning] = verify(path).warnings
    assert "belongs to no version of the dataset (and 1 more)" in warning.what


def test_links_that_leave_the_dataset_are_a_warning(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    assert verify(tmp_path / "link").warnings == ()
    inner = path / "chunks" / "train-00001-00000.tokens"
    inner.rename(path / "chunks" / "inner")
    inner.symlink_to("inner")
    assert checking.outside_links(path, checking.read_history(path).versions) == []
    (path / "chunks" / "inner").rename(tmp_path / "outer")
    inner.unlink()
    inner.symlink_to(tmp_path / "outer")
    report = verify(path)
    [warning] = report.warnings
    assert report.good and warning.where == str(inner) and "is a link out of the dataset:" in warning.what
    (path / "versions").rename(tmp_path / "elsewhere")
    (path / "versions").symlink_to(tmp_path / "elsewhere")
    [warning] = verify(path).warnings
    assert "is a link out of the dataset (and " in warning.what


@pytest.mark.parametrize("content", [None, b""])
def test_lost_segments_accuse_neither_a_manifest_nor_a_mixture(path, tmp_path, content):
    merge([path], tmp_path / "mix", strategy="equal")
    segments = path / "versions/00002/segments.parquet"
    segments.unlink()
    if content is not None:
        segments.write_bytes(content)
    for dataset in (path, tmp_path / "mix"):
        [issue] = verify(dataset).issues
        assert issue.where == str(segments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(rows=99), "its 99 rows are not its"),
        (lambda tree: tree.update(documents=99), "it says 99 documents, and those of its splits are"),
        (
            lambda tree: tree.update(rejected={"bad": 2}, rows=tree["rows"] + 2),
            "lists other rejected rows than it says",
        ),
        (lambda tree: tree.update(fingerprint="0" * 32), "the fingerprint of the content is another one"),
        (lambda tree: tree["splits"]["train"].update(text_bytes=1), "text bytes where it says 1"),
        (lambda tree: tree["splits"]["train"].update(tokens=1), "train holds 43 tokens where it says 1"),
        (lambda tree: tree["tokenizer"].update(fingerprint="x"), "another release of the tokenizer"),
        (lambda tree: tree["tokenizer"].update(eot_id=5), "or its id of <|endoftext|>, is not that of its tokenizer"),
        (lambda tree: tree["splits"]["train"]["chunks"][0].update(split="validation"), "the split of a chunk"),
        (lambda tree: tree["splits"]["train"]["chunks"][0].update(more=1), "lacks or cannot use"),
        (lambda tree: tree.update(quarantine=None), "lacks or cannot use 'quarantine'"),
        (lambda tree: tree["attachments"][0].update(file="../x"), "cannot use 'attachments[0].file'"),
        (lambda tree: tree.update(version=7), "it is the manifest of version 7"),
        (lambda tree: tree.update(parent="0" * 64), "it says it was made from another version, and it is the first"),
    ],
)
def test_a_signed_manifest_that_contradicts_something_is_named(tmp_path, change, words):
    path = make_store(tmp_path / "data", train=TRAIN)
    sign(path, FIRST, change)
    (path / MANIFEST).write_bytes((path / FIRST).read_bytes())
    found = check(path)
    assert any(where == FIRST and words in what for where, what in found), found


def test_versions_that_do_not_follow_from_one_another_are_both_named(path):
    sign(path, FIRST, lambda tree: tree.update(code={"blues": "other"}))
    assert {where for where, _ in check(path)} == {FIRST, SECOND}


def test_copies_of_the_newest_manifest_that_differ_are_both_named(path):
    sign(path, MANIFEST, lambda tree: tree.update(code={"blues": "other"}))
    assert {where for where, _ in check(path)} == {MANIFEST, SECOND}


def test_segments_that_contradict_the_indexes_are_named(path, monkeypatch):
    store = Store.open(path)
    wrong = {split: store.segments[split].copy() for split in SPLITS}
    wrong["train"]["first_token"][-1] += 1
    wrong["train"]["tokens"][-1] -= 1
    monkeypatch.setattr("blues.data.storage.store._read_segments", lambda *_: wrong)
    found = check(path, number=2)
    assert any("a segment of train does not fit documents" in what for _, what in found)


def test_files_of_no_version_are_listed_and_are_warnings(path):
    (path / "chunks" / "train-00002-00000.tokens").write_bytes(b"left by a command that was killed")
    (path / "notes.txt").write_text("mine")
    history = checking.read_history(path)
    assert checking.unknown_files(path, history.versions) == ["chunks/train-00002-00000.tokens", "notes.txt"]
    report = verify(path)
    [warning] = report.warnings
    assert report.good and "belongs to no version of the dataset (and 1 more)" in warning.what
