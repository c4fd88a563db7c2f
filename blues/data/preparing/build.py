"""Building a version of a dataset: which files must be read, what was done already, and how it becomes whole.

In: a plan of source files, and the dataset as it is (if there is one). Out: the next version, published in one step.

A new dataset grows in a folder beside its final name and gets it by one rename. An update, or further data that is
appended, grows there too; then its chunks move in among those that are there and a new version takes them up. Only
files that are new or have changed are read: documents of the others stay where they lie, and the version says in which
order they count. What comes of it is what a preparation of everything would have given: the same documents in the same
order, with the same tokens and the same fingerprint.

Whoever does the tasks (see `blues.data.preparing.shards`) may be killed at any time; what is finished is found again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from blues import config as cfg
from blues.data.preparing.base import Base, Settings
from blues.data.preparing.shards import (
    TASKS,
    Recipe,
    Split,
    TaskResult,
    rejected_file,
    rejected_line,
    result_file,
    run_task,
)
from blues.data.reading.sources import Plan
from blues.data.storage import versions
from blues.data.storage.arrays import flags, of_flags, positions, strings, whole, whole_numbers
from blues.data.storage.chunks import CHUNKS, ChunkRecord, numbers
from blues.data.storage.growing import open_growing, take_name
from blues.data.storage.store import SPLITS, VERSION, Store
from blues.data.tokenizer import fingerprint as tokenizer_fingerprint
from blues.errors import DataError

MOST_READINGS = 50
"""Ways of reading (kind, columns, encoding, language) that a manifest lists of a source."""


@dataclass(frozen=True)
class Progress:
    """How far it is: tasks and source bytes done, of all; what came of them. `resumed` and `bytes_resumed`: what an
    earlier run did. `reused_files` were read for an earlier version. `seconds` of this run, Ray's start included."""

    tasks: int
    tasks_done: int
    bytes: int
    bytes_done: int
    documents: int
    tokens: int
    rejected: int
    resumed: int
    bytes_resumed: int
    reused_files: int
    seconds: float

    @property
    def rate(self) -> float:
        """Source bytes per second of this run."""
        return (self.bytes_done - self.bytes_resumed) / max(self.seconds, 1e-9)


class Build:
    """One version in the making. `tasks` are the groups of parts that are to be read; `results` those that are done.

    table: the plan's files, see `files_table`.
    """

    def __init__(self, plan: Plan, table: pa.Table, partial: Path, settings: Settings, base: Base | None) -> None:
        self.plan, self.table, self.partial, self.settings, self.base = plan, table, partial, settings, base
        self.split = Split.fraction(settings.validation_fraction)
        self.began = time.monotonic()
        self._dropped = False  # whether what could have been reused had to be read again
        self._choose(self._unchanged())

    def _choose(self, reused_F: np.ndarray) -> None:
        """Settle which files are not read again (bool[files]), and find what an interrupted run finished."""
        self.reused_F = reused_F
        self.tasks = self.plan.tasks(~reused_F if reused_F.any() else None)
        self.weights = [sum(part.bytes for part in task) for task in self.tasks]
        self.request = self._request()
        open_growing(self.partial, self.request)
        found = ((number, TaskResult.read(self.partial, number)) for number in range(len(self.tasks)))
        self.results: dict[int, TaskResult] = {}
        self._sums: Counter[str] = Counter()  # over the results: to add them up at every report grows with the square
        for number, result in found:
            if result is not None:
                self._take(number, result)
        self.resumed = frozenset(self.results)
        self.bytes, self.bytes_resumed = sum(self.weights), self._sums["bytes"]

    def _take(self, number: int, result: TaskResult) -> None:
        """Take up a result. A task that is done again, across another border, comes to the same sums."""
        if number not in self.results:
            self._sums["bytes"] += self.weights[number]
            self._sums["documents"] += result.documents
            self._sums["tokens"] += result.tokens
            self._sums["rejected"] += sum(result.rejected.values())
        self.results[number] = result

    def _unchanged(self) -> np.ndarray:
        """Which files' documents are in the dataset already, read in the same way from the same bytes: bool[files]."""
        unchanged_F = np.zeros(len(self.table), dtype=bool)
        if self.base is None or self._split_of_base_moved:
            return unchanged_F
        before = positions(self.table["file"], self.base.own_files["file"])
        there = np.flatnonzero(before >= 0)
        old = self.base.own_files.take(whole_numbers(before[there], pa.int32()))
        new = self.table.filter(flags(before >= 0))
        same = pc.and_(*(pc.equal(old[name], new[name]) for name in ("content", "reading")))
        read = pc.greater(pc.binary_length(new["reading"]), pc.binary_length(strings([""]))[0])
        unchanged_F[there] = of_flags(pc.and_(same, read))
        return unchanged_F

    @property
    def _split_of_base_moved(self) -> bool:
        """Whether the version before had too few documents for the border between its splits to be the usual one."""
        assert self.base is not None
        return self.base.raw.manifest["settings"].get("threshold") != hex(
            Split.fraction(self.settings.validation_fraction).threshold
        )

    @property
    def all_again(self) -> bool:
        """Whether unchanged files were read again because documents change between the splits."""
        return self.base is not None and (self._split_of_base_moved or self._dropped)

    @property
    def kept(self) -> int:
        """Number of files that are not read again."""
        return int(np.count_nonzero(self.reused_F))

    @property
    def removed(self) -> int:
        """Number of files of the version before that the source does not have any more."""
        if self.base is None:
            return 0
        return int(np.count_nonzero(positions(self.base.own_files["file"], self.table["file"]) < 0))

    @property
    def recipe(self) -> Recipe:
        """How the documents become chunks."""
        version = 1 if self.base is None else self.base.newest.version + 1
        return Recipe(self.split, version, self.settings.compression)

    @property
    def missing(self) -> list[int]:
        """Tasks that are not done yet."""
        return [number for number in range(len(self.tasks)) if number not in self.results]

    def done(self, number: int) -> None:
        """Take up the result of a task, whoever did it."""
        result = TaskResult.read(self.partial, number)
        if result is None:
            raise DataError(
                f"task {number} was done elsewhere and its files are not at {str(self.partial)!r}; source and "
                "output must lie on a file system that every machine of the cluster sees"
            )
        self._take(number, result)

    def _request(self) -> dict[str, Any]:
        """What is being made of what, and in which form: what another Blues left half done is not gone on with."""
        digest = xxhash.xxh3_128(self.reused_F.tobytes())
        for column in self.table.columns:
            for buffer in (buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None):
                digest.update(buffer)
        return {
            "format_version": VERSION,
            "settings": self.settings.tree(),
            "tokenizer": cfg.dump(self.settings.tokenizer),
            "tokenizer_fingerprint": tokenizer_fingerprint(self.settings.tokenizer),
            "base": None if self.base is None else self.base.newest.checksum,
            "files": digest.hexdigest(),
        }

    def fill_splits(self) -> bool:
        """Move the border to the nearest id where a small dataset left a split empty, and redo the tasks it crosses.

        Decided by the ids alone, not by what lies in the splits by now: an interrupted move is finished, not mistaken
        for an ordinary split. False if documents of an earlier version would have to move too: then nothing of it can
        be used, and the tasks are those of a whole preparation now.
        """
        if not self.settings.validation_fraction:
            return True
        if self.base is not None:
            brought = {chunk.split for result in self.results.values() for chunk in result.chunks}
            if all(split in brought or len(self._places(split)[0]) for split in SPLITS):
                return True
            if self.reused_F.any():
                self._dropped = True
                self._choose(np.zeros_like(self.reused_F))
                return False
        extremes = {
            task: (result.lowest, result.highest)
            for task, result in self.results.items()
            if result.lowest is not None and result.highest is not None
        }
        lowest = min((low for low, _ in extremes.values()), default=0)
        highest = max((high for _, high in extremes.values()), default=0)
        if lowest == highest:
            self.split = Split(0)  # one id, so nothing can be held out without being trained on
        elif self.split.of(lowest) != "validation":
            self.split = Split(lowest + 1)
        elif self.split.of(highest) != "train":
            self.split = Split(highest)
        else:
            return True
        tokenizer = self.settings.tokenizer.build()
        for task, (low, high) in extremes.items():
            if {chunk.split for chunk in self.results[task].chunks} != {self.split.of(low), self.split.of(high)}:
                self._discard(task)
                redone = run_task(self.partial, task, self.plan.root, self.tasks[task], tokenizer, self.recipe)
                self._take(task, redone)
        return True

    def _discard(self, task: int) -> None:
        result_file(self.partial, task).unlink()
        for chunk in self.results[task].chunks:
            for record in (chunk.data, chunk.index):
                (self.partial / record.file).unlink()

    def publish(self, output: Path, operation: Mapping[str, Any], code: Mapping[str, Any]) -> Store:
        """Make the version that the tasks' results, and what is reused, amount to.

        Raises:
            DataError: no document came of it; the reason and the first rejected row.
        """
        places = {split: self._places(split) for split in SPLITS}
        quarantine, rejected = self._quarantine()
        if not any(len(of) for of, _ in places.values()):
            sentence = self._nothing_usable(rejected)
            shutil.rmtree(self.partial)  # there is nothing to go on with
            raise DataError(sentence)
        chunks, used = {}, {}
        for split, (ordered, records) in places.items():
            chunks[split], used[split] = versions.used_chunks(records, ordered)
        draft = versions.Draft(
            tokenizer=self.settings.tokenizer,
            operation=operation,
            chunks=chunks,
            settings=self.settings.tree() | {"threshold": self._threshold},
            sources=self._sources(),
            files=self._all_files(),
            rejected=rejected,
            quarantine=quarantine,
            places=used,
            parent=None if self.base is None else self.base.newest.checksum,
            code=code,
        )
        if self.base is None:
            versions.write_version(self.partial, 1, draft)
            take_name(self.partial, output, [chunk for split in SPLITS for chunk in chunks[split]], [TASKS])
            return Store.open(output)
        self._move_chunks(output)
        store = versions.write_version(output, self.base.newest.version + 1, draft)
        shutil.rmtree(self.partial)
        return store

    @property
    def _threshold(self) -> str:
        """What the splits go by. If documents of other sources stay as an unusual border left them, it is that one, so
        that the next update knows."""
        if self.base is not None and self._split_of_base_moved and len(self.base.others):
            return self.base.raw.manifest["settings"]["threshold"]
        return hex(self.split.threshold)

    def _sources(self) -> list[Mapping[str, Any]]:
        sources = [] if self.base is None else list(self.base.raw.manifest["sources"])
        place = 0 if self.base is None else self.base.origin
        counts = (count.as_py() for count in self.table["reading"].value_counts())
        readings = sorted((count["values"], count["counts"]) for count in counts if count["values"])
        read_as = [json.loads(reading) | {"files": files} for reading, files in readings]
        sources[place : place + 1] = [{**self.plan.source, "read_as": read_as[:MOST_READINGS]}]
        return sources

    def _all_files(self) -> pa.Table:
        """Files of all sources of the dataset, in the order of their documents."""
        if self.base is None:
            return self.table
        old, origins = self.base.files, numbers(self.base.files, "origin")
        before, after = (old.filter(flags(of)) for of in (origins < self.base.origin, origins > self.base.origin))
        return pa.concat_tables([before, self.table, after])

    def _places(self, split: str) -> tuple[np.ndarray, tuple[ChunkRecord, ...]]:
        """Where the documents of a split lie, in their order, and the chunks that the places speak of."""
        new = tuple(c for _, result in sorted(self.results.items()) for c in result.chunks if c.split == split)
        fresh = versions.unpublished(self.partial, self.settings.tokenizer, split, new)
        places, rank = self._ranked(versions.documents_of(fresh, split))
        if self.base is None:
            return places[np.argsort(rank, kind="stable")], new
        old, old_rank = self._documents_before[split]
        kept = np.flatnonzero(self._kept_F[old_rank])
        places["chunk"] += len(self.base.raw.chunks[split])
        places, rank = np.concatenate([old[kept], places]), np.concatenate([old_rank[kept], rank])
        return places[np.argsort(rank, kind="stable")], (*self.base.raw.chunks[split], *new)

    @cached_property
    def _documents_before(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each split the documents that there are already, and the ranks of their files."""
        assert self.base is not None
        return {split: self._ranked(self.base.documents(split)) for split in SPLITS}

    def _ranked(self, documents: tuple[np.ndarray, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Where `versions.documents_of` lie, and of each the rank of its file in `_order`, -1 without one."""
        places, sources = documents
        return places, positions(sources, self._order)

    @property
    def _kept_F(self) -> np.ndarray:
        """For each file of `_order`, and at last for none, whether its documents of the version before stay."""
        assert self.base is not None
        first = int(np.count_nonzero(numbers(self.base.files, "origin") < self.base.origin))
        kept_F = np.append(np.ones(len(self._order), dtype=bool), False)
        kept_F[first : first + len(self.table)] = self.reused_F
        return kept_F

    @cached_property
    def _order(self) -> pa.Array:
        return whole(self._all_files()["file"])

    def _quarantine(self) -> tuple[bytes, Counter[str]]:
        """The lines of all rejected rows, in the order of the files, and their number by reason."""
        ordered = [rejected_file(self.partial, number).read_bytes() for number in range(len(self.tasks))]
        lines = b"".join(ordered).splitlines(keepends=True)
        refused = [rejected_line(record) for record in self.plan.rejected]
        rows = [json.loads(line) for line in lines]
        if self.base is not None:
            old = self.base.raw.read_quarantine().splitlines(keepends=True)
            lines, rows = lines + old, rows + [json.loads(line) for line in old]
            rank = positions(strings([row["file"] for row in rows]), self._order)
            kept = np.append(np.ones(len(lines) - len(old), dtype=bool), self._kept_F[rank[len(lines) - len(old) :]])
            order = np.flatnonzero(kept)[np.argsort(rank[kept], kind="stable")].tolist()
            lines, rows = [lines[number] for number in order], [rows[number] for number in order]
        lines, rows = refused + lines, [json.loads(line) for line in refused] + rows
        rejected: Counter[str] = Counter()
        for row in rows:
            rejected[row["reason"]] += row.get("rows", 1)
        return b"".join(lines), rejected

    def _move_chunks(self, output: Path) -> None:
        """Put the new chunks among those of the versions before, which nothing refers to until there is a new one."""
        assert self.base is not None
        for result in self.results.values():
            for record in (record for chunk in result.chunks for record in (chunk.data, chunk.index)):
                os.replace(self.partial / record.file, output / record.file)
        cfg.fsync_folder(output / CHUNKS)

    def _nothing_usable(self, rejected: Counter[str]) -> str:
        """Why no document came of the source, with the first rejected row."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common(3))
        example = ""
        for number in range(len(self.tasks)):
            first = rejected_file(self.partial, number).read_bytes().partition(b"\n")[0]
            if first:
                row = json.loads(first)
                place = row["file"] if row["row"] is None else f"{row['file']} row {row['row']}"
                example = f"; first: {place}: {' '.join((row['reason'], row.get('detail', ''))).strip()}"
                break
        total, name = sum(rejected.values()), self.plan.name
        if not total:
            return f"{name!r} holds no rows; nothing was prepared"
        return f"none of the {total:,} rows of {name!r} can be used ({reasons}{example}); mend the source"

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(
            tasks=len(self.tasks),
            tasks_done=len(self.results),
            bytes=self.bytes,
            bytes_done=self._sums["bytes"],
            documents=self._sums["documents"],
            tokens=self._sums["tokens"],
            rejected=self._sums["rejected"],
            resumed=len(self.resumed),
            bytes_resumed=self.bytes_resumed,
            reused_files=self.kept,
            seconds=time.monotonic() - self.began,
        )
