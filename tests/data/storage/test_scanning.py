"""The one pass over a chunk finds what a plain look at the whole of it finds, wherever blocks and documents end."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as hyp

from blues.data.storage import chunks, scanning
from blues.data.storage.chunks import ChunkRecord, ChunkWriter, FileRecord
from blues.data.storage.scanning import Scanner
from blues.errors import DataError

EOT, VOCABULARY = 9, 10
documents = hyp.lists(hyp.lists(hyp.integers(0, EOT - 1), max_size=20), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 tokens and frames of 4, so that documents lie across them in every way."""
    monkeypatch.setattr(scanning, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(chunks, "FRAME_TOKENS", 4)
    monkeypatch.setattr(scanning, "BYTES_PER_DIGEST", 1)


def write(path: Path, contents: list[list[int]], compression: chunks.Compression = "none") -> ChunkRecord:
    writer = ChunkWriter(path, "train", 0, compression=compression)
    for number, tokens in enumerate(contents):
        array = np.array([*tokens, EOT], dtype=np.uint32)
        writer.add(array, id=str(number), source="s", text_bytes=len(tokens), metadata={})
    return writer.close()


def write_index(path: Path, record: ChunkRecord, **columns: list[int]) -> ChunkRecord:
    """Other values in the index of a chunk, with a record that fits."""
    file = path / record.index.file
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.uint64()))
    pq.write_table(table, file)
    content = file.read_bytes()
    return dataclasses.replace(
        record, index=FileRecord(record.index.file, len(content), xxhash.xxh3_128_hexdigest(content))
    )


def scan(path: Path, record: ChunkRecord, ranges: list[tuple[int, int]] | None = None) -> tuple[Scanner, list[str]]:
    scanner = Scanner(path, VOCABULARY, EOT)
    counted = np.array([(0, record.tokens)] if ranges is None else ranges, dtype=np.int64).reshape(-1, 2)
    return scanner, [issue.what for issue in scanner.scan(record, counted).issues]


def naive_issues(tokens: np.ndarray, ends: np.ndarray, digests: np.ndarray) -> list[str]:
    """The beginning of what is said of a chunk, from all of it at once."""
    if np.any(np.diff(ends, prepend=0) <= 0) or (ends[-1] if len(ends) else 0) != len(tokens):
        return ["the ends of its documents do not rise"]
    if not np.array_equal(np.flatnonzero(tokens == EOT) + 1, ends):
        return ["<|endoftext|> does not stand exactly"]
    own = [xxhash.xxh3_64_intdigest(tokens[a:b].tobytes()) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    wrong = np.flatnonzero(np.array(own, dtype=np.uint64) != digests)
    if not len(wrong):
        return []
    return [f"it holds other documents than its index says (digests differ): {len(wrong)}, the first of them number "]


@settings(max_examples=60, deadline=None)
@given(contents=documents, compression=hyp.sampled_from(["none", "zstd"]), data=hyp.data())
def test_a_whole_chunk_is_good_and_its_tokens_are_counted(contents, compression, data):
    with tempfile.TemporaryDirectory() as folder:
        record = write(Path(folder), contents, compression)
        tokens = np.concatenate([[*content, EOT] for content in contents])
        cuts = sorted(data.draw(hyp.lists(hyp.integers(0, len(tokens)), max_size=6)))
        ranges = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
        scanner, issues = scan(Path(folder), record, ranges)
        assert issues == []
        chosen = np.concatenate([np.zeros(0, int), *(tokens[a:b] for a, b in ranges)])
        counts = scanner.counts_V.get("train", np.zeros(VOCABULARY, int))
        assert counts.tolist() == np.bincount(chosen, minlength=VOCABULARY).tolist()
        assert scanner.bytes >= tokens.size * 4


@settings(max_examples=60, deadline=None)
@given(contents=documents, column=hyp.sampled_from(["end", "digest"]), data=hyp.data())
def test_an_index_that_says_something_else_is_found_as_a_plain_look_finds_it(contents, column, data):
    with tempfile.TemporaryDirectory() as folder:
        record = write(Path(folder), contents)
        table = pq.read_table(Path(folder) / record.index.file)
        ends, digests = (np.array(table[name].to_pylist(), dtype=np.uint64) for name in ("end", "digest"))
        values = ends if column == "end" else digests
        place = data.draw(hyp.integers(0, len(values) - 1))
        values[place] = data.draw(hyp.integers(0, 2**63 - 1 if column == "digest" else int(ends[-1]) + 2))
        record = write_index(Path(folder), record, **{column: values.tolist()})
        tokens = np.concatenate([np.array([*content, EOT], dtype=np.uint32) for content in contents])
        _, issues = scan(Path(folder), record)
        expected = naive_issues(tokens, ends.astype(np.int64), digests)
        assert [issue[: len(words)] for issue, words in zip(issues, expected, strict=True)] == expected


def test_digests_of_short_documents_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "BYTES_PER_DIGEST", 1 << 10)
    record = write(tmp_path, [[1]] * 400)
    digests = pq.read_table(tmp_path / record.index.file)["digest"].to_pylist()
    record = write_index(tmp_path, record, digest=[digest ^ 1 for digest in digests])
    hashed: list[int] = []
    real = xxhash.xxh3_64_intdigest
    monkeypatch.setattr(scanning.xxhash, "xxh3_64_intdigest", lambda block: hashed.append(1) or real(block))
    [issue] = scan(tmp_path, record)[1]
    assert "it holds other documents than its index says" in issue and len(hashed) < 400


def test_ids_outside_of_the_vocabulary_are_named_and_not_counted(tmp_path):
    record = write(tmp_path, [[1, 2, 70_000]])
    scanner, issues = scan(tmp_path, record)
    assert issues == ["token 70000 is outside the vocabulary of 10 ids"] and scanner.counts_V == {}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_bit_is_all_that_is_said_of_a_chunk(tmp_path, compression):
    record = write(tmp_path, [[1, 2, 3] * 9, [4]], compression)
    file = tmp_path / record.data.file
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        assert scan(tmp_path, record)[1] == ["its bytes do not match the checksum in the manifest"]


def test_what_is_no_index_is_an_issue_and_the_tokens_are_read_all_the_same(tmp_path):
    record = write(tmp_path, [[1, 2]])
    (tmp_path / record.index.file).write_bytes(b"PAR1 but no more")
    content = (tmp_path / record.index.file).read_bytes()
    record = dataclasses.replace(
        record, index=FileRecord(record.index.file, len(content), xxhash.xxh3_128_hexdigest(content))
    )
    scanner, [issue] = scan(tmp_path, record)
    assert issue.startswith("is no index of documents (") and scanner.counts_V["train"].sum() == 3
    with pytest.raises(DataError, match="is no index of documents"):
        scanning.read_contents(tmp_path, record.index)


def test_an_empty_chunk_is_good(tmp_path):
    assert scan(tmp_path, ChunkWriter(tmp_path, "train", 0).close())[1] == []
    assert scan(tmp_path, ChunkWriter(tmp_path, "train", 1, compression="zstd").close())[1] == []


def test_a_file_that_vanishes_is_an_issue(tmp_path):
    record = write(tmp_path, [[1, 2]])
    (tmp_path / record.data.file).unlink()
    assert scan(tmp_path, record)[1] == ["cannot be read (No such file or directory)"]
