"""Versions share chunks, appear whole or not at all, and stay readable after the next one."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hyp

from blues.data.storage import versions
from blues.data.storage.manifest import MANIFEST, write_checked_json
from blues.data.storage.store import SPLITS, Store
from blues.data.storage.versions import PLACE_TYPE, documents_of, drop_documents, exclusive, places_of, segments_of
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, make_store, snapshot

TRAIN = [["one two", "three"], ["", "four five six", "more"], ["seven"]]
VALIDATION = [["eight nine"], ["ten", "eleven"]]


def texts(store: Store, split: str = "train") -> list[str]:
    tokenizer = TOKENIZER.build()
    return [tokenizer.decode(document.tokens[:-1]) for document in store.documents(split)]


def tokens(store: Store, split: str = "train") -> list[int]:
    return store.read(split, 0, store.num_tokens(split)).tolist()


@pytest.fixture(params=["none", "zstd"])
def store(tmp_path, request) -> Store:
    path = make_store(tmp_path / "data", train=TRAIN, validation=VALIDATION, compression=request.param)
    return Store.open(path)


def test_a_version_without_some_documents_shares_the_chunks(store, tmp_path):
    before = snapshot(store.path / "chunks")
    newer = drop_documents(store, {"train": [1, 3], "validation": [0]}, {"kind": "deduplicate"}, {"why.txt": b"x"})
    assert texts(newer) == ["one two", "", "more", "seven"] and texts(newer, "validation") == ["ten", "eleven"]
    assert snapshot(store.path / "chunks") == before, "no token was copied, none was removed"
    assert (newer.version, newer.manifest["parent"]) == (2, store.checksum) and newer.check() == []
    assert [chunk.data.file[-20:-7] for chunk in newer.chunks["validation"]] != [], "unused chunks are not listed"
    assert len(newer.chunks["validation"]) == 1
    assert (store.path / "versions" / "00002" / "why.txt").read_bytes() == b"x"
    assert newer.num_documents("train") == 4 == newer.manifest["splits"]["train"]["documents"]
    assert newer.text_bytes("train") == sum(len(text) for text in texts(newer))


def test_every_version_stays_readable(store):
    first = tokens(store)
    drop_documents(store, {"train": [0]}, {"kind": "deduplicate"})
    newest = drop_documents(Store.open(store.path), {"train": [0]}, {"kind": "deduplicate"})
    assert newest.version == Store.open(store.path).version == 3
    assert tokens(Store.open(f"{store.path}@1")) == first == tokens(Store.open(store.path, checksum=store.checksum))
    assert texts(Store.open(f"{store.path}@2")) == texts(store)[1:] and texts(newest) == texts(store)[2:]
    assert pickle.loads(pickle.dumps(Store.open(f"{store.path}@2"))).version == 2
    with pytest.raises(DataError, match="has no version 7; it has 1, 2, 3"):
        Store.open(f"{store.path}@7")
    with pytest.raises(DataError, match="has no version with the checksum 000000000000"):
        Store.open(store.path, checksum="0" * 64)


def test_windows_documents_and_places_go_across_segments(store):
    newer = drop_documents(store, {"train": [1, 3]}, {"kind": "deduplicate"})
    expected = np.array(tokens(newer), dtype=np.uint32)
    assert len(newer.segments["train"]) == 4
    for length in (1, 2, 5, len(expected)):
        starts = np.arange(len(expected) - length + 1)
        windows = newer.read_windows("train", starts, length)
        assert windows.dtype == np.uint32
        assert np.array_equal(windows, np.stack([newer.read("train", s, s + length) for s in starts.tolist()]))
        assert np.array_equal(windows, np.lib.stride_tricks.sliding_window_view(expected, length))
    for starts in ([-1], [len(expected)]):
        with pytest.raises(IndexError):
            newer.read_windows("train", np.array(starts), 1)
    assert newer.read_windows("train", np.array([], dtype=np.int64), 3).shape == (0, 3)
    ends = newer.document_ends("train")
    assert ends.tolist() == np.cumsum([len(document.tokens) for document in newer.documents("train")]).tolist()
    listed = [row for table in newer.tables("train") for row in table.to_pylist()]
    for number, document in enumerate(newer.documents("train")):
        alone, row = newer.document("train", number), listed[number]
        assert (alone.id, alone.tokens.tolist()) == (document.id, document.tokens.tolist())
        assert (row["id"], row["length"], row["text_bytes"]) == (document.id, len(document.tokens), document.text_bytes)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=hyp.data())
def test_any_documents_can_go_in_any_number_of_steps(tmp_path_factory, data):
    chunks = data.draw(
        hyp.lists(hyp.lists(hyp.sampled_from(["a", "bb", "ccc", ""]), min_size=1), min_size=1, max_size=4)
    )
    store = Store.open(make_store(tmp_path_factory.mktemp("any") / "data", train=chunks))
    kept = texts(store)
    for _ in range(data.draw(hyp.integers(1, 3))):
        if len(kept) < 2:
            break
        gone = data.draw(hyp.sets(hyp.integers(0, len(kept) - 1), max_size=len(kept) - 1))
        kept = [text for number, text in enumerate(kept) if number not in gone]
        store = drop_documents(store, {"train": gone}, {"kind": "deduplicate"})
        assert texts(store) == kept and store.check() == []
        places, sources = documents_of(store, "train")
        assert places.tolist() == one_by_one(store, "train") and sources.to_pylist() == [
            document.source for document in store.documents("train")
        ]
    again = Store.open(make_store(store.path.parent / "again", train=[kept]))
    assert again.fingerprint == store.fingerprint, "it follows from the documents, not from how they lie in chunks"


def one_by_one(store: Store, split: str) -> list[tuple]:
    """Where documents lie, with what is known of them: found for one document after the other."""
    rows = []
    for number, document in enumerate(store.documents(split)):
        chunk, row = store.locate(split, number)
        start = store.index(split, chunk)["end"][row - 1].as_py() if row else 0
        digest = xxhash.xxh3_64_intdigest(np.ascontiguousarray(document.tokens, dtype="<u4").tobytes())
        rows.append((chunk, row, start, len(document.tokens), document.text_bytes, digest))
    return rows


def test_segments_join_neighbours_and_keep_any_order():
    rows = [(0, 4, 40, 5), (0, 5, 45, 1), (2, 0, 0, 3), (0, 6, 46, 2), (0, 5, 45, 1)]
    places = np.array([(*row, 9, 9) for row in rows], dtype=PLACE_TYPE)
    found = segments_of(places).tolist()
    assert found == [(0, 4, 2, 40, 6), (2, 0, 1, 0, 3), (0, 6, 1, 46, 2), (0, 5, 1, 45, 1)]
    assert len(segments_of(places[:0])) == 0


def test_places_and_segments_are_inverse(store):
    newer = drop_documents(store, {"train": [2]}, {"kind": "deduplicate"})
    for split in SPLITS:
        assert np.array_equal(segments_of(places_of(newer, split)), newer.segments[split])


def test_only_the_newest_version_is_gone_on_from(store):
    drop_documents(store, {"train": [0]}, {"kind": "deduplicate"})
    with pytest.raises(DataError, match="version 1 of .* is not its newest, 2; start from that one"):
        drop_documents(store, {"train": [1]}, {"kind": "deduplicate"})


@pytest.mark.parametrize("moment", range(6))
def test_a_version_that_is_not_finished_changes_nothing(store, monkeypatch, moment):
    """A failure at any of the writes: the version before is whole, and the next attempt makes the same version."""
    before, calls = tokens(store), []
    write = versions.cfg.write_atomic

    def failing(path, content):
        calls.append(path)
        if len(calls) > moment:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(versions.cfg, "write_atomic", failing)
    with pytest.raises(OSError, match="No space left"):
        drop_documents(store, {"train": [0]}, {"kind": "deduplicate"}, {"a": b"", "b": b""})
    monkeypatch.undo()
    assert tokens(Store.open(store.path)) == before and Store.open(store.path).version == 1
    assert Store.open(store.path).check() == []
    newer = drop_documents(store, {"train": [0]}, {"kind": "deduplicate"}, {"a": b"", "b": b""})
    assert newer.version == 2 and newer.check() == [] and texts(newer) == texts(store)[1:]
    assert sorted(os.listdir(store.path / "versions")) == ["00001", "00002"]


def test_one_process_writes_at_a_time(tmp_path):
    with exclusive(tmp_path / "data"):
        with pytest.raises(DataError, match="another process is writing at .*data"), exclusive(tmp_path / "data"):
            pass
        with exclusive(tmp_path / "other"):
            pass
    with exclusive(tmp_path / "data"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_damage_is_not_taken_over_into_a_new_version(store):
    file = store.path / "versions" / "00001" / "files.parquet"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError, match="files.parquet' does not match its checksum in the manifest; restore it"):
        drop_documents(store, {"train": [0]}, {"kind": "dedup"})
    assert Store.open(store.path).version == 1
    store.quarantine().write_bytes(b"other")
    with pytest.raises(DataError, match="quarantine.jsonl' does not match its checksum in the manifest; restore it"):
        store.read_quarantine()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("chunk", 9, "a segment is of a chunk that is not there"),
        ("documents", 0, "a segment is empty or begins before its chunk"),
        ("first_token", -1, "a segment is empty or begins before its chunk"),
        ("tokens", 1 << 40, "a segment ends after its chunk"),
        ("first_document", (1 << 63) - 1, "a segment ends after its chunk"),
    ],
)
def test_segments_that_lie_outside_of_their_chunks_are_refused(store, column, value, words):
    newer = drop_documents(store, {"train": [0]}, {"kind": "dedup"})
    file = store.path / newer.manifest["segments"]["file"]
    table = pq.read_table(file)
    values = [value, *table[column].to_pylist()[1:]]
    kind = table.schema.field(column).type
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, kind)), file)
    record = {
        "file": newer.manifest["segments"]["file"],
        "bytes": file.stat().st_size,
        "xxh3": xxhash.xxh3_128_hexdigest(file.read_bytes()),
    }
    tree = {key: each for key, each in newer.manifest.items() if key != "checksum"} | {"segments": record}
    write_checked_json(store.path / MANIFEST, tree)
    with pytest.raises(DataError, match=f"segments.parquet' cannot be used \\({words}\\)"):
        Store.open(store.path)


def test_a_store_pickles_as_what_it_is_whatever_lies_beside_it(tmp_path):
    first = Store.open(make_store(tmp_path / "code", train=[["one"]]))
    make_store(tmp_path / "code@1", train=[["another"]])
    assert pickle.loads(pickle.dumps(first)).fingerprint == first.fingerprint
