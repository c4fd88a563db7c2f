"""A prepared dataset on disk: versions over shared chunks of tokens, with checksums of everything.

In: a dataset directory. Out: `Store`, random access to the tokens and documents of one version.

    DIR/manifest.json                     the newest version; written last, a directory without it is not a dataset
    DIR/versions/00001/manifest.json      every version: counts, chunks, source, tokenizer, fingerprint, own sha256
    DIR/versions/00001/files.parquet      the source files: file, content (a checksum), bytes, origin
    DIR/versions/00001/quarantine.jsonl   rejected rows: file, row, reason
    DIR/versions/00002/segments.parquet   the order of documents, where a version does not use whole chunks
    DIR/chunks/...                        tokens and document indexes, see `blues.data.chunks`

A version is a list of segments for each split, runs of documents within a chunk; its tokens are those of its segments
end to end. Updating, appending and removing duplicates make a new version that shares the chunks of the one before.
Opening checks the manifest and all sizes; `Store.check` reads everything and checks sums and structure as well. The
fingerprint follows from the documents and their order alone, not from how they lie in chunks. Nothing in a dataset
depends on the time, the machine or the number of workers that wrote it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from blues import config as cfg
from blues.data import tokenizer as tok
from blues.data.chunks import (
    INDEX_SCHEMA,
    TOKEN_TYPE,
    ChunkRecord,
    FileRecord,
    file_checksum,
    load_tokens,
    open_reader,
)
from blues.data.manifest import FORMAT, MANIFEST, read_checked_json
from blues.errors import ConfigError, DataError

VERSION = 2  # of the format
VERSIONS = "versions"
QUARANTINE = "quarantine.jsonl"
SPLITS = ("train", "validation")
INDEXES_IN_MEMORY = 32
SEGMENT_TYPE = np.dtype(
    [("chunk", "<i4"), ("first_document", "<i8"), ("documents", "<i8"), ("first_token", "<i8"), ("tokens", "<i8")]
)
TABLE_COLUMNS = ("id", "source", "length", "text_bytes", "digest", "metadata")
_NAMED_VERSION = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class StoredDocument:
    """A document of a split: `tokens` is uint32[n] with the closing `<|endoftext|>`."""

    id: str
    source: str
    metadata: dict[str, Any]
    tokens: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class Issue:
    """Something wrong with a dataset: where (a file), and what, in a sentence."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Store:
    """One version of a prepared dataset, opened for reading. Made by `Store.open`; pickles as its path and version.

    `segments[split]` is an array of SEGMENT_TYPE: runs of documents of a chunk, in the order of the split.
    """

    path: Path
    manifest: dict[str, Any]
    tokenizer: tok.Tokenizer.Config
    chunks: dict[str, tuple[ChunkRecord, ...]]
    segments: dict[str, np.ndarray] = field(repr=False, compare=False)
    _starts: dict[str, np.ndarray] = field(repr=False, compare=False)  # follows from the segments

    @classmethod
    def open(cls, path: str | Path, *, check_sizes: bool = True, checksum: str | None = None) -> Store:
        """Open the newest version of a dataset, or version 2 with `DIR@2`; reads its manifest and the sizes of files.

        Args:
            check_sizes: False opens one with damaged files too, for `check` to name them all.
            checksum: of the manifest of the version that is wanted, whichever number it has.

        Raises:
            DataError: not a dataset, an edited or unreadable manifest, a missing file or one of the wrong size, a
                version that is not there.
        """
        path, number = split_version(path)
        manifest = _find_manifest(path, number, checksum)
        try:
            tokenizer = cfg.load(tok.Tokenizer.Config, manifest["tokenizer"]["config"])
            chunks = {
                split: tuple(ChunkRecord.from_tree(tree) for tree in manifest["splits"][split]["chunks"])
                for split in SPLITS
            }
            segments = _read_segments(path, manifest, chunks)
        except (KeyError, TypeError, ConfigError) as error:
            raise DataError(
                f"{str(path / MANIFEST)!r} lacks or cannot use {error}; prepare the dataset again"
            ) from None
        starts = {s: np.concatenate(([0], np.cumsum(segments[s]["tokens"], dtype=np.int64))) for s in SPLITS}
        store = cls(path, manifest, tokenizer, chunks, segments, starts)
        damage = next(store._wrong_sizes(), None) if check_sizes else None
        if damage is not None:
            raise DataError(
                f"dataset {str(path)!r} is damaged: {damage}; restore the file or prepare the dataset again"
            )
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (f"{self.path.absolute()}@{self.version}",)  # the other process may work in another folder

    @property
    def version(self) -> int:
        """Number of the version, from 1."""
        return self.manifest["version"]

    @property
    def fingerprint(self) -> str:
        """Changes with any document, their order, or the tokenizer; equal for equal content however it is stored."""
        return self.manifest["fingerprint"]

    @property
    def checksum(self) -> str:
        """sha256 of the manifest, and so of everything in this version."""
        return self.manifest["checksum"]

    def num_tokens(self, split: str) -> int:
        """Tokens of a split, each document's `<|endoftext|>` included."""
        return int(self._starts[_known(split)][-1])

    def num_documents(self, split: str) -> int:
        """Documents of a split."""
        return int(self.segments[_known(split)]["documents"].sum())

    def text_bytes(self, split: str) -> int:
        """Bytes of the documents of a split as UTF-8 text."""
        return self.manifest["splits"][_known(split)]["text_bytes"]

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a split as a new uint32[stop - start], across segments."""
        if not 0 <= start <= stop <= self._starts[_known(split)][-1]:
            raise IndexError(f"tokens {start}:{stop} of {split}, which holds {self._starts[split][-1]}")
        out = np.empty(stop - start, dtype=TOKEN_TYPE)
        if len(out):
            self._read_into(out.data.cast("B"), split, start, stop)
        return out

    def read_windows(self, split: str, starts: np.ndarray, length: int) -> np.ndarray:
        """Many stretches of `length` tokens: int64[n] -> uint32[n, length], row i is `read` from `starts[i]` on."""
        bounds, segments = self._starts[_known(split)], self.segments[split]
        starts = np.asarray(starts, dtype=np.int64)
        out = np.empty((len(starts), length), dtype=TOKEN_TYPE)
        if not out.size:
            return out
        if starts.min() < 0 or starts.max() + length > bounds[-1]:
            raise IndexError(f"windows of {length} tokens outside of {split}, which holds {bounds[-1]}")
        found = np.searchsorted(bounds, starts, side="right") - 1
        whole = (starts + length <= bounds[found + 1]).tolist()
        offsets = (segments["first_token"][found] + starts - bounds[found]).tolist()
        chunks = segments["chunk"][found].tolist()
        view, size = out.data.cast("B"), length * TOKEN_TYPE.itemsize
        for row, (inside, chunk, offset) in enumerate(zip(whole, chunks, offsets, strict=True)):
            target = view[row * size : (row + 1) * size]
            if inside:
                self._reader(split, chunk).read_into(target, offset)
            else:
                self._read_into(target, split, int(starts[row]), int(starts[row]) + length)
        return out

    def _read_into(self, out: memoryview, split: str, start: int, stop: int) -> None:
        """Tokens `[start, stop)` into `out`, segment by segment: the plain way, which `read_windows` shortens."""
        bounds, segments = self._starts[split], self.segments[split]
        position, number = start, int(np.searchsorted(bounds, start, side="right")) - 1
        while position < stop:
            end = min(stop, int(bounds[number + 1]))
            offset = int(segments["first_token"][number]) + position - int(bounds[number])
            target = out[(position - start) * TOKEN_TYPE.itemsize : (end - start) * TOKEN_TYPE.itemsize]
            self._reader(split, int(segments["chunk"][number])).read_into(target, offset)
            position, number = end, number + 1

    def _reader(self, split: str, chunk: int) -> Any:
        record = self.chunks[split][chunk].data
        try:
            return open_reader(f"{self._absolute}/{record.file}", record.xxh3)
        except OSError as error:
            raise DataError(f"cannot read {record.file!r} of dataset {str(self.path)!r}: {error.strerror}") from None

    @functools.cached_property
    def _absolute(self) -> str:
        return str(self.path.absolute())

    def chunk(self, split: str, number: int) -> np.ndarray:
        """All tokens of one chunk as it lies on disk, read-only: memory-mapped, or decompressed. uint32."""
        return load_tokens(self.path, self.chunks[_known(split)][number])

    def index(self, split: str, chunk: int) -> pa.Table:
        """The document index of a chunk as it lies on disk; see INDEX_SCHEMA."""
        record = self.chunks[_known(split)][chunk]
        return _read_index(str(self.path.absolute() / record.index.file), record.index.xxh3)

    def tables(self, split: str, columns: Sequence[str] = TABLE_COLUMNS) -> Iterator[pa.Table]:
        """The documents of a split in order, a table for each segment: id, source, length (tokens, `<|endoftext|>`
        included), text_bytes, digest (xxh3-64 of the tokens), metadata (JSON)."""
        for chunk, first, documents, start, _ in self.segments[_known(split)].tolist():
            part = self.index(split, chunk).slice(first, documents)
            if "length" in columns:
                ends = part["end"].to_numpy().astype(np.int64)
                part = part.append_column("length", pa.array(np.diff(ends, prepend=start)))
            yield part.select(list(columns))

    def document_ends(self, split: str) -> np.ndarray:
        """Where each document of a split ends, in tokens: int64[documents], rising to `num_tokens`."""
        lengths = [table["length"].to_numpy() for table in self.tables(split, ["length"])]
        return np.cumsum(np.concatenate([np.zeros(0, dtype=np.int64), *lengths]), dtype=np.int64)

    def documents(self, split: str) -> Iterator[StoredDocument]:
        """The documents of a split in order."""
        for chunk, first, documents, start, _ in self.segments[_known(split)].tolist():
            tokens, rows = self.chunk(split, chunk), self.index(split, chunk).slice(first, documents).to_pylist()
            for row in rows:
                yield _stored(row, np.array(tokens[start : row["end"]]))
                start = row["end"]

    def document(self, split: str, number: int) -> StoredDocument:
        """Document `number` of a split, from 0."""
        chunk, row = self.locate(split, number)
        index = self.index(split, chunk)
        start = index["end"][row - 1].as_py() if row else 0
        out = np.empty(index["end"][row].as_py() - start, dtype=TOKEN_TYPE)
        self._reader(split, chunk).read_into(out.data.cast("B"), start)
        return _stored(index.slice(row, 1).to_pylist()[0], out)

    def locate(self, split: str, number: int) -> tuple[int, int]:
        """(chunk, row of its index) of document `number` of a split."""
        bounds = np.concatenate(([0], np.cumsum(self.segments[_known(split)]["documents"], dtype=np.int64)))
        if not 0 <= number < bounds[-1]:
            raise IndexError(f"document {number} of {split}, which holds {bounds[-1]}")
        place = int(np.searchsorted(bounds, number, side="right")) - 1
        chunk, first, *_ = self.segments[split][place].tolist()
        return chunk, first + number - int(bounds[place])

    def quarantine(self) -> Path:
        """The file of the rejected rows."""
        return self.path / self.manifest["quarantine"]["file"]

    def check(self) -> list[Issue]:
        """Every damage there is: sizes, checksums, and whether index, tokens, segments and manifest agree."""
        issues = list(self._wrong_sizes())
        damaged = {issue.where for issue in issues}
        for record in self._files():
            if record.file not in damaged and file_checksum(self.path / record.file) != record.xxh3:
                issues.append(Issue(record.file, "its bytes do not match the checksum in the manifest"))
        damaged = {issue.where for issue in issues}
        for split in SPLITS:
            for number, chunk in enumerate(self.chunks[split]):
                if not damaged & {chunk.data.file, chunk.index.file}:
                    issues.extend(Issue(chunk.data.file, what) for what in self._disagreements(split, number))
        issues += self._wrong_copy()
        return issues or [Issue(MANIFEST, what) for what in self._wrong_totals()]

    def _wrong_copy(self) -> Iterator[Issue]:
        """Whether the version's own manifest is the one that was read (the newest has a copy at the top)."""
        name = f"{version_folder(self.version)}/{MANIFEST}"
        try:
            same = read_checked_json(self.path, name, FORMAT, VERSION)["checksum"] == self.checksum
        except DataError as error:
            yield Issue(name, str(error))
            return
        if not same:
            yield Issue(name, f"it is another manifest than the one of version {self.version}")

    def _disagreements(self, split: str, number: int) -> Iterator[str]:
        """What does not fit between a chunk's record, its index and its tokens."""
        chunk = self.chunks[split][number]
        try:
            tokens, index = self.chunk(split, number), self.index(split, number)
        except (DataError, pa.ArrowException, OSError) as error:
            yield f"it cannot be read: {' '.join(str(error).split())}"
            return
        n_vocab, eot_id = (self.manifest["tokenizer"][key] for key in ("n_vocab", "eot_id"))
        ends = index["end"].to_numpy().astype(np.int64)
        if len(ends) != chunk.documents:
            yield f"its index lists {len(ends)} documents where the manifest says {chunk.documents}"
        if int(index["text_bytes"].to_numpy().sum()) != chunk.text_bytes:
            yield "the text bytes of its index do not add up to those of the manifest"
        if (ends[-1] if len(ends) else 0) != len(tokens) or np.any(np.diff(ends, prepend=0) <= 0):
            yield "the ends of its documents do not rise to the number of its tokens"
            return
        if len(tokens) == 0:
            return
        if int(tokens.max()) >= n_vocab:
            yield f"token {int(tokens.max())} is outside the vocabulary of {n_vocab} ids"
        if not np.array_equal(np.flatnonzero(tokens == eot_id) + 1, ends):
            yield "<|endoftext|> does not stand exactly at the end of each document"

    def _wrong_totals(self) -> Iterator[str]:
        """What does not fit between the manifest and its (undamaged) chunks."""
        for split in SPLITS:
            for name, counted in (("tokens", self.num_tokens(split)), ("documents", self.num_documents(split))):
                if counted != self.manifest["splits"][split][name]:
                    yield f"{split} holds {counted:,} {name} where it says {self.manifest['splits'][split][name]:,}"
            for chunk, first, documents, start, tokens in self.segments[split].tolist():
                ends = self.index(split, chunk)["end"].to_numpy()
                begin = ends[first - 1] if first else 0
                if first + documents > len(ends) or begin != start or ends[first + documents - 1] != start + tokens:
                    yield f"a segment of {split} does not fit documents {first} to {first + documents} of chunk {chunk}"
                    return
        if content_fingerprint(self) != self.fingerprint:
            yield "the fingerprint of the content is another one than it says"

    def _files(self) -> Iterator[FileRecord]:
        for split in SPLITS:
            for chunk in self.chunks[split]:
                yield chunk.data
                yield chunk.index
        for tree in (*self.manifest["attachments"], self.manifest["quarantine"]):
            yield FileRecord(**tree)

    def _wrong_sizes(self) -> Iterator[Issue]:
        for record in self._files():
            try:
                size = (self.path / record.file).stat().st_size
            except OSError as error:
                yield Issue(record.file, f"cannot be read ({error.strerror})")
                continue
            if size != record.bytes:
                yield Issue(record.file, f"holds {size:,} bytes where the manifest says {record.bytes:,}")


def content_fingerprint(store: Store) -> str:
    """What `Store.fingerprint` has to be: a checksum of the tokenizer and of the documents of each split in order."""
    digest = xxhash.xxh3_128(store.manifest["tokenizer"]["fingerprint"].encode())
    for split in SPLITS:
        digest.update(f"\n{split} {store.num_documents(split)} {store.num_tokens(split)}\n".encode())
        for table in store.tables(split, ["digest"]):
            digest.update(np.ascontiguousarray(table["digest"].to_numpy(), dtype="<u8").data)
    return digest.hexdigest()


def whole_chunks(chunks: Sequence[ChunkRecord]) -> np.ndarray:
    """The segments that use every chunk of a split as it is, in order."""
    rows = [(n, 0, chunk.documents, 0, chunk.tokens) for n, chunk in enumerate(chunks) if chunk.documents]
    return np.array(rows, dtype=SEGMENT_TYPE)


def _read_segments(
    path: Path, manifest: Mapping[str, Any], chunks: Mapping[str, Sequence[ChunkRecord]]
) -> dict[str, np.ndarray]:
    """The segments of each split, as the version's file of them says or else whole chunks.

    Raises:
        DataError: the file is missing or damaged. It is small and everything depends on it, so it is always checked.
    """
    if manifest["segments"] is None:
        return {split: whole_chunks(chunks[split]) for split in SPLITS}
    record = FileRecord(**manifest["segments"])
    try:
        content = (path / record.file).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(path / record.file)!r}: {error.strerror}; restore it") from None
    if xxhash.xxh3_128_hexdigest(content) != record.xxh3:
        raise DataError(f"{str(path / record.file)!r} does not match its checksum in the manifest; restore it")
    table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    segments = {}
    for split in SPLITS:
        own = table.filter(pc.equal(table["split"], split))
        segments[split] = np.empty(len(own), dtype=SEGMENT_TYPE)
        for name in SEGMENT_TYPE.names or ():
            segments[split][name] = own[name].to_numpy()
    return segments


@functools.lru_cache(maxsize=INDEXES_IN_MEMORY)
def _read_index(path: str, checksum: str) -> pa.Table:
    table = pq.ParquetFile(path).read(use_threads=False)  # a third of the time that `pq.read_table` takes
    if not table.schema.equals(INDEX_SCHEMA):
        raise DataError(f"{path!r} has other columns than an index of documents; restore it or prepare again")
    return table


def _stored(row: Mapping[str, Any], tokens: np.ndarray) -> StoredDocument:
    return StoredDocument(row["id"], row["source"], json.loads(row["metadata"]), tokens, row["text_bytes"])


def split_version(path: str | Path) -> tuple[Path, int | None]:
    """`DIR@2` as the directory and the number of the version; no number where there is none (or DIR@2 exists)."""
    named = _NAMED_VERSION.fullmatch(str(path))
    if named is None or Path(path).exists():
        return Path(path), None
    return Path(named[1]), int(named[2])


def version_folder(number: int) -> str:
    """Where the files of a version lie, relative to the dataset."""
    return f"{VERSIONS}/{number:05d}"


def version_numbers(path: Path) -> list[int]:
    """The versions of a dataset, oldest first."""
    found = (path / VERSIONS).glob(f"[0-9]*/{MANIFEST}")
    return sorted(int(manifest.parent.name) for manifest in found if manifest.parent.name.isdecimal())


def has_version(path: Path, checksum: str) -> bool:
    """Whether a dataset has a version whose manifest has this checksum.

    Raises:
        DataError: it is no dataset, or its manifest is damaged.
    """
    if read_checked_json(path, MANIFEST, FORMAT, VERSION)["checksum"] == checksum:
        return True
    return any(
        read_checked_json(path, f"{version_folder(number)}/{MANIFEST}", FORMAT, VERSION)["checksum"] == checksum
        for number in version_numbers(path)
    )


def _find_manifest(path: Path, number: int | None, checksum: str | None) -> dict[str, Any]:
    """The manifest of the newest version, or of the one that is asked for."""
    manifest = read_checked_json(path, MANIFEST, FORMAT, VERSION)
    if checksum is not None and manifest["checksum"] != checksum:
        for candidate in reversed(version_numbers(path)):
            found = read_checked_json(path, f"{version_folder(candidate)}/{MANIFEST}", FORMAT, VERSION)
            if found["checksum"] == checksum:
                return found
        raise DataError(f"dataset {str(path)!r} has no version with the checksum {checksum[:12]}...")
    if number is None or number == manifest["version"]:
        return manifest
    there = version_numbers(path)
    if number not in there:
        raise DataError(f"dataset {str(path)!r} has no version {number}; it has {', '.join(map(str, there))}")
    return read_checked_json(path, f"{version_folder(number)}/{MANIFEST}", FORMAT, VERSION)


def _known(split: str) -> str:
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}.{cfg.nearest(split, SPLITS)}")
    return split
