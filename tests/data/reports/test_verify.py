"""`verify` reports what a dataset holds, and every kind of damage with the file's name and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blues.data.merging.merge import merge
from blues.data.reports.verify import Progress, verify
from blues.data.storage import store as st
from blues.data.storage.manifest import MANIFEST, MIXTURE, write_checked_json
from blues.data.storage.versions import drop_documents
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError
from tests.data.datasets import TOKENIZER, make_store, snapshot

TRAIN = [["one two", "three"], ["one two", "four five six"], ["seven"]]
VALIDATION = [["eight nine", "three"]]


@pytest.fixture
def path(tmp_path) -> Path:
    return make_store(tmp_path / "data", train=TRAIN, validation=VALIDATION)


@pytest.fixture
def mix(path, tmp_path) -> Path:
    make_store(tmp_path / "more", train=[["other text", "seven"]], validation=[["nine"]])
    merge([path, tmp_path / "more"], tmp_path / "mix", weights=[0.7, 0.3])
    return tmp_path / "mix"


def flip(file: Path, place: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def resign(path: Path, change) -> None:
    """Change the manifest and its checksum."""
    tree = json.loads((path / MANIFEST).read_bytes())
    del tree["checksum"]
    change(tree)
    for place in (path, path / "versions" / "00001"):
        write_checked_json(place / MANIFEST, tree)


def test_a_whole_dataset_is_good_and_is_not_touched(path):
    before = snapshot(path)
    report = verify(path)
    assert report.good and report.issues == () and report.retokenized == 7 and report.rejected == 0
    assert snapshot(path) == before


def test_statistics_are_those_of_the_documents(path):
    tokenizer = TOKENIZER.build()
    for found, split, chunks in zip(verify(path).statistics, st.SPLITS, (TRAIN, VALIDATION), strict=True):
        documents = [[*tokenizer.encode(text), tokenizer.eot_id] for chunk in chunks for text in chunk]
        lengths = [len(tokens) for tokens in documents]
        assert (found.source, found.split, found.weight) == ("data", split, 1.0)
        assert (found.documents, found.tokens) == (len(documents), sum(lengths))
        assert found.text_bytes == sum(len(text) for chunk in chunks for text in chunk)
        assert (found.lengths.median, found.lengths.longest) == (np.median(lengths), max(lengths))
        assert found.used_ids == len({token for tokens in documents for token in tokens})
        assert found.vocabulary == 300
        assert found.duplicates == 1, "'one two' within train, 'three' of validation in train"


def test_a_merged_dataset_is_checked_source_by_source(mix):
    report = verify(mix)
    assert report.good and report.retokenized == 10
    assert [(line.source, line.split, line.weight) for line in report.statistics] == [
        *(("data", split, 0.7) for split in st.SPLITS),
        *(("more", split, 0.3) for split in st.SPLITS),
    ]
    assert report.statistics[2].duplicates == 1, "'seven' is in both"


def test_a_split_without_documents_has_no_statistics_to_fail_on(tmp_path):
    report = verify(make_store(tmp_path / "data", train=[["a"], []]))
    assert report.good and report.statistics[1].documents == report.statistics[1].lengths.longest == 0
    assert report.statistics[1].lengths.median == 0.0


@pytest.mark.parametrize(
    "name",
    [
        "chunks/train-00001-00001.tokens",
        "chunks/train-00001-00001.documents.parquet",
        "chunks/validation-00001-00000.tokens",
    ],
)
def test_a_flipped_bit_is_an_issue_that_names_the_file(path, name):
    flip(path / name, place=5)
    [issue] = verify(path).issues
    assert issue.where == str(path / name) and "checksum" in issue.what


def test_every_damaged_file_is_listed(path):
    for name in ("train-00001-00000.tokens", "train-00001-00002.tokens", "validation-00001-00000.documents.parquet"):
        flip(path / "chunks" / name)
    report = verify(path)
    assert len(report.issues) == 3 and report.statistics == () and not report.good
    assert all(str(issue) in report.table() for issue in report.issues)
    assert "restore the files, or prepare the dataset again with --overwrite" in report.table()


def test_truncated_and_missing_chunks_and_edited_manifests_are_issues(path):
    file = path / "chunks" / "train-00001-00001.tokens"
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    [issue] = verify(path).issues
    assert "train-00001-00001.tokens" in issue.where and f"{len(content) - 4:,} bytes" in issue.what
    file.unlink()
    [issue] = verify(path).issues
    assert "train-00001-00001.tokens" in issue.where and "No such file" in issue.what
    file.write_bytes(content)
    assert verify(path).good
    manifest = path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"documents": 5', '"documents": 4'))
    [issue] = verify(path).issues
    assert "manifest.json' was changed after it was written" in issue.what and "restore it" in issue.what


def test_chunks_that_contradict_their_index_are_issues(tmp_path):
    path = make_store(tmp_path / "data", train=[[[5, 299, 6]], [[5, 300]], [[7]]])
    resign(path, lambda tree: tree["splits"]["train"]["chunks"][2].update(documents=4))
    whats = {Path(issue.where).name: issue.what for issue in verify(path).issues}
    assert "exactly at the end of each document" in whats["train-00001-00000.tokens"]
    assert "token 300 is outside the vocabulary of 300 ids" in whats["train-00001-00001.tokens"]
    assert "train-00001-00002.documents.parquet lists 1 documents where the manifest says 4" in whats[MANIFEST]


def test_tokens_that_no_text_gives_are_issues(tmp_path):
    tokenizer = TOKENIZER.build()
    [merged] = tokenizer.encode("in")
    apart = [tokenizer.encoding.encode_single_token(letter) for letter in (b"i", b"n")]
    assert tokenizer.decode(apart) == tokenizer.decode([merged])
    path = make_store(tmp_path / "data", train=[["fine"], [apart]], validation=[[[merged]]])
    [issue] = verify(path).issues
    assert issue.where == str(path / "chunks" / "train-00001-00001.tokens")
    assert "document 'train-1-0' tokenizes to other tokens than are stored" in issue.what


def test_the_sample_is_seeded_and_of_the_size_that_was_asked_for(path, monkeypatch):
    looked: list[str] = []
    encode = Tokenizer.encode_array
    monkeypatch.setattr(Tokenizer, "encode_array", lambda self, text: looked.append(text) or encode(self, text))
    assert [verify(path, sample=count).retokenized for count in (0, 3, 3, 1000)] == [0, 3, 3, 7]
    assert looked[:3] == looked[3:6] and sorted(looked[6:]) == sorted(
        text for chunk in (*TRAIN, *VALIDATION) for text in chunk
    )


def test_a_sample_that_is_no_number_of_documents_is_refused(path):
    with pytest.raises(ConfigError, match=r"sample \(--sample\) must be 0 or a number of documents, got -1"):
        verify(path, sample=-1)


def test_every_damaged_source_of_a_merged_dataset_is_named(mix, tmp_path):
    (tmp_path / "more" / "chunks" / "train-00001-00000.tokens").unlink()
    (tmp_path / "data").rename(tmp_path / "gone")
    first, second = verify(mix).issues
    assert first.where == str(tmp_path / "data") and "put it back or merge again" in first.what
    assert second.where.endswith("train-00001-00000.tokens") and "No such file" in second.what


def test_a_damaged_source_of_a_merged_dataset_is_named(mix, tmp_path):
    flip(tmp_path / "more" / "chunks" / "train-00001-00000.tokens")
    report = verify(mix)
    [issue] = report.issues
    assert Path(issue.where).resolve() == tmp_path / "more" / "chunks" / "train-00001-00000.tokens"
    assert {line.source for line in report.statistics} == {"data"}, "the others are still described"


def test_a_source_that_is_not_what_was_merged_is_an_issue(mix, tmp_path):
    (tmp_path / "more").rename(tmp_path / "gone")
    [issue] = verify(mix).issues
    assert "source 'more'" in issue.what and "put it back or merge again" in issue.what
    make_store(tmp_path / "more", train=[["quite other"]], validation=[["nine"]])
    [issue] = verify(mix).issues
    assert "source 'more'" in issue.what and "prepared again after the merge" in issue.what


def test_no_dataset_at_all_is_an_error_and_no_report(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        verify(tmp_path / "absent")
    with pytest.raises(DataError, match="is not a Blues dataset"):
        verify(tmp_path)


def test_the_table_and_the_json_say_the_same(mix):
    report = verify(mix)
    tree = json.loads(report.json())
    assert tree["good"] and tree["issues"] == [] and tree["paths"] == [str(mix)] and len(tree["statistics"]) == 4
    table = report.table()
    for line in tree["statistics"]:
        row = next(row for row in table.splitlines() if row.split()[:2] == [line["source"], line["split"]])
        assert f"{line['documents']:,}" in row.split() and f"{line['tokens']:,}" in row.split()
        assert f"{line['weight']:.3f}" in row.split()
    assert "good: all checksums hold, 10 documents tokenize to what is stored" in table
    assert "exact copies of another document: 3;" in table


def test_training_documents_that_are_validated_on_are_a_warning_and_no_error(path, mix):
    report = verify(path)
    [warning] = report.warnings
    assert report.good and warning.where == str(path) and warning.kind == "warning"
    assert "copies of validation documents (of data) are trained on: 1 of its 5 training documents" in warning.what
    assert f"warning: {warning}" in report.table()
    [warning] = verify(mix).warnings
    assert "`blues dedup` removes them" in warning.what


def test_copies_are_counted_between_all_splits_of_all_sources(mix):
    shared = verify(mix).overlap
    assert shared.names == tuple((source, split) for source in ("data", "more") for split in st.SPLITS)
    assert shared.shared == ((1, 1, 1, 0), (1, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0))
    assert shared.duplicates == (1, 1, 1, 0) and shared.leaked == (1, 0, 0, 0)


def test_versions_are_listed_and_each_can_be_described(path):
    drop_documents(st.Store.open(path), {"train": [0]}, {"kind": "dedup"})
    report = verify(path)
    [source] = report.sources
    assert (source.version, report.statistics[0].documents) == (2, 4)
    first, second = source.versions
    assert (first.number, first.parent, first.operation, first.documents) == (1, None, {"kind": "prepare"}, 7)
    assert (second.number, second.parent, second.operation, second.documents) == (2, 1, {"kind": "dedup"}, 6)
    assert any(line.split()[:3] == ["2", "*", "dedup"] for line in report.table().splitlines())
    old = verify(f"{path}@1")
    assert old.good and old.statistics[0].documents == 5 and old.sources[0].name == "data@1"
    [issue] = verify(f"{path}@7").issues
    assert issue.where == str(path / MANIFEST) and "there is no version 7; there are 1, 2" in issue.what


def test_damage_of_an_older_version_is_an_issue(path):
    drop_documents(st.Store.open(path), {"train": [0]}, {"kind": "dedup"})
    flip(path / "versions" / "00001" / "files.parquet")
    for version in (path, f"{path}@1"):
        [issue] = verify(version).issues
        assert issue.where == str(path / "versions" / "00001" / "files.parquet")


def test_several_datasets_are_compared(path, tmp_path):
    other = make_store(tmp_path / "deep" / "data", train=[["one two", "new"]])
    report = verify(path, other)
    assert report.good and [source.name for source in report.sources] == [str(path), str(other)]
    assert report.overlap.shared[2][0] == 1 and report.statistics[2].duplicates == 1
    assert f"dataset {other}" in report.table()
    with pytest.raises(ConfigError, match="would be checked twice"):
        verify(path, tmp_path / "deep" / ".." / "data")


def test_a_document_that_is_not_the_one_of_the_index_is_an_issue(path, monkeypatch):
    read = st.Store.document

    def other(self, split, number):
        document = read(self, split, number)
        document.tokens[0] = 5
        return document

    monkeypatch.setattr(st.Store, "document", other)
    whats = [issue.what for issue in verify(path, sample=1).issues]
    assert any("has another digest than its index says" in what for what in whats)


def test_long_documents_end_the_sample(path, monkeypatch):
    monkeypatch.setattr("blues.data.reports.verify.SAMPLE_TOKENS", 3)
    assert verify(path).retokenized == 1


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fingerprint", "0" * 32, "it says that fingerprint of source 'data' is '0000"),
        ("train_tokens", 7, "it says that train_tokens of source 'data' is 7, and it is"),
        ("version", 3, "it says that version of source 'data' is 3, and it is 1"),
        ("weight", "1/3", "no shares that sum to 1; merge again"),
        ("weight", "1/0", "cannot use 'sources[0].weight'; merge again"),
        ("checksum", "", "was prepared again after the merge"),
        ("path", 5, "cannot use 'sources[0].path'; merge again"),
    ],
)
def test_a_signed_mixture_that_contradicts_its_sources_is_named(mix, key, value, words):
    tree = json.loads((mix / MIXTURE).read_bytes())
    del tree["checksum"]
    tree["sources"][0][key] = value
    write_checked_json(mix / MIXTURE, tree)
    [issue] = verify(mix).issues
    assert issue.where == str(mix / MIXTURE) and words in issue.what


def test_statistics_are_the_same_for_any_number_of_workers(mix):
    assert verify(mix, num_workers=3).statistics == verify(mix, num_workers=1).statistics
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        verify(mix, num_workers=0)


def test_progress_is_told_by_source(mix):
    told: list[Progress] = []
    verify(mix, report=told.append)
    assert {state.source for state in told} == {"data", "more"} and told[-1].bytes_done == told[-1].bytes
