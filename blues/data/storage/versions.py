"""New versions of a dataset: what is written, in which order, so that a reader sees the old one or the new one whole.

In: the chunks and segments of the version, and where they come from. Out: `versions/<number>/`, and then
`manifest.json` replaced in one step. Chunks that the version before brought are shared, never written again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout

from blues import __version__
from blues import config as cfg
from blues.data.storage import arrays
from blues.data.storage import store as st
from blues.data.storage.arrays import strings, whole_numbers
from blues.data.storage.chunks import ChunkRecord, FileRecord, numbers, read_checked
from blues.data.storage.manifest import FORMAT, MANIFEST, partial_directory, write_checked_json
from blues.data.storage.store import SEGMENT_TYPE, SPLITS, Store, content_fingerprint, version_folder
from blues.data.tokenizer import Tokenizer
from blues.errors import DataError

FILES = "files.parquet"
SEGMENTS = "segments.parquet"
# A source file: its name, a checksum of what it held, its size, how it was read, and which of the sources it is of.
FILES_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("content", pa.string()),
        ("bytes", pa.uint64()),
        ("reading", pa.string()),
        ("origin", pa.uint32()),
    ]
)
PLACE_TYPE = np.dtype(
    [
        *(("chunk", "<i4"), ("document", "<i8"), ("first_token", "<i8"), ("tokens", "<i8")),
        *(("text_bytes", "<u8"), ("digest", "<u8")),
    ]
)
"""Where a document lies, and what is known of it without reading it."""


@dataclass(frozen=True)
class Draft:
    """A version that is to be written.

    operation: what made it, such as `{"kind": "prepare"}`. settings: of preparing. sources: one description for each
    source that was prepared or appended. files: of FILES_SCHEMA. rejected: rows by reason; quarantine: their lines.
    places: of the documents in order (PLACE_TYPE); None for all chunks as they are. parent: checksum of the version it
    was made from. code: the version of Blues. attachments: further files of this version by name.
    """

    tokenizer: Tokenizer.Config
    operation: Mapping[str, Any]
    chunks: Mapping[str, Sequence[ChunkRecord]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[Mapping[str, Any]] = ()
    files: pa.Table = field(default_factory=FILES_SCHEMA.empty_table)
    rejected: Mapping[str, int] = field(default_factory=dict)
    quarantine: bytes = b""
    places: Mapping[str, np.ndarray] | None = None
    parent: str | None = None
    code: Mapping[str, Any] = field(default_factory=lambda: {"blues": __version__})
    attachments: Mapping[str, bytes] = field(default_factory=dict)


def write_version(directory: Path, number: int, draft: Draft) -> Store:
    """Write version `number` of the dataset at `directory`, whose chunks lie there already, and make it the newest.

    Only one process may do so at a time, see `exclusive`.
    """
    folder = directory / version_folder(number)
    for stale in (directory / st.VERSIONS).glob(".*.tmp"):  # of processes that were killed here
        shutil.rmtree(stale, ignore_errors=True)
    growing = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    growing.mkdir(parents=True)
    try:
        manifest = _manifest(growing, number, draft)
        signed = write_checked_json(growing / MANIFEST, manifest)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not become a version
        growing.rename(folder)
        cfg.fsync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise
    del signed["checksum"]
    write_checked_json(directory / MANIFEST, signed)
    return Store.open(directory)


def _manifest(growing: Path, number: int, draft: Draft) -> dict[str, Any]:
    """Write all files of the version but its manifest, which is returned."""
    directory, where = growing.parent.parent, version_folder(number)

    def write(name: str, content: bytes) -> dict[str, Any]:
        cfg.write_atomic(growing / name, content)
        return asdict(FileRecord(f"{where}/{name}", len(content), xxhash.xxh3_128_hexdigest(content)))

    tokenizer = draft.tokenizer.build()
    chunks = {split: tuple(draft.chunks.get(split, ())) for split in SPLITS}
    whole = {split: st.whole_chunks(chunks[split]) for split in SPLITS}
    segments = whole if draft.places is None else {split: segments_of(draft.places[split]) for split in SPLITS}
    plain = all(np.array_equal(segments[split], whole[split]) for split in SPLITS)
    starts = {s: np.concatenate(([0], np.cumsum(segments[s]["tokens"], dtype=np.int64))) for s in SPLITS}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": st.VERSION,
        "version": number,
        "parent": draft.parent,
        "operation": dict(draft.operation),
        "code": dict(draft.code),
        "tokenizer": {
            "config": cfg.dump(draft.tokenizer),
            "fingerprint": tokenizer.fingerprint,
            "n_vocab": tokenizer.n_vocab,
            "eot_id": tokenizer.eot_id,
        },
        "settings": dict(draft.settings),
        "sources": [dict(source) for source in draft.sources],
    }
    view = Store(directory, manifest, draft.tokenizer, chunks, segments, starts)
    digests = None if draft.places is None else {split: draft.places[split]["digest"] for split in SPLITS}
    splits = {split: _totals(view, split, draft.places) for split in SPLITS}
    documents = sum(split["documents"] for split in splits.values())
    return manifest | {
        "rows": documents + sum(draft.rejected.values()),
        "documents": documents,
        "rejected": dict(sorted(draft.rejected.items())),
        "quarantine": write(st.QUARANTINE, draft.quarantine),
        "attachments": [
            write(FILES, _parquet(draft.files)),
            *(write(name, content) for name, content in sorted(draft.attachments.items())),
        ],
        "segments": None if plain else write(SEGMENTS, _parquet(_segment_table(segments))),
        "splits": splits,
        "fingerprint": content_fingerprint(view, digests),
    }


def _totals(view: Store, split: str, places: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    if places is None:
        text_bytes = sum(chunk.text_bytes for chunk in view.chunks[split])
    else:
        text_bytes = int(places[split]["text_bytes"].sum())
    return {
        "documents": view.num_documents(split),
        "tokens": view.num_tokens(split),
        "text_bytes": text_bytes,
        "chunks": [asdict(chunk) for chunk in view.chunks[split]],
    }


def _segment_table(segments: Mapping[str, np.ndarray]) -> pa.Table:
    own = np.repeat(np.arange(len(SPLITS)), [len(segments[split]) for split in SPLITS])
    columns = {"split": strings(SPLITS).take(whole_numbers(own, pa.int64()))}
    for name in SEGMENT_TYPE.names or ():
        values = np.concatenate([segments[split][name] for split in SPLITS])
        columns[name] = whole_numbers(values, pa.from_numpy_dtype(values.dtype))
    return pa.table(columns)


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue().to_pybytes()


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Be the only process that writes at a dataset inside the `with` block. The lock is the kernel's: it dies with us.

    Raises:
        DataError: another process does, or the folder cannot be written.
    """
    partial = partial_directory(directory)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=partial.parent):  # a lock that cannot be made looks like one that is held
            pass
    except OSError as error:
        raise DataError(
            f"cannot write into {str(partial.parent)!r} ({error.strerror}); choose another place for the dataset"
        ) from None
    lock = FileLock(partial.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(
            f"another process is writing at {str(directory)!r}; wait for it, or choose another name"
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def unpublished(directory: Path, tokenizer: Tokenizer.Config, split: str, chunks: Sequence[ChunkRecord]) -> Store:
    """Chunks of one split that belong to no version yet, as a store whose documents can be listed."""
    own = {name: tuple(chunks) if name == split else () for name in SPLITS}
    segments = {name: st.whole_chunks(own[name]) for name in SPLITS}
    starts = {name: np.concatenate(([0], np.cumsum(segments[name]["tokens"], dtype=np.int64))) for name in SPLITS}
    return Store(directory, {}, tokenizer, own, segments, starts)


def files_of(store: Store) -> pa.Table:
    """The source files of a version, FILES_SCHEMA.

    Raises:
        DataError: the list of them is missing or damaged.
    """
    name = f"{version_folder(store.version)}/{FILES}"
    records = [FileRecord(**tree) for tree in store.manifest["attachments"] if tree["file"] == name]
    if not records:
        raise DataError(f"version {store.version} of {str(store.path)!r} has no {FILES}; prepare the dataset again")
    content = read_checked(store.path, records[0])
    try:
        return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"{str(store.path / name)!r} cannot be used ({what}); prepare the dataset again") from None


def places_of(store: Store, split: str) -> np.ndarray:
    """Where each document of a split lies, in order: PLACE_TYPE[documents]."""
    return documents_of(store, split)[0]


def documents_of(store: Store, split: str) -> tuple[np.ndarray, pa.Array]:
    """Where each document of a split lies, in order, and the source file it is of: PLACE_TYPE[documents] and strings.

    Each index is read once, and only the columns that are needed. Nothing of it is kept.
    """
    segments = store.segments[split]
    read = np.unique(segments["chunk"])
    tables = [store.read_index(split, chunk, ("source", "end", "text_bytes", "digest")) for chunk in read.tolist()]
    if not tables:
        return np.empty(0, dtype=PLACE_TYPE), pa.nulls(0, pa.string())
    table = pa.concat_tables(tables)
    starts = np.concatenate(([0], np.cumsum([len(one) for one in tables])))[:-1]
    places, row = np.empty(int(segments["documents"].sum()), dtype=PLACE_TYPE), _expanded(segments)
    places["chunk"] = np.repeat(segments["chunk"], segments["documents"])
    places["document"] = row
    row += np.repeat(starts[np.searchsorted(read, segments["chunk"])], segments["documents"])
    end = numbers(table, "end").astype(np.int64)
    begin = np.concatenate(([0], end[:-1]))
    begin[starts] = 0
    places["first_token"], places["tokens"] = begin[row], (end - begin)[row]
    for name in ("text_bytes", "digest"):
        places[name] = numbers(table, name)[row]
    return places, arrays.whole(table["source"]).take(whole_numbers(row, pa.int64()))


def _expanded(segments: np.ndarray) -> np.ndarray:
    """The number within its chunk of each document of the segments: int64[documents]."""
    ends = np.cumsum(segments["documents"])
    steps = np.arange(int(segments["documents"].sum()))
    return steps + np.repeat(segments["first_document"] - (ends - segments["documents"]), segments["documents"])


def segments_of(places: np.ndarray) -> np.ndarray:
    """The segments that hold these documents in this order: SEGMENT_TYPE, neighbours in a chunk joined to one."""
    joined = (places["chunk"][1:] == places["chunk"][:-1]) & (places["document"][1:] == places["document"][:-1] + 1)
    heads = np.flatnonzero(np.concatenate(([True], ~joined))[: len(places)])
    segments = np.empty(len(heads), dtype=SEGMENT_TYPE)
    segments["chunk"] = places["chunk"][heads]
    segments["first_document"], segments["first_token"] = places["document"][heads], places["first_token"][heads]
    segments["documents"] = np.diff(np.concatenate((heads, [len(places)])))
    segments["tokens"] = np.add.reduceat(places["tokens"], heads) if len(heads) else 0
    return segments


def used_chunks(chunks: Sequence[ChunkRecord], places: np.ndarray) -> tuple[tuple[ChunkRecord, ...], np.ndarray]:
    """The chunks that hold any of the documents, and the places with the chunks' new numbers."""
    used, renumbered = np.unique(places["chunk"], return_inverse=True)
    places = places.copy()
    places["chunk"] = renumbered
    return tuple(chunks[number] for number in used), places


def drop_documents(
    store: Store,
    dropped: Mapping[str, Iterable[int]],
    operation: Mapping[str, Any],
    attachments: Mapping[str, bytes] | None = None,
    code: Mapping[str, Any] | None = None,
) -> Store:
    """The next version of a dataset: the same without some documents (numbers within their split). Copies no token.

    Raises:
        DataError: `store` is not the newest version (any more), or another process writes there.
    """
    newest = Store.open(store.path)
    if newest.checksum != store.checksum:
        raise DataError(
            f"version {store.version} of {str(store.path)!r} is not its newest, {newest.version}; start from that one"
        )
    chunks, places = {}, {}
    for split in SPLITS:
        found = places_of(store, split)
        kept = np.ones(len(found), dtype=bool)
        kept[np.fromiter(dropped.get(split, ()), dtype=np.int64)] = False
        chunks[split], places[split] = used_chunks(store.chunks[split], found[kept])
    manifest = store.manifest
    draft = Draft(
        tokenizer=store.tokenizer,
        operation=operation,
        chunks=chunks,
        settings=manifest["settings"],
        sources=manifest["sources"],
        files=files_of(store),
        rejected=manifest["rejected"],
        quarantine=store.read_quarantine(),
        places=places,
        parent=store.checksum,
        code=code or {"blues": __version__},
        attachments=attachments or {},
    )
    with exclusive(store.path):
        newest = Store.open(store.path)
        if newest.checksum != store.checksum:
            raise DataError(
                f"version {store.version} of {str(store.path)!r} is not its newest, {newest.version}; start from that "
                "one"
            )
        return write_version(store.path, store.version + 1, draft)
