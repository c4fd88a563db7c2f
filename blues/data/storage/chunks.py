"""Chunks: the files of a dataset that hold its tokens, written once and never changed.

In: documents as token arrays. Out: two files for each chunk, a record of both with checksums, and readers of them.

    chunks/train-00001-00012.tokens             little-endian uint32, `<|endoftext|>` after each document
    chunks/train-00001-00012.tokens.zst         the same as zstd frames of FRAME_TOKENS tokens, with a table for seeking
    chunks/train-00001-00012.documents.parquet  id, source, end (in tokens, exclusive), text_bytes, digest, metadata

The numbers are the dataset's version that brought the chunk, and the chunk's place in it. A compressed chunk follows
the seekable format of zstd (facebook/zstd, contrib/seekable_format), so `zstd -d` reads it too.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from blues import config as cfg
from blues.data.storage.arrays import strings, whole_numbers
from blues.data.storage.manifest import read_regular
from blues.errors import DataError

CHUNKS = "chunks"
TOKEN_TYPE = np.dtype("<u4")
Compression = Literal["none", "zstd"]
SUFFIXES: dict[str, str] = {"none": ".tokens", "zstd": ".tokens.zst"}
ZSTD_LEVEL = 3
FRAME_TOKENS = 1 << 14
"""Tokens of a compressed frame: what must be decompressed to read one of them."""
FRAME_BYTES = 64 << 20
"""Decompressed frames that stay in memory, in all."""
OPEN_READERS = 256
READ_BYTES = 1 << 24
SEEK_TABLE, SEEK_FOOTER = 0x184D2A5E, 0x8F92EAB1  # magic numbers of the seekable format
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("end", pa.uint64()),
        ("text_bytes", pa.uint64()),
        ("digest", pa.uint64()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True)
class FileRecord:
    """A file of a dataset as the manifest knows it: path relative to the dataset, size in bytes, xxh3-128 (hex)."""

    file: str
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk of one split: its two files and what they hold. `text_bytes` counts the UTF-8 of the documents."""

    split: str
    tokens: int
    documents: int
    text_bytes: int
    data: FileRecord
    index: FileRecord

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> ChunkRecord:
        """Inverse of `dataclasses.asdict`."""
        return cls(**{**tree, "data": FileRecord(**tree["data"]), "index": FileRecord(**tree["index"])})


class ChunkWriter:
    """Writes one chunk of one split: documents in order, then `close()`, which makes both files appear at once."""

    def __init__(
        self, directory: Path, split: str, number: int, *, version: int = 1, compression: Compression = "none"
    ) -> None:
        self.directory, self.split = directory, split
        name = f"{CHUNKS}/{split}-{version:05d}-{number:05d}"
        self._data_name, self._index_name = name + SUFFIXES[compression], name + ".documents.parquet"
        path = directory / self._data_name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115  (closed by close or abort)
        self._hash = xxhash.xxh3_128()
        self._frames = _FrameWriter() if compression == "zstd" else None
        self._tokens = self._text_bytes = 0
        self._index: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}

    def add(self, tokens: np.ndarray, *, id: str, source: str, text_bytes: int, metadata: Mapping[str, Any]) -> None:
        """Append a document: uint32 tokens that end in `<|endoftext|>`."""
        content = np.ascontiguousarray(tokens, dtype=TOKEN_TYPE)
        if self._frames is None:
            self._write(content.data)
        else:
            self._write(self._frames.add(content))
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        described = json.dumps(metadata, sort_keys=True) if metadata else "{}"
        values = (id, source, self._tokens, text_bytes, xxhash.xxh3_64_intdigest(content.data), described)
        for column, value in zip(self._index.values(), values, strict=True):
            column.append(value)

    def close(self) -> ChunkRecord:
        """Write the index, make both files durable and give them their names."""
        if self._frames is not None:
            self._write(self._frames.end())
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        buffer = pa.BufferOutputStream()
        pq.write_table(self._index_table(), buffer, compression="zstd")
        index = buffer.getvalue().to_pybytes()
        os.replace(self._temporary, self.directory / self._data_name)
        cfg.write_atomic(self.directory / self._index_name, index)  # its fsync of the folder makes both names durable
        return ChunkRecord(
            split=self.split,
            tokens=self._tokens,
            documents=len(self._index["end"]),
            text_bytes=self._text_bytes,
            data=FileRecord(self._data_name, size, self._hash.hexdigest()),
            index=FileRecord(self._index_name, len(index), xxhash.xxh3_128_hexdigest(index)),
        )

    def _index_table(self) -> pa.Table:
        columns = (
            strings(values) if field.type == pa.string() else whole_numbers(np.array(values, dtype="<u8"), field.type)
            for field, values in zip(INDEX_SCHEMA, self._index.values(), strict=True)
        )
        return pa.Table.from_arrays(list(columns), schema=INDEX_SCHEMA)

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, content: Any) -> None:
        self._file.write(content)
        self._hash.update(content)


class _FrameWriter:
    """Cuts a stream of tokens into zstd frames and remembers their sizes for the table at the end."""

    def __init__(self) -> None:
        self._codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._sizes: list[tuple[int, int]] = []

    def add(self, tokens: np.ndarray) -> bytes:
        """The frames that these tokens fill."""
        self._waiting.append(tokens)
        self._count += len(tokens)
        if self._count < FRAME_TOKENS:
            return b""
        joined = np.concatenate(self._waiting)
        whole = len(joined) - len(joined) % FRAME_TOKENS
        rest = joined[whole:].copy()
        self._waiting, self._count = ([rest] if len(rest) else []), len(rest)
        return b"".join(self._frame(joined[start : start + FRAME_TOKENS]) for start in range(0, whole, FRAME_TOKENS))

    def end(self) -> bytes:
        """The last frame and the table."""
        last = self._frame(np.concatenate(self._waiting)) if self._count else b""
        entries = np.array(self._sizes, dtype="<u4").reshape(-1, 2).tobytes()
        header = np.array([SEEK_TABLE, len(entries) + 9], dtype="<u4").tobytes()
        footer = np.array([len(self._sizes)], dtype="<u4").tobytes() + b"\0" + SEEK_FOOTER.to_bytes(4, "little")
        return last + header + entries + footer

    def _frame(self, tokens: np.ndarray) -> bytes:
        content = tokens.tobytes()
        frame = self._codec.compress(content, asbytes=True)
        self._sizes.append((len(frame), len(content)))
        return frame


def _open(owner: object, path: str) -> int:
    """A descriptor that is closed when its owner is gone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


def _announce(descriptor: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS, where reading simply waits
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)


class RawReader:
    """Tokens of an uncompressed chunk by position. Reads from the file and keeps nothing in memory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = _open(self, path)

    def announce(self, start: int, count: int) -> None:
        """Have the system begin to read tokens that will be asked for, beside others that it reads."""
        size = TOKEN_TYPE.itemsize
        _announce(self._descriptor, start * size, count * size)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill `out` (bytes) with the tokens from number `start` on."""
        offset, filled = start * TOKEN_TYPE.itemsize, 0
        while filled < len(out):
            count = os.preadv(self._descriptor, [out[filled:]], offset + filled)
            if count == 0:
                raise DataError(f"{self.path!r} was cut short while it was in use; verify the dataset")
            filled += count


class ZstdReader:
    """Tokens of a compressed chunk by position; decompresses the frames it needs, of which the newest stay in memory.

    Raises:
        DataError: on making one, when the file has no table of frames; on reading, when a frame is damaged.
    """

    def __init__(self, path: str, checksum: str) -> None:
        self.path, self.checksum = path, checksum
        self._descriptor = _open(self, path)
        size = os.fstat(self._descriptor).st_size
        footer = os.pread(self._descriptor, 9, max(0, size - 9))
        count = int.from_bytes(footer[:4], "little")
        table = os.pread(self._descriptor, 8 * count, max(0, size - 9 - 8 * count))
        if len(footer) < 9 or int.from_bytes(footer[5:], "little") != SEEK_FOOTER or len(table) != 8 * count:
            raise DataError(f"{path!r} does not end in a table of zstd frames; restore it or prepare the dataset again")
        sizes = np.frombuffer(table, dtype="<u4").reshape(-1, 2).astype(np.int64)
        self._offsets = np.concatenate(([0], np.cumsum(sizes[:, 0])))
        self._lengths = sizes[:, 1]
        whole = FRAME_TOKENS * TOKEN_TYPE.itemsize
        if np.any(self._lengths[:-1] != whole) or np.any((self._lengths < 1) | (self._lengths > whole)):
            raise DataError(f"the table of zstd frames of {path!r} is damaged; restore it or prepare the dataset again")
        self._codec = pa.Codec("zstd")

    @property
    def frames(self) -> int:
        """How many there are; all but the last hold FRAME_TOKENS tokens."""
        return len(self._lengths)

    def announce(self, start: int, count: int) -> None:
        """Have the system begin to read tokens that will be asked for, beside others that it reads."""
        first, last = (min(place // FRAME_TOKENS, len(self._lengths) - 1) for place in (start, start + count - 1))
        begin, end = int(self._offsets[first]), int(self._offsets[last + 1])
        _announce(self._descriptor, begin, end - begin)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill `out` (bytes) with the tokens from number `start` on."""
        target = np.frombuffer(out, dtype=TOKEN_TYPE)
        filled = 0
        while filled < len(target):
            frame, inside = divmod(start + filled, FRAME_TOKENS)
            tokens = self._cached(frame)[inside:]
            count = min(len(tokens), len(target) - filled)
            if count == 0:
                raise DataError(f"{self.path!r} ends within its frame {frame}; verify the dataset")
            target[filled : filled + count] = tokens[:count]
            filled += count

    def _cached(self, frame: int) -> np.ndarray:
        # The key is not the reader itself: that would keep its file open.
        return frames.get((self.path, self.checksum, frame), lambda: self.decompress(frame))

    def decompress(self, frame: int) -> np.ndarray:
        """The tokens of one frame."""
        if frame >= len(self._lengths):
            raise DataError(f"{self.path!r} has no frame {frame}; verify the dataset")
        length = int(self._lengths[frame])
        content = os.pread(
            self._descriptor, int(self._offsets[frame + 1] - self._offsets[frame]), int(self._offsets[frame])
        )
        try:
            return np.frombuffer(self._codec.decompress(content, length, asbytes=True), dtype=TOKEN_TYPE)
        except (pa.ArrowException, OSError, ValueError) as error:
            what = " ".join(str(error).split())
            raise DataError(f"frame {frame} of {self.path!r} is damaged ({what}); verify the dataset") from None


class BoundedCache:
    """What was made last, by key, up to so many bytes (`nbytes` of the values) over all threads of this process."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._values: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The value of `key`, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:  # another thread may have been faster
                self._values[key] = value
                self.size += value.nbytes
            while self.size > self.limit and len(self._values) > 1:
                self.size -= self._values.popitem(last=False)[1].nbytes
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self.size = 0


frames = BoundedCache(FRAME_BYTES)


@functools.lru_cache(maxsize=OPEN_READERS)
def open_reader(path: str, checksum: str) -> RawReader | ZstdReader:
    """A reader of the chunk at `path`; the checksum keeps a chunk made again at the same path apart."""
    return ZstdReader(path, checksum) if path.endswith(SUFFIXES["zstd"]) else RawReader(path)


@functools.lru_cache(maxsize=OPEN_READERS)
def memory_map(path: str, checksum: str) -> np.ndarray:
    """The tokens of an uncompressed chunk, read-only, of which only what is touched becomes resident."""
    return np.memmap(path, dtype=TOKEN_TYPE, mode="r").view(np.ndarray)


def load_tokens(path: Path, record: ChunkRecord) -> np.ndarray:
    """All tokens of a chunk, read-only: memory-mapped, or decompressed."""
    if record.tokens == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=TOKEN_TYPE)
    where = str(path.absolute() / record.data.file)
    if not where.endswith(SUFFIXES["zstd"]):
        return memory_map(where, record.data.xxh3)
    tokens = np.empty(record.tokens, dtype=TOKEN_TYPE)
    reader, frame, filled = ZstdReader(where, record.data.xxh3), 0, 0
    while filled < len(tokens):  # past the cache: a whole chunk would push everything else out of it
        content = reader.decompress(frame)[: len(tokens) - filled]
        tokens[filled : filled + len(content)] = content
        frame, filled = frame + 1, filled + len(content)
    return tokens


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of whole numbers, read-only. (Arrow's own `to_numpy` would import pandas, which takes 0.3 s.)"""
    return np.from_dlpack(table[name].combine_chunks())


def read_checked(directory: Path, record: FileRecord) -> bytes:
    """The bytes of a file of a dataset that fits in memory.

    Raises:
        DataError: it cannot be read, or is not what was written.
    """
    path = directory / record.file
    try:
        content = read_regular(path)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}; restore it") from None
    if xxhash.xxh3_128_hexdigest(content) != record.xxh3:
        raise DataError(f"{str(path)!r} does not match its checksum in the manifest; restore it")
    return content


def file_checksum(path: Path) -> str:
    """xxh3-128 of a file, as hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
