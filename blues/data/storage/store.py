"""A prepared dataset on disk: versions over shared chunks of tokens, with checksums of everything.

In: a dataset directory. Out: `Store`, random access to the tokens and documents of one version.

    DIR/manifest.json                     the newest version; written last, a directory without it is not a dataset
    DIR/versions/00001/manifest.json      every version: counts, chunks, source, tokenizer, fingerprint, own sha256
    DIR/versions/00001/files.parquet      the source files: file, content (a checksum), bytes, origin
    DIR/versions/00001/quarantine.jsonl   rejected rows: file, row, reason
    DIR/versions/00002/segments.parquet   the order of documents, where a version does not use whole chunks
    DIR/chunks/...                        tokens and document indexes, see `blues.data.storage.chunks`

A version is a list of segments for each split, runs of documents within a chunk; its tokens are those of its segments
end to end. Updating, appending and removing duplicates make a new version that shares the chunks of the one before.
Opening checks the manifest and all sizes, reading an index checks that; `Store.check` reads and checks everything. The
fingerprint follows from the documents and their order alone, not from how they lie in chunks. Nothing in a dataset
depends on the time, the machine or the number of workers that wrote it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from blues import config as cfg
from blues.data import tokenizer as tok
from blues.data.storage.arrays import flags, positions, strings, whole_numbers
from blues.data.storage.chunks import (
    INDEX_SCHEMA,
    TOKEN_TYPE,
    BoundedCache,
    ChunkRecord,
    FileRecord,
    load_tokens,
    numbers,
    open_reader,
    read_checked,
)
from blues.data.storage.manifest import (
    FORMAT,
    MANIFEST,
    is_count,
    is_file,
    is_text,
    is_tree,
    parse_json,
    read_checked_json,
    require,
)
from blues.errors import ConfigError, DataError

VERSION = 2  # of the format
VERSIONS = "versions"
QUARANTINE = "quarantine.jsonl"
SPLITS = ("train", "validation")
INDEX_BYTES = 128 << 20
"""Document indexes that stay in memory, in all."""
SEGMENT_TYPE = np.dtype(
    [("chunk", "<i4"), ("first_document", "<i8"), ("documents", "<i8"), ("first_token", "<i8"), ("tokens", "<i8")]
)
_FILE = {"file": is_file, "bytes": is_count, "xxh3": is_text}
_COUNTS = {"documents": is_count, "tokens": is_count, "text_bytes": is_count}
_CHUNK = _COUNTS | {"split": is_text, "data": _FILE, "index": _FILE}
MANIFEST_SHAPE = {
    "version": is_count,
    "parent": (is_text,),
    "operation": {"kind": is_text},
    "code": is_tree,
    "tokenizer": {"config": is_tree, "fingerprint": is_text, "n_vocab": is_count, "eot_id": is_count},
    "settings": is_tree,
    "sources": [is_tree],
    "rows": is_count,
    "documents": is_count,
    "rejected": {...: is_count},
    "quarantine": _FILE,
    "attachments": [_FILE],
    "segments": (_FILE,),
    "splits": dict.fromkeys(SPLITS, _COUNTS | {"chunks": [_CHUNK]}),
    "fingerprint": is_text,
}
"""What a manifest holds, for `manifest.require`."""
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
    """Something wrong with a dataset: where (a file), and what, in a sentence. A warning is for a person to judge."""

    where: str
    what: str
    kind: Literal["error", "warning"] = "error"

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
        path, number = split_version(path) if checksum is None else (Path(path), None)
        store = cls.of(path, _find_manifest(path, number, checksum))
        damage = next(store.wrong_sizes(), None) if check_sizes else None
        if damage is not None:
            raise DataError(
                f"dataset {str(path)!r} is damaged: {damage}; restore the file or prepare the dataset again"
            )
        return store

    @classmethod
    def of(cls, path: Path, manifest: dict[str, Any]) -> Store:
        """The version that a manifest of the dataset at `path` describes; reads its segments.

        Raises:
            DataError: it lacks something, or the file of its segments is damaged.
        """
        try:
            require(manifest, MANIFEST_SHAPE)
            tokenizer = cfg.load(tok.Tokenizer.Config, manifest["tokenizer"]["config"])
            chunks = {
                split: tuple(ChunkRecord.from_tree(tree) for tree in manifest["splits"][split]["chunks"])
                for split in SPLITS
            }
            if any(chunk.split != split for split in SPLITS for chunk in chunks[split]):
                raise ValueError("the split of a chunk")
        except (ValueError, TypeError, ConfigError) as error:
            raise DataError(
                f"{str(path / MANIFEST)!r} lacks or cannot use {error}; prepare the dataset again"
            ) from None
        segments = _read_segments(path, manifest, chunks)
        starts = {s: np.concatenate(([0], np.cumsum(segments[s]["tokens"], dtype=np.int64))) for s in SPLITS}
        return cls(path, manifest, tokenizer, chunks, segments, starts)

    def __reduce__(self) -> tuple[Any, ...]:
        where = self.path.absolute()  # the other process may work in another folder
        return functools.partial(Store.open, where, checksum=self.checksum), ()

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
        if len(starts) > 1:  # a disk reads many places at a time sooner than one after the other
            for inside, chunk, offset in zip(whole, chunks, offsets, strict=True):
                if inside:
                    self._reader(split, chunk).announce(offset, length)
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
        record = self.chunks[_known(split)][chunk].index
        return indexes.get((self._absolute, record), lambda: _read_index(self.path, record))

    def read_index(self, split: str, chunk: int, columns: Sequence[str]) -> pa.Table:
        """Columns of the document index of a chunk, not kept in memory: for who goes through all chunks once."""
        return _read_index(self.path, self.chunks[_known(split)][chunk].index, columns)

    def tables(self, split: str, columns: Sequence[str] = TABLE_COLUMNS) -> Iterator[pa.Table]:
        """The documents of a split in order, a table for each segment: id, source, length (tokens, `<|endoftext|>`
        included), text_bytes, digest (xxh3-64 of the tokens), metadata (JSON)."""
        for chunk, first, documents, start, _ in self.segments[_known(split)].tolist():
            part = self.index(split, chunk).slice(first, documents)
            if "length" in columns:
                lengths = np.diff(numbers(part, "end").astype(np.int64), prepend=start)
                part = part.append_column("length", whole_numbers(lengths, pa.int64()))
            yield part.select(list(columns))

    def document_ends(self, split: str) -> np.ndarray:
        """Where each document of a split ends, in tokens: int64[documents], rising to `num_tokens`."""
        lengths = [numbers(table, "length") for table in self.tables(split, ["length"])]
        return np.cumsum(np.concatenate([np.zeros(0, dtype=np.int64), *lengths]), dtype=np.int64)

    def documents(self, split: str) -> Iterator[StoredDocument]:
        """The documents of a split in order."""
        for chunk, first, documents, begin, count in self.segments[_known(split)].tolist():
            tokens, start = np.empty(count, dtype=TOKEN_TYPE), begin
            if count:
                self._reader(split, chunk).read_into(tokens.data.cast("B"), begin)
            for row in self.index(split, chunk).slice(first, documents).to_pylist():
                yield _stored(row, tokens[start - begin : row["end"] - begin].copy())
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

    def read_quarantine(self) -> bytes:
        """The rejected rows, one line of JSON for each.

        Raises:
            DataError: the file is missing or damaged.
        """
        return read_checked(self.path, FileRecord(**self.manifest["quarantine"]))

    def check(self) -> list[Issue]:
        """Every damage there is: sizes, checksums, and whether tokens, indexes, segments and manifests agree, of all
        versions. `blues.data.reports.verify` tells more."""
        from blues.data.storage.checking import check_dataset  # it reads stores, so it comes after this module

        return [issue for issue in check_dataset(self.path)[1].issues if issue.kind == "error"]

    def files(self) -> Iterator[FileRecord]:
        """Every file of this version but its manifest."""
        for split in SPLITS:
            for chunk in self.chunks[split]:
                yield chunk.data
                yield chunk.index
        segments = self.manifest["segments"]
        for tree in (*self.manifest["attachments"], self.manifest["quarantine"], *([segments] if segments else ())):
            yield FileRecord(**tree)

    def wrong_sizes(self) -> Iterator[Issue]:
        """The files that are not there, or are longer or shorter than they were."""
        for record in self.files():
            try:
                size = (self.path / record.file).stat().st_size
            except OSError as error:
                yield Issue(record.file, f"cannot be read ({error.strerror})")
                continue
            if size != record.bytes:
                yield Issue(record.file, f"holds {size:,} bytes where the manifest says {record.bytes:,}")


def content_fingerprint(store: Store, digests: Mapping[str, np.ndarray] | None = None) -> str:
    """What `Store.fingerprint` has to be: a checksum of the tokenizer and of the documents of each split in order.
    `digests`: those of the documents of each split, where they are known."""
    digest = xxhash.xxh3_128(store.manifest["tokenizer"]["fingerprint"].encode())
    for split in SPLITS:
        digest.update(f"\n{split} {store.num_documents(split)} {store.num_tokens(split)}\n".encode())
        read = (numbers(table, "digest") for table in store.tables(split, ["digest"]))
        for values in read if digests is None else [digests[split]]:
            digest.update(np.ascontiguousarray(values, dtype="<u8").data)
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
    content = read_checked(path, record)
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        segments = {}
        own_S = positions(table["split"], strings(SPLITS))
        for number, split in enumerate(SPLITS):
            own = table.filter(flags(own_S == number))
            segments[split] = np.empty(len(own), dtype=SEGMENT_TYPE)
            for name in SEGMENT_TYPE.names or ():
                segments[split][name] = numbers(own, name)
            _check_segments(segments[split], chunks[split])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"{str(path / record.file)!r} cannot be used ({what}); prepare the dataset again") from None
    return segments


def _check_segments(segments: np.ndarray, chunks: Sequence[ChunkRecord]) -> None:
    """Raise a ValueError if a segment lies outside of its chunk, so that no reader has to look again."""
    least = {"chunk": 0, "first_document": 0, "documents": 1, "first_token": 0, "tokens": 1}
    if any(np.any(segments[name] < value) for name, value in least.items()):
        raise ValueError("a segment is empty or begins before its chunk")
    if np.any(segments["chunk"] >= len(chunks)):
        raise ValueError("a segment is of a chunk that is not there")
    held = np.array([(chunk.documents, chunk.tokens) for chunk in chunks], dtype=np.int64).reshape(-1, 2)
    for column, (first, count) in enumerate((("first_document", "documents"), ("first_token", "tokens"))):
        if np.any(segments[count] > held[segments["chunk"], column] - segments[first]):
            raise ValueError("a segment ends after its chunk")


indexes = BoundedCache(INDEX_BYTES)


def _read_index(path: Path, record: FileRecord, columns: Sequence[str] = INDEX_SCHEMA.names) -> pa.Table:
    content = read_checked(path, record)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        schema, table = file.schema_arrow, file.read(columns, use_threads=False)  # a third of the time of `read_table`
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"{str(path / record.file)!r} cannot be used ({what}); prepare the dataset again") from None
    if not schema.equals(INDEX_SCHEMA):
        raise DataError(f"{str(path / record.file)!r} has other columns than an index; prepare the dataset again")
    return table


def _stored(row: Mapping[str, Any], tokens: np.ndarray) -> StoredDocument:
    try:
        metadata = parse_json(row["metadata"])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the metadata of document {row['id']!r} is no JSON ({error}); prepare the dataset again"
        ) from None
    return StoredDocument(row["id"], row["source"], metadata, tokens, row["text_bytes"])


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
    if number is None or number == manifest.get("version"):
        return manifest
    there = version_numbers(path)
    if number not in there:
        raise DataError(f"dataset {str(path)!r} has no version {number}; it has {', '.join(map(str, there))}")
    return read_checked_json(path, f"{version_folder(number)}/{MANIFEST}", FORMAT, VERSION)


def _known(split: str) -> str:
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}.{cfg.nearest(split, SPLITS)}")
    return split
