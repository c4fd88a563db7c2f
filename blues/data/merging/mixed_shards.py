"""One shard of a mixture that is written out: find its documents' rows and tokens, write one chunk.

In: the documents of the shard, in order (`interleave.PICK_TYPE`), and the sources. Out: a chunk, and its record beside
it that says the shard is done. A shard's files depend on what is asked for and on nothing else, so that any number of
processes may share the shards, and one that was interrupted is simply written again.

Tokens are not made again, only copied, and every document is held against the digest in its source's index: nothing
damaged gets into a dataset that would call it good.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import xxhash

from blues import config as cfg
from blues.data.storage.chunks import TOKEN_TYPE, ChunkRecord, ChunkWriter, Compression
from blues.data.storage.growing import written_at
from blues.data.storage.manifest import encode_json, parse_json
from blues.data.storage.store import Store
from blues.errors import DataError

ROWS, TASKS = "rows", "tasks"
ROWS_IN_BATCH = 1 << 16
SHARD_TOKENS = 1 << 24
READ_TOKENS = 1 << 22
ROW_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("text_bytes", pa.uint64()),
        ("digest", pa.uint64()),
        ("metadata", pa.string()),
        ("start", pa.int64()),  # the document's first token, counted within the split of its source
    ]
)


@dataclass(frozen=True)
class Settings:
    """How a mixture is written out. tokens: about how many for training, None for as many as there are without using
    a document twice. keep_order: write the documents of a single dataset as they stand. shard_tokens: of a chunk."""

    tokens: int | None = None
    seed: int = 0
    keep_order: bool = False
    shard_tokens: int = SHARD_TOKENS
    compression: Compression = "none"

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise DataError(f"a shard cannot have {self.shard_tokens:,} tokens (--shard-tokens); give 1 or more")
        if self.tokens is not None and self.tokens < 1:
            raise DataError(f"{self.tokens:,} tokens (--tokens) cannot be written; ask for 1 or more")
        if self.tokens is not None and self.keep_order:
            raise DataError("--keep-order writes a dataset whole; leave out --tokens, or --keep-order")
        if self.compression not in get_args(Compression):
            hint = cfg.nearest(self.compression, get_args(Compression))
            raise DataError(f"unknown compression {self.compression!r}.{hint}")


class Shard(NamedTuple):
    """One task: chunk `number` of a split, and the documents that it holds, in order (`interleave.PICK_TYPE`)."""

    split: str
    number: int
    picks: np.ndarray


def rows_file(partial: Path, source: int, split: str) -> Path:
    """Where the document index of a source lies while a mixture is written."""
    return partial / ROWS / f"{source:05d}-{split}.arrow"


def write_rows(path: Path, store: Store, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Write the documents of a split as an Arrow file of ROW_SCHEMA, a batch at a time. Returns their lengths in
    tokens, int64[d], and a hash of each id, uint64[d]."""
    lengths, hashes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
    waiting: list[pa.Table] = []
    start = count = 0
    growing = path.with_suffix(f".{os.getpid()}.tmp")  # renamed: a worker that outlives its run may be reading it
    with pa.OSFile(str(growing), "wb") as file, pa.ipc.new_file(file, ROW_SCHEMA) as writer:
        for table in store.tables(split, [*ROW_SCHEMA.names[:-1], "length"]):
            own = table["length"].to_numpy()
            lengths.append(own)
            starts = start + np.cumsum(own) - own
            start, count = start + int(own.sum()), count + len(table)
            ids = table["id"].to_pylist()
            hashes.append(np.fromiter((xxhash.xxh3_64_intdigest(id.encode()) for id in ids), np.uint64, len(ids)))
            waiting.append(table.drop_columns("length").append_column("start", pa.array(starts)))
            if count >= ROWS_IN_BATCH:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=ROWS_IN_BATCH)
                waiting, count = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=ROWS_IN_BATCH)
    os.replace(growing, path)
    return np.concatenate(lengths), np.concatenate(hashes)


class Rows:
    """Rows of a file of `write_rows`, by number, in any order. The file is mapped: only what is read is resident."""

    def __init__(self, path: Path) -> None:
        self.reader = pa.ipc.open_file(pa.memory_map(str(path)))
        sizes = [self.reader.get_batch(number).num_rows for number in range(self.reader.num_record_batches)]
        self.bounds = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))

    def take(self, numbers: np.ndarray) -> pa.Table:
        """ROW_SCHEMA, one row for each of the numbers (int64[n]), in their order."""
        order = np.argsort(numbers, kind="stable")
        batches = np.searchsorted(self.bounds, numbers[order], side="right") - 1
        heads = [*np.flatnonzero(np.diff(batches, prepend=-1)).tolist(), len(order)]
        found = [ROW_SCHEMA.empty_table()]
        for head, end in zip(heads, heads[1:], strict=False):
            batch = int(batches[head])
            rows = pa.array(numbers[order[head:end]] - self.bounds[batch])
            found.append(pa.Table.from_batches([self.reader.get_batch(batch).take(rows)]))
        return pa.concat_tables(found).take(pa.array(np.argsort(order)))


class ShardWriter:
    """Writes one shard after the other; a worker of `blues.cluster.pool`."""

    def __init__(
        self, partial: Path, sources: Sequence[tuple[str, str, str]], settings: Settings, prefixed: bool
    ) -> None:
        """sources: name, path and checksum of the version. prefixed: ids get the name of their dataset."""
        self.partial, self.settings, self.prefixed = partial, settings, prefixed
        self.names = [name for name, _, _ in sources]
        self.stores = [Store.open(path, checksum=checksum) for _, path, checksum in sources]
        self._rows: dict[tuple[int, str], Rows] = {}

    def __call__(self, task: int, shard: Shard) -> None:
        """Write shard number `task`, if it is not there.

        Raises:
            DataError: a document is not the one that the source's index lists, or the disk is full.
        """
        if finished(self.partial, task) is not None:  # by an actor that died after it
            return
        with written_at(self.partial):
            record = self._write(shard)
            (self.partial / TASKS).mkdir(exist_ok=True)
            cfg.write_atomic(_record_file(self.partial, task), encode_json(asdict(record)))

    def _write(self, shard: Shard) -> ChunkRecord:
        rows, picks = self._rows_of(shard), shard.picks
        starts = rows["start"].to_numpy()
        ends = np.cumsum(picks["tokens"])
        tokens = np.empty(int(ends[-1]), dtype=TOKEN_TYPE)
        for source in np.unique(picks["source"]).tolist():
            own = picks["source"] == source
            lengths = picks["tokens"][own]
            copy_documents(self.stores[source], shard.split, starts[own], lengths, tokens, ends[own] - lengths)
        writer = ChunkWriter(self.partial, shard.split, shard.number, compression=self.settings.compression)
        try:
            begin = 0
            for row, source, number, end in zip(
                rows.drop_columns("start").to_pylist(),
                *(picks[name].tolist() for name in ("source", "pass")),
                ends.tolist(),
                strict=True,
            ):
                document = tokens[begin:end]
                if xxhash.xxh3_64_intdigest(document.data) != row["digest"]:
                    raise DataError(
                        f"document {row['id']!r} of {str(self.stores[source].path)!r} does not match its checksum; "
                        "verify that dataset"
                    )
                writer.add(document, text_bytes=row["text_bytes"], **self._described(row, source, number))
                begin = end
            return writer.close()
        except BaseException:
            writer.abort()
            raise

    def _rows_of(self, shard: Shard) -> pa.Table:
        """The rows of the shard's documents, in order."""
        picks = shard.picks
        order, found = np.argsort(picks["source"], kind="stable"), []
        for source in np.unique(picks["source"]).tolist():
            key = (source, shard.split)
            if key not in self._rows:
                self._rows[key] = Rows(rows_file(self.partial, source, shard.split))
            found.append(self._rows[key].take(picks["document"][picks["source"] == source]))
        return pa.concat_tables(found).take(pa.array(np.argsort(order))).combine_chunks()

    def _described(self, row: Mapping[str, Any], source: int, number: int) -> dict[str, Any]:
        """Id, source and metadata of a document in the output."""
        metadata = json.loads(row["metadata"]) if row["metadata"] != "{}" else {}
        if self.settings.keep_order:
            return {"id": row["id"], "source": row["source"], "metadata": metadata}
        name = self.names[source]
        id = (f"{name}/" if self.prefixed else "") + row["id"] + (f"#pass{number + 1}" if number else "")
        return {"id": id, "source": f"{name}/{row['source']}", "metadata": metadata}


def copy_documents(
    store: Store, split: str, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, places: np.ndarray
) -> None:
    """Copy documents (first token and length, int64[d]) to `places` in `out`, reading the store from front to back, and
    what is adjacent on both sides at once."""
    order = np.argsort(starts, kind="stable")
    starts, lengths, places = starts[order], lengths[order], places[order]
    joined = (starts[1:] == starts[:-1] + lengths[:-1]) & (places[1:] == places[:-1] + lengths[:-1])
    heads = np.flatnonzero(np.concatenate(([True], ~joined)))
    sizes = np.add.reduceat(lengths, heads)
    for start, place, size in zip(starts[heads].tolist(), places[heads].tolist(), sizes.tolist(), strict=True):
        for done in range(0, size, READ_TOKENS):
            count = min(READ_TOKENS, size - done)
            out[place + done : place + done + count] = store.read(split, start + done, start + done + count)


def _record_file(partial: Path, task: int) -> Path:
    return partial / TASKS / f"{task:05d}.json"


def finished(partial: Path, task: int) -> ChunkRecord | None:
    """The record of a shard that is written, or None (also if its files are not all there)."""
    try:
        record = ChunkRecord.from_tree(parse_json(_record_file(partial, task).read_bytes()))
        whole = all((partial / of.file).stat().st_size == of.bytes for of in (record.data, record.index))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if whole else None
