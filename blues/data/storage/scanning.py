"""One pass over the bytes of a chunk: whether they are what was written, and how often each token occurs.

In: the record of a chunk and its two files. Out: what its index says (`Contents`), the issues, and counts of tokens.

A block of tokens is read once and goes through everything while it lies in the processor's cache: the checksum of the
file, the largest id, the places of `<|endoftext|>`, the digests of the documents, the counts. The counts take half of
the time; of short documents, whose digests would take the most, some are left out. `blues benchmark data` measures it.

Legend: D documents of a chunk, N tokens of a block, V ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from blues.data.storage.chunks import (
    SUFFIXES,
    TOKEN_TYPE,
    ChunkRecord,
    FileRecord,
    RawReader,
    ZstdReader,
    numbers,
    read_checked,
)
from blues.data.storage.manifest import NOT_REGULAR, is_regular
from blues.data.storage.store import Issue
from blues.errors import DataError

BLOCK_TOKENS = 1 << 17
"""512 KiB: within the L2 cache of today's processors."""
BYTES_PER_DIGEST = 1 << 10
"""Of documents shorter than this in the mean, only so many are hashed one by one: a call costs as much as 1 KiB."""
CHANGED = "its bytes do not match the checksum in the manifest"
INDEX_COLUMNS = ("end", "text_bytes", "digest")


@dataclass(frozen=True)
class Contents:
    """What the index of a chunk says of its documents: ends and text_bytes int64[D], digests uint64[D]."""

    ends: np.ndarray
    text_bytes: np.ndarray
    digests: np.ndarray


@dataclass(frozen=True)
class Scan:
    """What was found in one chunk. contents: None where the index cannot be used."""

    contents: Contents | None
    issues: tuple[Issue, ...]


class Scanner:
    """Scans the chunks of a dataset one after another. For one thread: it keeps a buffer, and its counts add up.

    Attributes:
        counts_V: int64[V] by split: how often each id occurs in the ranges that `scan` was told to count.
        bytes: read so far.
    """

    def __init__(self, path: Path, n_vocab: int, eot_id: int) -> None:
        self.path, self.n_vocab, self.eot_id = path, n_vocab, eot_id
        self.bytes = 0
        self.counts_V: dict[str, np.ndarray] = {}
        self._block = np.empty(BLOCK_TOKENS, dtype=TOKEN_TYPE)
        self._mask = np.empty(BLOCK_TOKENS, dtype=bool)
        self._ids = np.empty(BLOCK_TOKENS, dtype=np.intp)

    def scan(self, chunk: ChunkRecord, counted: np.ndarray) -> Scan:
        """Read both files of a chunk; count the tokens of `counted`, int64[ranges, 2] of starts and ends."""
        issues = [*wrong_size(self.path, chunk.data), *wrong_size(self.path, chunk.index)]
        damaged = {issue.where for issue in issues}
        contents = None
        if chunk.index.file not in damaged:
            try:
                content = (self.path / chunk.index.file).read_bytes()
                if xxhash.xxh3_128_hexdigest(content) != chunk.index.xxh3:
                    raise DataError(CHANGED)
                contents = _parse(content)
            except (DataError, OSError) as error:
                issues.append(Issue(chunk.index.file, reason_of(error)))
            self.bytes += chunk.index.bytes
        if chunk.data.file not in damaged:
            try:
                found = self._scan_tokens(chunk, contents, counted)
            except (DataError, OSError) as error:
                found = [f"cannot be read ({reason_of(error)})"]
            issues += [Issue(chunk.data.file, what) for what in found]
        return Scan(contents, tuple(issues))

    def _scan_tokens(self, chunk: ChunkRecord, contents: Contents | None, counted: np.ndarray) -> list[str]:
        """What is wrong with the tokens; only that the checksum does not hold, where it does not."""
        digest = xxhash.xxh3_128()
        check = None if contents is None else _DocumentCheck(contents, self.eot_id)
        start = highest = 0
        for block_N in self._blocks(chunk, digest):
            highest = max(highest, int(block_N.max()))
            if check is not None:
                check.add(block_N, start, self._mask)
            if highest < self.n_vocab:
                self._count(block_N, start, counted, chunk.split)
            start += len(block_N)
            self.bytes += block_N.nbytes
        if digest.hexdigest() != chunk.data.xxh3:
            return [CHANGED]
        issues = [] if check is None else list(check.issues())
        if highest >= self.n_vocab:
            issues.append(f"token {highest} is outside the vocabulary of {self.n_vocab} ids")
        return issues

    def _blocks(self, chunk: ChunkRecord, digest: xxhash.xxh3_128) -> Iterator[np.ndarray]:
        """The tokens of a chunk, block by block, in a buffer that is used again. Feeds `digest` the file's bytes."""
        path = str(self.path / chunk.data.file)
        if not path.endswith(SUFFIXES["zstd"]):
            reader, total = RawReader(path), chunk.data.bytes // TOKEN_TYPE.itemsize
            for start in range(0, total, BLOCK_TOKENS):
                block_N = self._block[: min(BLOCK_TOKENS, total - start)]
                reader.read_into(block_N.data.cast("B"), start)
                digest.update(block_N.data)
                yield block_N
            return
        with open(path, "rb") as file:  # before a decompressor sees it, and cheaply: it is a fraction of the tokens
            while content := file.read(self._block.nbytes):
                digest.update(content)
        if digest.hexdigest() == chunk.data.xxh3:
            yield from self._decompressed(ZstdReader(path, chunk.data.xxh3))

    def _decompressed(self, reader: ZstdReader) -> Iterator[np.ndarray]:
        filled = 0
        for frame in range(reader.frames):
            tokens = reader.decompress(frame)
            if filled + len(tokens) > BLOCK_TOKENS:
                yield self._block[:filled]
                filled = 0
            self._block[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        if filled:
            yield self._block[:filled]

    def _count(self, block_N: np.ndarray, start: int, counted: np.ndarray, split: str) -> None:
        first = int(np.searchsorted(counted[:, 1], start, side="right"))
        last = int(np.searchsorted(counted[:, 0], start + len(block_N), side="left"))
        if first >= last:
            return
        if split not in self.counts_V:
            self.counts_V[split] = np.zeros(self.n_vocab, dtype=np.int64)
        bounds = np.clip(counted[first:last] - start, 0, len(block_N)).tolist()
        if len(bounds) > 1:
            block_N = np.concatenate([block_N[begin:end] for begin, end in bounds])
            bounds = [[0, len(block_N)]]
        [[begin, end]] = bounds
        ids = self._ids[: end - begin]
        np.copyto(ids, block_N[begin:end])
        # Hardly slower than marking which ids occur, and a quarter faster than np.bincount, which makes a new array.
        np.add.at(self.counts_V[split], ids, 1)


class _DocumentCheck:
    """Whether the documents of a chunk, seen block by block, are those of its index."""

    def __init__(self, contents: Contents, eot_id: int) -> None:
        self.contents, self.eot_id = contents, eot_id
        ends = contents.ends
        size = int(ends[-1]) * TOKEN_TYPE.itemsize // len(ends) if len(ends) else 0
        self._stride = max(1, -(-BYTES_PER_DIGEST // max(1, size)))
        self._ordered = len(ends) == 0 or bool(np.all(np.diff(ends, prepend=0) > 0))
        self._seen = 0
        self._misplaced = False
        self._different: list[int] = []
        self._open = xxhash.xxh3_64()  # of the document that the block before did not finish

    def add(self, block_N: np.ndarray, start: int, mask: np.ndarray) -> None:
        """The next tokens, of which the first is number `start` of the chunk. `mask`: room for N truth values."""
        self._seen = start + len(block_N)
        if not self._ordered or self._misplaced:
            return
        first, last = np.searchsorted(self.contents.ends, [start, self._seen], side="right").tolist()
        ends = self.contents.ends[first:last] - start
        places = np.flatnonzero(np.equal(block_N, self.eot_id, out=mask[: len(block_N)])) + 1
        if not np.array_equal(places, ends):
            self._misplaced = True
            return
        self._hash(block_N.data.cast("B"), first, (ends * TOKEN_TYPE.itemsize).tolist())

    def _hash(self, block: memoryview, first: int, ends: list[int]) -> None:
        """Compare digests: of the document that ends first, and of those that lie within the block every n-th."""
        digests = self.contents.digests
        if not ends:
            self._open.update(block)
            return
        self._open.update(block[: ends[0]])
        if self._open.intdigest() != int(digests[first]):
            self._different.append(first)
        inner = slice(1, len(ends), self._stride)
        begins = ends[:-1]
        hashed = [
            xxhash.xxh3_64_intdigest(block[begin:end])
            for begin, end in zip(begins[:: self._stride], ends[inner], strict=True)
        ]
        wrong = np.flatnonzero(np.array(hashed, dtype=np.uint64) != digests[first : first + len(ends)][inner])
        self._different += (first + 1 + wrong * self._stride).tolist()
        self._open = xxhash.xxh3_64(block[ends[-1] :])

    def issues(self) -> Iterator[str]:
        """What does not fit, when all of the chunk was seen."""
        ends = self.contents.ends
        if not self._ordered or (int(ends[-1]) if len(ends) else 0) != self._seen:
            yield "the ends of its documents do not rise to the number of its tokens"
        elif self._misplaced:
            yield "<|endoftext|> does not stand exactly at the end of each document"
        elif self._different:
            yield (
                f"it holds other documents than its index says (digests differ): {len(self._different):,}, the first "
                f"of them number {self._different[0]:,}"
            )


def read_contents(path: Path, record: FileRecord) -> Contents:
    """The numbers in the index of a chunk, without its texts.

    Raises:
        DataError: it is damaged.
    """
    content = read_checked(path, record)
    try:
        return _parse(content)
    except DataError as error:
        raise DataError(f"{str(path / record.file)!r} {error}; prepare the dataset again") from None


def _parse(content: bytes) -> Contents:
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(columns=list(INDEX_COLUMNS), use_threads=False)
        end, text_bytes, digest = (numbers(table, name) for name in INDEX_COLUMNS)
        return Contents(end.astype(np.int64), text_bytes.astype(np.int64), digest.astype(np.uint64))
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"is no index of documents ({reason_of(error)})") from None


def wrong_size(path: Path, record: FileRecord) -> list[Issue]:
    """Whether a file is there and as long as it has to be."""
    try:
        found = (path / record.file).stat()
    except (OSError, ValueError) as error:
        return [Issue(record.file, f"cannot be read ({reason_of(error)})")]
    if not is_regular(found):
        return [Issue(record.file, f"cannot be read ({NOT_REGULAR})")]
    size = found.st_size
    if size != record.bytes:
        return [Issue(record.file, f"holds {size:,} bytes where the manifest says {record.bytes:,}")]
    return []


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
