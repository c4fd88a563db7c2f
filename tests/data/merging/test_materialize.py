"""Mixtures written out: the documents of the sources in the right order, whole, and never anything damaged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hyp

from blues.data.merging import mixed_shards
from blues.data.merging.interleave import PICK_TYPE
from blues.data.merging.materialize import Materialization, find_present, request_of, written_table
from blues.data.merging.merge import Combination, combine, merge, open_dataset
from blues.data.merging.mixed_shards import Rows, Settings, ShardWriter, copy_documents, finished, write_rows
from blues.data.storage import store as st
from blues.data.storage.manifest import partial_directory
from blues.data.storage.versions import drop_documents, files_of
from blues.errors import DataError
from tests.data.datasets import make_store, snapshot

CODE = {"blues": "of a test"}


def texts(word: str, chunks: int, documents: int) -> list[list[str]]:
    return [
        [f"{word} {chunk}.{number} " + "x" * (number * 7 % 23) for number in range(documents)]
        for chunk in range(chunks)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Three datasets, one of them compressed; the ids of all are those of the others."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        make_store(folder / "code", train=texts("code", 4, 30), validation=texts("held", 2, 3)),
        make_store(folder / "text", train=texts("text", 3, 25), validation=texts("kept", 1, 4), compression="zstd"),
        make_store(folder / "notes", train=texts("notes", 1, 20)),
    ]


def write(combined: Combination, output: Path, asked: Settings, shards: int | None = None) -> st.Store:
    """Do it in this process; with `shards`, stop after so many of them."""
    work = Materialization(combined, asked, partial_directory(output))
    writer = ShardWriter(*work.worker_arguments)
    for number, shard in list(work.missing.items())[:shards]:
        writer(number, shard)
        work.done(number)
    return work.publish(output, CODE)


def one_by_one(
    combined: Combination, asked: Settings, scratch: Path
) -> Iterator[tuple[str, st.StoredDocument, int, int]]:
    """The documents that must come out, without shards and runs: split, document of the source, source, pass."""
    for split, picks in Materialization(combined, asked, scratch).picks.items():
        for pick in picks:
            store = combined.sources[pick["source"]].store
            yield split, store.document(split, int(pick["document"])), int(pick["source"]), int(pick["pass"])


def contents(store: st.Store) -> list[tuple]:
    return [
        (split, of.id, of.source, of.metadata, of.text_bytes, of.tokens.tolist())
        for split in st.SPLITS
        for of in store.documents(split)
    ]


# What is written.


@pytest.mark.parametrize("shard_tokens", [150, 1 << 24])
@pytest.mark.parametrize("asked", [{}, {"compression": "zstd", "seed": 5}, {"tokens": 9000}])
def test_it_holds_the_documents_of_the_sources_in_the_order_of_the_mixture(sources, tmp_path, asked, shard_tokens):
    combined = combine(sources, [5, 3, 2])
    asked = Settings(shard_tokens=shard_tokens, **asked)
    store = write(combined, tmp_path / "out", asked)
    expected = []
    for split, document, source, number in one_by_one(combined, asked, tmp_path / "scratch"):
        name = combined.sources[source].name
        id = f"{name}/{document.id}" + (f"#pass{number + 1}" if number else "")
        fields = (f"{name}/{document.source}", document.metadata, document.text_bytes, document.tokens.tolist())
        expected.append((split, id, *fields))
    assert contents(store) == expected
    assert store.check() == [] and store.version == 1
    ids = [document[1] for document in expected]
    assert len(set(ids)) == len(ids), "ids are unique"
    chunks = [chunk for split in st.SPLITS for chunk in store.chunks[split]]
    assert {chunk.data.file.rpartition(".")[2] for chunk in chunks} == {
        "zst" if asked.compression == "zstd" else "tokens"
    }
    longest = max(len(document[-1]) for document in expected)
    assert all(chunk.tokens < shard_tokens + longest for chunk in chunks) and store.manifest["segments"] is None


def test_how_tokens_are_cut_into_shards_and_compressed_changes_no_content(sources, tmp_path):
    combined = combine(sources, strategy="equal")
    variants = [Settings(shard_tokens=200), Settings(shard_tokens=5000), Settings(shard_tokens=200, compression="zstd")]
    stores = [write(combined, tmp_path / str(number), asked) for number, asked in enumerate(variants)]
    assert len({store.fingerprint for store in stores}) == 1
    assert len({len(store.chunks["train"]) for store in stores}) == 2


def test_the_shares_are_the_weights_and_the_validation_documents_come_once_in_order(sources, tmp_path):
    combined = combine(sources, [0.5, 0.5, 0])
    store = write(combined, tmp_path / "out", Settings())
    held = [(document.source, document.tokens.tolist()) for document in store.documents("validation")]
    assert held == [
        (f"{source.name}/{document.source}", document.tokens.tolist())
        for source in combined.sources
        for document in source.store.documents("validation")
    ]
    counts = store.manifest["operation"]["written"]
    assert sum(of["tokens"] for of in counts) == store.num_tokens("train")
    assert [of["passes"] for of in counts] == [1, 1, 0] and counts[2]["documents"] == 0
    assert counts[0]["tokens"] / store.num_tokens("train") == pytest.approx(0.5, abs=0.01)
    assert counts[0]["tokens"] == counts[0]["of_tokens"] or counts[1]["tokens"] == counts[1]["of_tokens"]
    again = open_dataset(tmp_path / "out")
    assert not again.merged and again.fingerprint == merge([tmp_path / "out"], tmp_path / "mix").fingerprint


def test_the_order_depends_on_the_seed_and_the_content_alone(sources, tmp_path):
    combined = combine(sources, strategy="proportional")
    first = write(combined, tmp_path / "a", Settings())
    assert write(combined, tmp_path / "b", Settings()).fingerprint == first.fingerprint
    other = write(combined, tmp_path / "c", Settings(seed=1))
    assert other.fingerprint != first.fingerprint
    assert sorted(map(repr, contents(other))) == sorted(map(repr, contents(first))), "proportional: all of everything"


def test_ids_get_the_name_of_their_dataset_only_where_they_are_in_several(tmp_path):
    left = make_store(tmp_path / "left", train=[["a", "b"]])
    right = make_store(tmp_path / "right", validation=[["c"]], train=[])
    other = make_store(tmp_path / "other", train=[["c", "d"]])
    alone = write(combine([left]), tmp_path / "alone", Settings())
    assert {document.id for document in alone.documents("train")} == {"train-0-0", "train-0-1"}
    assert not any("several datasets" in line for line in written_table(alone))
    both = write(combine([left, other], strategy="equal"), tmp_path / "both", Settings())
    assert {document.id.partition("/")[0] for document in both.documents("train")} == {"left", "other"}
    assert "an id is in several datasets: every id has the name of its dataset before it" in written_table(both)
    assert right.exists()


def test_the_manifest_says_what_it_was_made_of_and_no_place_of_the_machine(sources, tmp_path):
    combined = combine(sources, [5, 3, 2])
    store = write(combined, tmp_path / "out", Settings(tokens=3000, seed=7))
    operation = store.manifest["operation"]
    assert operation["kind"] == "materialize" and operation["strategy"] == "weighted"
    assert (operation["tokens"], operation["seed"], operation["keep_order"]) == (3000, 7, False)
    for named, source in zip(operation["sources"], combined.sources, strict=True):
        assert named["checksum"] == source.store.checksum and named["weight"] == str(source.weight)
        assert (named["name"], named["version"]) == (source.name, 1)
    assert [source["name"] for source in store.manifest["sources"]] == ["code", "text", "notes"]
    assert store.manifest["code"] == CODE and store.manifest["parent"] is None
    assert str(sources[0].parent).encode() not in b"".join(snapshot(store.path).values())
    assert {path.name for path in store.path.iterdir()} == {"manifest.json", "versions", "chunks"}
    table = written_table(store)
    assert any(line.split()[:3] == ["text", "1", "0.3000"] for line in table)


# One dataset as it stands.


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_version_of_pieces_becomes_one_of_whole_chunks(tmp_path, compression):
    path = make_store(tmp_path / "data", train=texts("code", 4, 30), validation=texts("held", 2, 3))
    drop_documents(st.Store.open(path), {"train": [0, 3, 4, 50, 119], "validation": [5]}, {"kind": "deduplicate"})
    pieces = drop_documents(st.Store.open(path), {"train": range(10, 40)}, {"kind": "deduplicate"})
    assert len(pieces.segments["train"]) > 4
    asked = Settings(keep_order=True, shard_tokens=500, compression=compression)
    store = write(combine([f"{path}@3"]), tmp_path / "compact", asked)
    assert store.fingerprint == pieces.fingerprint and store.check() == []
    assert contents(store) == contents(pieces)
    for split in st.SPLITS:
        assert np.array_equal(
            store.read(split, 0, store.num_tokens(split)), pieces.read(split, 0, pieces.num_tokens(split))
        )
    assert store.manifest["segments"] is None and len(store.chunks["train"]) > 1
    assert (
        files_of(store).equals(files_of(pieces)) and store.quarantine().read_bytes() == pieces.quarantine().read_bytes()
    )
    older = write(combine([f"{path}@1"]), tmp_path / "older", asked)
    assert older.fingerprint == st.Store.open(f"{path}@1").fingerprint != store.fingerprint
    assert written_table(store) == [f"dataset {store.path}: version 3 of data as it stands"]


@settings(max_examples=8, deadline=None)
@given(data=hyp.data())
def test_any_version_keeps_its_fingerprint(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    path = make_store(folder / "data", train=texts("a", 3, 8), validation=texts("b", 1, 3))
    dropped = {
        "train": data.draw(hyp.sets(hyp.integers(0, 23), max_size=23)),
        "validation": data.draw(hyp.sets(hyp.integers(0, 2))),
    }
    version = drop_documents(st.Store.open(path), dropped, {"kind": "deduplicate"})
    shard_tokens = data.draw(hyp.sampled_from([40, 400]))
    store = write(combine([path]), folder / "out", Settings(keep_order=True, shard_tokens=shard_tokens))
    assert store.fingerprint == version.fingerprint and contents(store) == contents(version) and store.check() == []


def test_the_order_of_several_is_not_kept(sources):
    with pytest.raises(DataError, match=r"--keep-order writes one dataset as it stands, and there are code, text"):
        request_of(combine(sources[:2], strategy="equal"), Settings(keep_order=True))


# Interruptions, and what is there already.


def test_what_was_finished_is_not_written_again(sources, tmp_path):
    combined, asked, output = combine(sources, [5, 3, 2]), Settings(shard_tokens=300), tmp_path / "out"
    whole = write(combined, tmp_path / "whole", asked)
    with pytest.raises(KeyError):  # there are shards that are not done
        write(combined, output, asked, shards=4)
    assert not output.exists()
    partial = partial_directory(output)
    before = {path: path.stat().st_mtime_ns for path in (*partial.glob("chunks/*"), *partial.glob("tasks/*"))}
    assert len(before) == 3 * 4
    (partial / "chunks" / ".half.tokens.123.tmp").write_bytes(b"of a worker that was killed")
    (partial / ".manifest.json.123.tmp").write_bytes(b"of a driver that was killed")
    (partial / "versions" / ".00001.123.tmp").mkdir(parents=True)
    (partial / "versions" / ".00001.123.tmp" / "files.parquet").write_bytes(b"of the same")
    resumed = Materialization(combined, asked, partial)
    assert resumed.progress().resumed == 4 and len(resumed.missing) == len(resumed.shards) - 4
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert snapshot(write(combined, output, asked).path) == snapshot(whole.path)
    assert not partial.exists()


def test_a_shard_whose_files_are_not_whole_is_written_again(sources, tmp_path):
    combined, asked, output = combine(sources, [5, 3, 2]), Settings(shard_tokens=300), tmp_path / "out"
    with pytest.raises(KeyError):
        write(combined, output, asked, shards=4)
    partial = partial_directory(output)
    (partial / "chunks" / "train-00001-00002.tokens").write_bytes(b"")
    (partial / "tasks" / "00001.json").write_text("{")
    work = Materialization(combined, asked, partial)
    assert sorted(work.records) == [0, 3] and finished(partial, 1) is None
    assert write(combined, output, asked).check() == []


def test_another_request_starts_anew(sources, tmp_path):
    combined, output = combine(sources, [5, 3, 2]), tmp_path / "out"
    with pytest.raises(KeyError):
        write(combined, output, Settings(shard_tokens=300), shards=4)
    for other, asked in (
        (combined, Settings(shard_tokens=300, seed=1)),
        (combine(sources, [5, 3, 1]), Settings(shard_tokens=300, seed=1)),
    ):
        assert Materialization(other, asked, partial_directory(output)).records == {}


def test_a_newer_version_of_a_source_changes_nothing(tmp_path):
    path = make_store(tmp_path / "data", train=texts("a", 2, 9))
    combined = combine([path])
    expected = contents(write(combined, tmp_path / "before", Settings()))
    drop_documents(st.Store.open(path), {"train": range(5)}, {"kind": "deduplicate"})
    assert contents(write(combined, tmp_path / "after", Settings())) == expected


def test_what_is_at_the_output_is_told_apart(sources, tmp_path):
    combined, output = combine(sources, [5, 3, 2]), tmp_path / "out"
    request = request_of(combined, Settings())
    assert find_present(output, request, False) is None
    made = write(combined, output, Settings())
    again = find_present(output, request, False)
    assert again is not None and again.checksum == made.checksum
    assert find_present(output, request, True) is None
    other = request_of(combined, Settings(seed=1))
    with pytest.raises(DataError, match="out' already holds another mixture; choose .* or pass --overwrite"):
        find_present(output, other, False)
    assert find_present(output, other, True) is None
    newer = drop_documents(made, {"train": [0]}, {"kind": "deduplicate"})
    found = find_present(output, request, False)
    assert found is not None and found.version == newer.version == 2


def test_what_was_not_made_by_merging_is_never_replaced(sources, tmp_path):
    request = request_of(combine(sources, [5, 3, 2]), Settings())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    merge(sources, tmp_path / "mix", strategy="equal")
    for path, words in (
        (sources[0], "holds a dataset that was not made by merging; choose another directory"),
        (tmp_path / "notes", "already holds something else"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(DataError, match=words):
            find_present(path, request, True)
    with pytest.raises(DataError, match="already holds a merged dataset; choose another directory or pass --overwrite"):
        find_present(tmp_path / "mix", request, False)
    assert find_present(tmp_path / "mix", request, True) is None
    assert find_present(tmp_path / "empty", request, False) is None


# What cannot be written.


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_damaged_tokens_are_not_copied(tmp_path):
    path = make_store(tmp_path / "data", train=texts("a", 2, 9))
    flip(path / "chunks" / "train-00001-00001.tokens", 40)
    for name, asked in (("mixed", Settings()), ("kept", Settings(keep_order=True))):
        with pytest.raises(DataError, match=r"document 'train-1-\d' of '.*data' does not match its checksum; verify"):
            write(combine([path]), tmp_path / name, asked)
        assert not (tmp_path / name).exists()
        assert not list(partial_directory(tmp_path / name).glob("chunks/*")), "half a chunk is not left"


@pytest.mark.parametrize("name", ["chunks/train-00001-00001.documents.parquet", "versions/00001/files.parquet"])
def test_a_damaged_index_or_record_of_a_source_is_named(tmp_path, name):
    path = make_store(tmp_path / "data", train=texts("a", 2, 9))
    flip(path / name, 60)
    st.indexes.clear()  # this process wrote it, and so has it in memory
    with pytest.raises(DataError, match=f"{name}' does not match its checksum in the manifest"):
        write(combine([path]), tmp_path / "out", Settings(keep_order=True))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence_and_the_shards_before_it_stay(sources, tmp_path, monkeypatch):
    combined, asked, output = combine(sources, [5, 3, 2]), Settings(shard_tokens=300), tmp_path / "out"
    work = Materialization(combined, asked, partial_directory(output))
    writer = ShardWriter(*work.worker_arguments)
    writer(0, work.shards[0])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DataError, match="No space left on device; check its permissions and free space"):
            writer(1, work.shards[1])
    assert sorted(Materialization(combined, asked, partial_directory(output)).records) == [0]
    assert write(combined, output, asked).check() == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"shard_tokens": 0}, r"a shard cannot have 0 tokens \(--shard-tokens\)"),
        ({"tokens": 0}, r"0 tokens \(--tokens\) cannot be written; ask for 1 or more"),
        ({"tokens": 5, "keep_order": True}, "--keep-order writes a dataset whole; leave out --tokens"),
        ({"compression": "zst"}, "unknown compression 'zst'. Did you mean 'zstd'?"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(asked, words):
    with pytest.raises(DataError, match=words):
        Settings(**asked)


def test_fewer_tokens_than_a_document_are_refused(sources, tmp_path):
    with pytest.raises(DataError, match=r"1 tokens \(--tokens\) are less than any document has; ask for more"):
        write(combine(sources, [5, 3, 2]), tmp_path / "out", Settings(tokens=1))
    assert list(tmp_path.iterdir()) == []


# Rows and tokens, by number.


@settings(max_examples=25, deadline=None)
@given(data=hyp.data())
def test_rows_and_tokens_are_found_in_any_order(tmp_path_factory, sources, data):
    folder = tmp_path_factory.mktemp("rows")
    store = st.Store.open(data.draw(hyp.sampled_from(sources)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_shards, "ROWS_IN_BATCH", data.draw(hyp.integers(1, 200)))
        patch.setattr(mixed_shards, "READ_TOKENS", data.draw(hyp.integers(1, 200)))
        lengths, hashes = write_rows(folder / "rows.arrow", store, "train")
        assert len(lengths) == len(hashes) == len(np.unique(hashes)) == store.num_documents("train")
        numbers = np.array(data.draw(hyp.lists(hyp.integers(0, len(lengths) - 1), max_size=60)), dtype=np.int64)
        rows = Rows(folder / "rows.arrow").take(numbers)
        documents = [store.document("train", number) for number in numbers.tolist()]
        expected = [(of.id, of.source, of.text_bytes, json.dumps(of.metadata, sort_keys=True)) for of in documents]
        named = rows.select(["id", "source", "text_bytes", "metadata"])
        assert [tuple(row.values()) for row in named.to_pylist()] == expected
        out = np.zeros(int(lengths[numbers].sum()), dtype=np.uint32)
        places = np.cumsum(lengths[numbers]) - lengths[numbers]
        if len(numbers):
            copy_documents(store, "train", rows["start"].to_numpy(), lengths[numbers], out, places)
        assert out.tolist() == [token for of in documents for token in of.tokens.tolist()]


def test_rows_of_nothing(tmp_path):
    store = st.Store.open(make_store(tmp_path / "data", train=[["a"]]))
    lengths, hashes = write_rows(tmp_path / "rows.arrow", store, "validation")
    assert len(lengths) == len(hashes) == 0
    none = Rows(tmp_path / "rows.arrow").take(np.zeros(0, dtype=np.int64))
    assert len(none) == 0 and none.schema == mixed_shards.ROW_SCHEMA and isinstance(none, pa.Table)
    assert PICK_TYPE.names == ("source", "pass", "document", "tokens")
