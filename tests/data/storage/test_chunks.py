"""Chunks give back what was written, compressed or not, from any place and through any number of readers."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hyp

from blues.data.storage import chunks
from blues.data.storage.chunks import FRAME_TOKENS, ChunkRecord, ChunkWriter, load_tokens, open_reader
from blues.errors import DataError


def write(folder: Path, documents: list[np.ndarray], compression: str, number: int = 0) -> ChunkRecord:
    writer = ChunkWriter(folder, "train", number, compression=compression)
    for place, tokens in enumerate(documents):
        writer.add(tokens, id=f"d{place}", source="s", text_bytes=len(tokens), metadata={"n": place})
    return writer.close()


def random_documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 200_000, length, dtype=np.uint32) for length in lengths]


def read(folder: Path, record: ChunkRecord, start: int, count: int) -> np.ndarray:
    out = np.empty(count, dtype=np.uint32)
    open_reader(str(folder / record.data.file), record.data.xxh3).read_into(out.data.cast("B"), start)
    return out


LENGTHS = [1, 5, FRAME_TOKENS - 7, 3, FRAME_TOKENS, 2 * FRAME_TOKENS + 11, 40]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_stretch_comes_back_across_frames(tmp_path, compression):
    documents = random_documents(LENGTHS)
    record = write(tmp_path, documents, compression)
    tokens = np.concatenate(documents)
    assert record.tokens == len(tokens) and record.documents == len(documents)
    assert np.array_equal(load_tokens(tmp_path, record), tokens)
    borders = [0, 1, *(k * FRAME_TOKENS + d for k in range(1, 4) for d in (-1, 0, 1)), len(tokens) - 1]
    for start in borders:
        for count in (1, 2, 1000, FRAME_TOKENS + 1, len(tokens)):
            count = min(count, len(tokens) - start)
            assert np.array_equal(read(tmp_path, record, start, count), tokens[start : start + count])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=hyp.lists(hyp.integers(1, 3 * FRAME_TOKENS), max_size=5), seed=hyp.integers(0, 99))
def test_compressed_equals_raw_for_any_documents(tmp_path_factory, lengths, seed):
    folder, documents = tmp_path_factory.mktemp("any"), random_documents(lengths, seed)
    raw, packed = write(folder, documents, "none"), write(folder, documents, "zstd", 1)
    assert np.array_equal(load_tokens(folder, raw), load_tokens(folder, packed))
    first, second = ((folder / record.index.file).read_bytes() for record in (raw, packed))
    assert first == second, "the index does not depend on how the tokens are stored"


def test_digests_and_checksums_are_those_of_the_bytes(tmp_path):
    documents = random_documents([3, 70])
    for number, compression in enumerate(("none", "zstd")):
        record = write(tmp_path, documents, compression, number)
        content = (tmp_path / record.data.file).read_bytes()
        assert (record.data.bytes, record.data.xxh3) == (len(content), xxhash.xxh3_128_hexdigest(content))
        assert chunks.file_checksum(tmp_path / record.data.file) == record.data.xxh3
        index = pq.read_table(tmp_path / record.index.file)
        assert index["digest"].to_pylist() == [xxhash.xxh3_64_intdigest(tokens.tobytes()) for tokens in documents]


def test_other_programs_read_a_compressed_chunk(tmp_path):
    """The seekable format is plain zstd: frames, and a table that decoders skip."""
    documents = random_documents(LENGTHS)
    record = write(tmp_path, documents, "zstd")
    with pa.input_stream(str(tmp_path / record.data.file), compression="zstd") as stream:
        assert stream.read() == np.concatenate(documents).tobytes()


def test_repetitive_tokens_become_small(tmp_path):
    record = write(tmp_path, [np.arange(100_000, dtype=np.uint32) % 50], "zstd")
    assert record.data.bytes < 4 * record.tokens / 20


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_many_threads_read_the_same_chunk(tmp_path, compression):
    documents = random_documents([30 * FRAME_TOKENS])
    record, tokens = write(tmp_path, documents, compression), documents[0]
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for start in generator.integers(0, len(tokens) - 500, 300).tolist():
            if not np.array_equal(read(tmp_path, record, start, 500), tokens[start : start + 500]):
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_frames_in_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "frames", chunks.BoundedCache(3 * FRAME_TOKENS * 4))
    record = write(tmp_path, random_documents([10 * FRAME_TOKENS]), "zstd")
    for start in range(0, 10 * FRAME_TOKENS, FRAME_TOKENS):
        read(tmp_path, record, start, 5)
    assert chunks.frames.size == 3 * FRAME_TOKENS * 4


def test_a_chunk_made_again_at_its_place_is_read_anew(tmp_path):
    for compression in ("none", "zstd"):
        for seed in (0, 1):
            [tokens] = documents = random_documents([50], seed)
            assert np.array_equal(read(tmp_path, write(tmp_path, documents, compression), 0, 50), tokens)


def test_damage_met_while_reading_is_a_sentence(tmp_path):
    record = write(tmp_path, random_documents([3 * FRAME_TOKENS]), "zstd")
    file = tmp_path / record.data.file
    content = bytearray(file.read_bytes())
    second = int(chunks.ZstdReader(str(file), "")._offsets[1])
    content[second] ^= 255  # the magic number of a frame; `verify` finds what decompresses to something else
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"frame 1 of .* is damaged .*verify the dataset"):
        load_tokens(tmp_path, record)
    file.write_bytes(content[:-3])
    with pytest.raises(DataError, match="does not end in a table of zstd frames"):
        load_tokens(tmp_path, record)
    raw = write(tmp_path, random_documents([10]), "none", 1)
    (tmp_path / raw.data.file).write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match="was cut short while it was in use; verify the dataset"):
        read(tmp_path, raw, 0, 10)


def test_readers_close_their_files(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(20):
        record = write(tmp_path, random_documents([10]), ("none", "zstd")[number % 2], number)
        read(tmp_path, record, 0, 10)
    open_reader.cache_clear()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_an_interrupted_process_leaves_nothing_with_a_chunks_name(tmp_path):
    program = (
        "import os, sys; import numpy as np; from pathlib import Path\n"
        "from blues.data.storage.chunks import ChunkWriter\n"
        "writer = ChunkWriter(Path(sys.argv[1]), 'train', 0)\n"
        "writer.add(np.zeros(1 << 20, np.uint32), id='a', source='s', text_bytes=1, metadata={})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert not list((tmp_path / "chunks").glob("train*"))
