"""Writing a mixture out: a dataset of its own, in which the documents of the sources stand in the order of the mixture.

In: sources with weights (`blues.data.merging.merge.combine`), and how much of them. Out: a prepared dataset, version 1.

The training documents are interleaved (see `interleave`), those for validation follow one another source by
source, each once. With `keep_order` a single dataset is written as it stands: a version of many pieces becomes one of
whole chunks, with the same fingerprint. Tokens are not made again, only copied; every index is held against its
checksum and every document against its digest on the way, so that nothing damaged is copied into a dataset that would
call it good.

The work is cut into shards, each of which becomes a chunk. A shard's bytes depend on what is asked for and on nothing
else, so that any number of processes may share them, and what an interrupted run finished is found again:

    .NAME.partial/request.json          what is being written, so that only the same command goes on with it
    .NAME.partial/rows/00000-train.arrow  a source's document index as one file, for reading rows of it in any order
    .NAME.partial/tasks/00000.json      the record of a finished shard
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blues.data.merging import interleave as il
from blues.data.merging.merge import Combination
from blues.data.merging.mixed_shards import ROWS, TASKS, Settings, Shard, finished, rows_file, write_rows
from blues.data.storage import versions
from blues.data.storage.chunks import ChunkRecord
from blues.data.storage.growing import open_growing, take_name
from blues.data.storage.manifest import MANIFEST, MIXTURE
from blues.data.storage.store import SPLITS, Store
from blues.errors import DataError
from blues.table import align

KIND = "materialize"


@dataclass(frozen=True)
class Progress:
    """How far it is: shards and tokens done, of all. `resumed`: shards that an earlier run wrote, and their tokens."""

    shards: int
    shards_done: int
    tokens: int
    tokens_done: int
    documents_done: int
    resumed: int
    tokens_resumed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second of this run."""
        return (self.tokens_done - self.tokens_resumed) / max(self.seconds, 1e-9)


class Materialization:
    """One mixture in the making. `shards` are all tasks by number; `records` those that are done."""

    def __init__(self, combined: Combination, settings: Settings, partial: Path) -> None:
        """Find out what is to be written and what an interrupted run of the same has done.

        Raises:
            DataError: several datasets where their order shall be kept, a damaged source, or nothing to write.
        """
        self.sources, self.settings, self.partial = combined.sources, settings, partial
        self.began = time.monotonic()
        self.request = request_of(combined, settings)
        open_growing(partial, self.request)
        try:
            survey = _survey(combined, partial)
            self.picks = self._choose(survey.lengths)
        except DataError:
            if not (partial / TASKS).exists():  # there is nothing to go on with
                shutil.rmtree(partial)
            raise
        self.available = [int(own.sum()) for own in survey.lengths["train"]]
        self.prefixed = survey.ids_collide and not settings.keep_order
        self.tokens = sum(int(picks["tokens"].sum()) for picks in self.picks.values())
        self.shards: dict[int, Shard] = {}
        for split in SPLITS:
            for number, part in enumerate(il.cut(self.picks[split]["tokens"], settings.shard_tokens)):
                self.shards[len(self.shards)] = Shard(split, number, self.picks[split][part])
        found = ((number, finished(partial, number)) for number in self.shards)
        self.records: dict[int, ChunkRecord] = {number: record for number, record in found if record is not None}
        self.resumed = frozenset(self.records)

    def _choose(self, lengths: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        if self.settings.keep_order:
            return {split: il.in_order(lengths[split]) for split in SPLITS}
        train = il.interleave(
            lengths["train"],
            [source.weight for source in self.sources],
            [source.store.fingerprint for source in self.sources],
            seed=self.settings.seed,
            tokens=self.settings.tokens,
        )
        if not len(train):
            raise DataError(f"{self.settings.tokens:,} tokens (--tokens) are less than any document has; ask for more")
        return {"train": train, "validation": il.in_order(lengths["validation"])}

    @property
    def worker_arguments(self) -> tuple[Any, ...]:
        """What `ShardWriter` is made of, in any process."""
        sources = [(source.name, str(source.store.path.absolute()), source.store.checksum) for source in self.sources]
        return self.partial.absolute(), sources, self.settings, self.prefixed

    @property
    def missing(self) -> dict[int, Shard]:
        """Shards that are not written yet."""
        return {number: shard for number, shard in self.shards.items() if number not in self.records}

    def done(self, number: int) -> None:
        """Take up a shard, whoever wrote it."""
        record = finished(self.partial, number)
        if record is None:
            raise DataError(
                f"shard {number} was written elsewhere and is not at {str(self.partial)!r}; the datasets must lie on a "
                "file system that every machine of the cluster sees"
            )
        self.records[number] = record

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(
            shards=len(self.shards),
            shards_done=len(self.records),
            tokens=self.tokens,
            tokens_done=sum(record.tokens for record in self.records.values()),
            documents_done=sum(record.documents for record in self.records.values()),
            resumed=len(self.resumed),
            tokens_resumed=sum(self.records[number].tokens for number in self.resumed),
            seconds=time.monotonic() - self.began,
        )

    def publish(self, output: Path, code: Mapping[str, Any]) -> Store:
        """Make a dataset of the shards and give it its name.

        Raises:
            DataError: its content is not that of the version whose order was to be kept.
        """
        chunks = {
            split: [self.records[number] for number, shard in self.shards.items() if shard.split == split]
            for split in SPLITS
        }
        operation = {**self.request, "ids_prefixed": self.prefixed, "written": self._written()}
        draft = versions.Draft(
            tokenizer=self.sources[0].store.tokenizer, operation=operation, chunks=chunks, code=code, **self._origin()
        )
        made = versions.write_version(self.partial, 1, draft)
        if self.settings.keep_order and made.fingerprint != self.sources[0].store.fingerprint:
            raise DataError(
                f"what was read of {str(self.sources[0].store.path)!r} is not what its manifest says; verify it"
            )
        take_name(self.partial, output, self.records.values(), (TASKS, ROWS))
        return Store.open(output)

    def _written(self) -> list[dict[str, Any]]:
        """What came of each source for training: documents, tokens, and how often it was begun."""
        train = self.picks["train"]
        return [
            {
                "documents": int(len(own)),
                "tokens": int(own["tokens"].sum()),
                "of_tokens": available,
                "passes": int(own["pass"].max(initial=-1)) + 1,
            }
            for available, own in (
                (available, train[train["source"] == source]) for source, available in enumerate(self.available)
            )
        ]

    def _origin(self) -> dict[str, Any]:
        """Sources, files and settings for the manifest: those of the version itself where it is only laid out anew."""
        layout = {"compression": self.settings.compression, "shard_tokens": self.settings.shard_tokens}
        if self.settings.keep_order:
            store = self.sources[0].store
            return {
                "settings": {**store.manifest["settings"], **layout},
                "sources": store.manifest["sources"],
                "files": versions.files_of(store),
                "rejected": store.manifest["rejected"],
                "quarantine": store.read_quarantine(),
            }
        described = [
            {**source, "kind": "dataset", "sources": of.store.manifest["sources"]}
            for source, of in zip(self.request["sources"], self.sources, strict=True)
        ]
        files = [_prefixed_files(source.store, source.name, number) for number, source in enumerate(self.sources)]
        return {"settings": layout, "sources": described, "files": pa.concat_tables(files)}


def request_of(combined: Combination, settings: Settings) -> dict[str, Any]:
    """What is asked for, as JSON holds it: two requests that are equal give the same dataset, byte for byte.

    Raises:
        DataError: the order of several datasets cannot be kept.
    """
    if settings.keep_order and len(combined.sources) > 1:
        names = ", ".join(source.name for source in combined.sources)
        raise DataError(f"--keep-order writes one dataset as it stands, and there are {names}; name one of them")
    sources = [
        {
            "name": source.name,
            "version": source.store.version,
            "checksum": source.store.checksum,
            "fingerprint": source.store.fingerprint,
            "weight": str(source.weight),
        }
        for source in combined.sources
    ]
    strategy = {} if settings.keep_order else {"strategy": combined.strategy, "rounding": float(combined.rounding)}
    return {"kind": KIND, **strategy, "sources": sources, **asdict(settings)}


def find_present(output: Path, request: Mapping[str, Any], overwrite: bool) -> Store | None:
    """The dataset at `output` if it is the one that is asked for; None where there is none, or it may be replaced.

    Raises:
        DataError: something else is there.
    """
    where = repr(str(output))
    if output.exists() and not output.is_dir():
        raise DataError(f"{where} is a file; choose a directory for the dataset")
    if not output.exists() or not any(output.iterdir()):
        return None
    if (output / MIXTURE).exists():
        if overwrite:
            return None
        raise DataError(f"{where} already holds a merged dataset; choose another directory or pass --overwrite")
    if not (output / MANIFEST).exists():
        raise DataError(f"{where} already holds something else; choose another directory for the dataset")
    first = Store.open(f"{output}@1", check_sizes=False).manifest["operation"]
    if first["kind"] != KIND:
        raise DataError(f"{where} holds a dataset that was not made by merging; choose another directory")
    if overwrite:
        return None
    if {key: first.get(key) for key in request} != request:
        raise DataError(f"{where} already holds another mixture; choose another directory or pass --overwrite")
    return Store.open(output)


# What the sources hold.


class _Survey(NamedTuple):
    """lengths: of each split, for each source, tokens of its documents (int64[d]). ids_collide: an id is in two."""

    lengths: dict[str, list[np.ndarray]]
    ids_collide: bool


def _survey(combined: Combination, partial: Path) -> _Survey:
    """Copy the document index of every source into one file for each split, and learn the lengths from it."""
    (partial / ROWS).mkdir(exist_ok=True)
    lengths: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    ids: list[np.ndarray] = []
    for number, source in enumerate(combined.sources):
        hashes = []
        for split in SPLITS:
            own, hashed = write_rows(rows_file(partial, number, split), source.store, split)
            lengths[split].append(own)
            hashes.append(hashed)
        ids.append(np.unique(np.concatenate(hashes)))
    every = np.concatenate(ids)
    return _Survey(lengths, len(np.unique(every)) < len(every))


# The finished dataset.


def _prefixed_files(store: Store, name: str, origin: int) -> pa.Table:
    """The source files of a version as those of dataset number `origin` of a mixture."""
    table = versions.files_of(store)
    names = pc.binary_join_element_wise(f"{name}/", table["file"], "")
    origins = pa.array(np.full(len(table), origin), pa.uint32())
    columns = {**dict(zip(table.column_names, table.columns, strict=True)), "file": names, "origin": origins}
    return pa.table(columns, schema=versions.FILES_SCHEMA)


def written_table(store: Store) -> list[str]:
    """What was written of each source, as lines: weight, share of the training tokens, and how much of it that is."""
    operation = store.manifest["operation"]
    pairs = list(zip(operation["sources"], operation["written"], strict=True))
    if operation["keep_order"]:
        [(source, _)] = pairs
        return [f"dataset {store.path}: version {source['version']} of {source['name']} as it stands"]
    total = sum(counts["tokens"] for _, counts in pairs)
    rows: list[tuple[str, ...]] = [("source", "version", "weight", "share", "documents", "tokens", "of its tokens")]
    differences = []
    for source, counts in pairs:
        weight, share = float(Fraction(source["weight"])), counts["tokens"] / total
        differences.append(abs(share - weight))
        used = f"{100 * counts['tokens'] / counts['of_tokens']:.1f}%"
        numbers = (f"{counts['documents']:,}", f"{counts['tokens']:,}", used)
        rows.append((source["name"], str(source["version"]), f"{weight:.4f}", f"{share:.4f}", *numbers))
    lines = [f"dataset {store.path} ({operation['strategy']}, written out)", "", *align(rows)]
    lines.append(f"a share differs from its weight by at most {max(differences):.1e}")
    again = [source["name"] for source, counts in pairs if counts["passes"] > 1]
    if again:
        lines.append(f"documents of {', '.join(again)} come more than once; from the second time on, ids end in #pass2")
    if operation["ids_prefixed"]:
        lines.append("an id is in several datasets: every id has the name of its dataset before it")
    return lines
