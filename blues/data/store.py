"""A prepared dataset on disk: chunks of tokens, an index of documents, and a manifest with checksums.

In: documents as token arrays, one chunk at a time. Out: `Store`, random access to the tokens of a split.

    DIR/manifest.json                         written last; a directory without it is not a dataset
    DIR/quarantine.jsonl                      rejected rows: file, row, reason
    DIR/chunks/train-00012.tokens             little-endian uint32, `<|endoftext|>` after each document
    DIR/chunks/train-00012.documents.parquet  id, source, end (in tokens, exclusive), text_bytes, metadata (JSON)

The tokens of a split are those of its chunks end to end, in the order of the manifest. Every file has its size and
xxh3-128 in the manifest, and the manifest carries its own checksum. Opening checks the manifest and all sizes;
`Store.check` reads everything and checks the sums and the structure as well. Nothing in a dataset depends on the time,
the machine or the number of workers that wrote it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from blues import __version__
from blues import config as cfg
from blues.data import tokenizer as tok
from blues.errors import ConfigError, DataError

FORMAT = "blues-store"
MIXTURE_FORMAT = "blues-mixture"
VERSION = 1
MANIFEST = "manifest.json"
MIXTURE = "mixture.json"
QUARANTINE = "quarantine.jsonl"
CHUNKS = "chunks"
SPLITS = ("train", "validation")
TOKEN_TYPE = np.dtype("<u4")
OPEN_CHUNKS = 256  # memory maps kept open at a time
READ_BYTES = 1 << 24
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("end", pa.uint64()),
        ("text_bytes", pa.uint64()),
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


class ChunkWriter:
    """Writes one chunk of one split: documents in order, then `close()`, which makes both files appear at once."""

    def __init__(self, directory: Path, split: str, number: int) -> None:
        self.directory, self.split = directory, split
        self.name = f"{CHUNKS}/{split}-{number:05d}"
        self._temporary = self._path(f"{self.name}.tokens", temporary=True)
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115  (closed by close or abort)
        self._hash = xxhash.xxh3_128()
        self._tokens = self._text_bytes = 0
        self._index: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}

    def add(self, tokens: np.ndarray, *, id: str, source: str, text_bytes: int, metadata: Mapping[str, Any]) -> None:
        """Append a document: uint32 tokens that end in `<|endoftext|>`."""
        content = np.ascontiguousarray(tokens, dtype=TOKEN_TYPE).data
        self._file.write(content)
        self._hash.update(content)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        values = (id, source, self._tokens, text_bytes, json.dumps(dict(metadata), sort_keys=True))
        for name, value in zip(INDEX_SCHEMA.names, values, strict=True):
            self._index[name].append(value)

    def close(self) -> ChunkRecord:
        """Write the index, make both files durable and give them their names."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index_name, data_name = f"{self.name}.documents.parquet", f"{self.name}.tokens"
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(self._index, schema=INDEX_SCHEMA), buffer, compression="zstd")
        index = buffer.getvalue().to_pybytes()
        os.replace(self._temporary, self._path(data_name))
        cfg.write_atomic(self._path(index_name), index)  # its fsync of the folder makes both names durable
        return ChunkRecord(
            split=self.split,
            tokens=self._tokens,
            documents=len(self._index["end"]),
            text_bytes=self._text_bytes,
            data=FileRecord(data_name, self._tokens * TOKEN_TYPE.itemsize, self._hash.hexdigest()),
            index=FileRecord(index_name, len(index), xxhash.xxh3_128_hexdigest(index)),
        )

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _path(self, name: str, temporary: bool = False) -> Path:
        path = self.directory / name
        return path.with_name(f".{path.name}.{os.getpid()}.tmp") if temporary else path


@dataclass(frozen=True)
class Store:
    """A prepared dataset, opened for reading. Made by `Store.open`; pickles as its path."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: tok.Tokenizer.Config
    chunks: dict[str, tuple[ChunkRecord, ...]]
    _starts: dict[str, np.ndarray] = field(repr=False, compare=False)  # follows from the chunks

    @classmethod
    def open(cls, path: str | Path, *, check_sizes: bool = True) -> Store:
        """Open a dataset directory; reads the manifest and the sizes of all files, no tokens.

        `check_sizes=False` opens one with damaged files too, for `check` to name them all.

        Raises:
            DataError: not a dataset, an edited or unreadable manifest, a missing file or one of the wrong size.
        """
        path = Path(path)
        manifest = read_checked_json(path, MANIFEST, FORMAT, VERSION)
        try:
            tokenizer = cfg.load(tok.Tokenizer.Config, manifest["tokenizer"]["config"])
            chunks = {
                split: tuple(ChunkRecord.from_tree(tree) for tree in manifest["splits"][split]["chunks"])
                for split in SPLITS
            }
        except (KeyError, TypeError, ConfigError) as error:
            raise DataError(
                f"{str(path / MANIFEST)!r} lacks or cannot use {error}; prepare the dataset again"
            ) from None
        starts = {s: np.cumsum([0, *(c.tokens for c in chunks[s])], dtype=np.int64) for s in SPLITS}
        store = cls(path, manifest, tokenizer, chunks, starts)
        damage = next(store._wrong_sizes(), None) if check_sizes else None
        if damage is not None:
            raise DataError(
                f"dataset {str(path)!r} is damaged: {damage}; restore the file or prepare the dataset again"
            )
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path.absolute(),)  # the receiving process may work in another folder

    @property
    def fingerprint(self) -> str:
        """Changes with any token of any split, or the tokenizer; equal for equal content wherever it lies."""
        return self.manifest["fingerprint"]

    @property
    def checksum(self) -> str:
        """Checksum of the manifest, and so of everything in the dataset."""
        return self.manifest["checksum"]

    def num_tokens(self, split: str) -> int:
        """Tokens of a split, each document's `<|endoftext|>` included."""
        return int(self._starts[_known(split)][-1])

    def num_documents(self, split: str) -> int:
        """Documents of a split."""
        return sum(chunk.documents for chunk in self.chunks[_known(split)])

    def text_bytes(self, split: str) -> int:
        """Bytes of the documents of a split as UTF-8 text."""
        return sum(chunk.text_bytes for chunk in self.chunks[_known(split)])

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a split as a new uint32[stop - start], across chunk borders."""
        starts = self._starts[_known(split)]
        if not 0 <= start <= stop <= starts[-1]:
            raise IndexError(f"tokens {start}:{stop} of {split}, which holds {starts[-1]}")
        out = np.empty(stop - start, dtype=np.uint32)
        position, chunk = start, int(np.searchsorted(starts, start, side="right")) - 1
        while position < stop:
            end = min(stop, int(starts[chunk + 1]))
            tokens = self._map(split, chunk)
            out[position - start : end - start] = tokens[position - starts[chunk] : end - starts[chunk]]
            position, chunk = end, chunk + 1
        return out

    def chunk(self, split: str, number: int) -> np.ndarray:
        """All tokens of one chunk, memory-mapped and read-only: uint32."""
        return self._map(_known(split), number)

    def documents(self, split: str, chunk: int | None = None) -> Iterator[StoredDocument]:
        """The documents of a split, or of one of its chunks, in order."""
        numbers = range(len(self.chunks[_known(split)])) if chunk is None else [chunk]
        for number in numbers:
            tokens, index = self._map(split, number), self.index(split, number).to_pydict()
            start = 0
            for id, source, end, text_bytes, metadata in zip(*index.values(), strict=True):
                yield StoredDocument(id, source, json.loads(metadata), np.array(tokens[start:end]), text_bytes)
                start = end

    def index(self, split: str, chunk: int) -> pa.Table:
        """The document index of a chunk; see INDEX_SCHEMA."""
        record = self.chunks[split][chunk]
        return pq.read_table(self.path / record.index.file, schema=INDEX_SCHEMA)

    def check(self) -> list[Issue]:
        """Every damage there is: sizes, checksums, and whether index, tokens and manifest agree."""
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
        return issues

    def _disagreements(self, split: str, number: int) -> Iterator[str]:
        """What does not fit between a chunk's record, its index and its tokens."""
        chunk, tokens, index = self.chunks[split][number], self._map(split, number), self.index(split, number)
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

    def _map(self, split: str, chunk: int) -> np.ndarray:
        record = self.chunks[split][chunk]
        if record.tokens == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=np.uint32)
        return _memory_map(str(self.path.absolute() / record.data.file), self.fingerprint)

    def _files(self) -> Iterator[FileRecord]:
        for split in SPLITS:
            for chunk in self.chunks[split]:
                yield chunk.data
                yield chunk.index
        yield FileRecord(**self.manifest["quarantine"])

    def _wrong_sizes(self) -> Iterator[Issue]:
        for record in self._files():
            try:
                size = (self.path / record.file).stat().st_size
            except OSError as error:
                yield Issue(record.file, f"cannot be read ({error.strerror})")
                continue
            if size != record.bytes:
                yield Issue(record.file, f"holds {size:,} bytes where the manifest says {record.bytes:,}")


def write_manifest(
    directory: Path,
    *,
    tokenizer: tok.Tokenizer.Config,
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
    chunks: Iterable[ChunkRecord],
    rejected: Mapping[str, int],
    quarantine: FileRecord,
) -> dict[str, Any]:
    """Write manifest.json, the last act of preparing. `rejected` counts rows by reason. Returns the manifest."""
    ordered = sorted(chunks, key=lambda chunk: chunk.data.file)
    splits = {}
    for split in SPLITS:
        own = [chunk for chunk in ordered if chunk.split == split]
        splits[split] = {
            "documents": sum(chunk.documents for chunk in own),
            "tokens": sum(chunk.tokens for chunk in own),
            "text_bytes": sum(chunk.text_bytes for chunk in own),
            "chunks": [asdict(chunk) for chunk in own],
        }
    documents = sum(chunk.documents for chunk in ordered)
    built = tokenizer.build()
    identity = json.dumps([built.fingerprint, [[c.split, c.tokens, c.data.xxh3] for c in ordered]])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "blues": __version__,
        "tokenizer": {
            "config": cfg.dump(tokenizer),
            "fingerprint": built.fingerprint,
            "n_vocab": built.n_vocab,
            "eot_id": built.eot_id,
        },
        "settings": dict(settings),
        "source": dict(source),
        "rows": documents + sum(rejected.values()),
        "documents": documents,
        "rejected": dict(sorted(rejected.items())),
        "quarantine": asdict(quarantine),
        "splits": splits,
        "fingerprint": xxhash.xxh3_128_hexdigest(identity.encode()),
    }
    return write_checked_json(directory / MANIFEST, manifest)


def write_checked_json(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Write `tree` with its checksum under the key `checksum`, atomically; returns it with the checksum."""
    signed = {**tree, "checksum": _tree_checksum(tree)}
    cfg.write_atomic(path, encode_json(signed, indent=1))
    return signed


def read_checked_json(directory: Path, name: str, kind: str, version: int) -> dict[str, Any]:
    """Read what `write_checked_json` wrote, and check format, version and checksum.

    Raises:
        DataError: with the reason and the remedy.
    """
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(_why_not_a_dataset(directory, name, error)) from None
    try:
        tree = json.loads(content)
        if not isinstance(tree, dict):
            raise ValueError("not a mapping")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{str(path)!r} is damaged ({error}); restore it or make the dataset again") from None
    if tree.get("format") != kind or tree.get("version") != version:
        raise DataError(
            f"{str(path)!r} is of format {tree.get('format')!r} version {tree.get('version')!r}, and this Blues reads "
            f"{kind!r} version {version}; make the dataset again with this version"
        )
    checksum = tree.pop("checksum", None)
    if checksum != _tree_checksum(tree):
        raise DataError(f"{str(path)!r} was changed after it was written; restore it or make the dataset again")
    return {**tree, "checksum": checksum}


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8 JSON that keeps names readable; a file name that is not UTF-8 turns into escapes that load reads back."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def is_dataset(directory: Path) -> bool:
    """Whether a folder is a prepared or merged dataset, going by the first words of its manifest."""
    for name, words in ((MANIFEST, FORMAT), (MIXTURE, MIXTURE_FORMAT)):
        try:
            with open(directory / name, "rb") as file:
                if f'"format": "{words}"'.encode() in file.read(64):
                    return True
        except OSError:
            continue
    return False


def file_checksum(path: Path) -> str:
    """xxh3-128 of a file, as hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _known(split: str) -> str:
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}.{cfg.nearest(split, SPLITS)}")
    return split


def _tree_checksum(tree: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def _why_not_a_dataset(directory: Path, name: str, error: OSError) -> str:
    where = repr(str(directory))
    if not directory.exists():
        partial = partial_directory(directory)
        if partial.exists():
            return f"dataset {where} is not finished; run the same `blues prepare` command again to finish it"
        return (
            f"dataset {where} does not exist; make it with `blues prepare --dataset FILE --data-cache-dir {directory}`"
        )
    if not isinstance(error, FileNotFoundError) and not isinstance(error, NotADirectoryError):
        return f"cannot read {str(directory / name)!r}: {error.strerror}"
    if name == MANIFEST and (directory / MIXTURE).exists():
        return f"{where} is a merged dataset, and a single prepared one is needed here; name one of its sources"
    return f"{where} is not a Blues dataset (it has no {name}); make one with `blues prepare` or `blues merge`"


def partial_directory(directory: Path) -> Path:
    """Where a dataset grows until it is whole and gets its name."""
    return directory.absolute().with_name(f".{directory.absolute().name}.partial")


@functools.lru_cache(maxsize=OPEN_CHUNKS)
def _memory_map(path: str, fingerprint: str) -> np.ndarray:
    """The tokens of a chunk, read-only; the fingerprint keeps a dataset made again at the same path apart."""
    return np.memmap(path, dtype=TOKEN_TYPE, mode="r").view(np.ndarray)
