"""Remove the duplicates of one dataset or several: signatures in parallel, and a new version of each that loses any.

In: dataset directories. Out: `Deduplicated`, what was removed and why. No token is copied: a version without the
removed documents shares the chunks of the one before, which stays, and carries `removed.parquet` (REMOVED_SCHEMA
without the dataset's own name). Versions are written last, one dataset after the other; an interruption before that
leaves everything as it was.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from blues.cluster.pool import map_tasks
from blues.data.dedup.corpus import Corpus, Run
from blues.data.dedup.dedup import Progress, Removal, Report, find_duplicates
from blues.data.dedup.dedup_report import Summary, parquet, removed_table
from blues.data.dedup.minhash import Settings
from blues.data.dedup.sketches import Sketches
from blues.data.merging.merge import open_dataset
from blues.data.storage import versions
from blues.data.storage.manifest import MIXTURE
from blues.data.storage.store import SPLITS, Store
from blues.errors import DataError

OPERATION = "dedup"
REMOVED = "removed.parquet"
ALGORITHM = 1
"""Raised when the same settings come to remove other documents."""
TASK_TOKENS = 1 << 22
HERE_TOKENS = 1 << 29
"""Datasets with fewer tokens are done in this process: they take less time than the start of Ray."""


@dataclass(frozen=True)
class Request:
    """What is to be removed. settings: of near copies, None for exact copies only. across_only: only documents that
    repeat one of another dataset, so that each dataset may repeat itself."""

    settings: Settings | None = field(default_factory=Settings)
    across_only: bool = False

    def tree(self) -> dict[str, Any]:
        """For the manifest."""
        near = None if self.settings is None else asdict(self.settings)
        return {"algorithm": ALGORITHM, "near": near, "across_only": self.across_only}


@dataclass(frozen=True)
class Deduplicated:
    """before: the versions that were looked at; after: the newest ones now, in the same order. done_before: the same
    request made them what they are, and nothing was looked at again (`summary` is None)."""

    before: tuple[Store, ...]
    after: tuple[Store, ...]
    summary: Summary | None
    done_before: bool = False


def dedup(
    paths: Sequence[str | Path],
    request: Request,
    *,
    dry_run: bool = False,
    num_workers: int | None = None,
    address: str | None = None,
    report: Report = lambda _: None,
) -> Deduplicated:
    """Remove the duplicates of these datasets, the first having the best right to keep a document.

    Args:
        dry_run: make no version.
        num_workers, address: of the Ray cluster for the signatures; without them, less than HERE_TOKENS tokens are
            done in this process.
        report: called with the progress of each stage.

    Raises:
        DataError: a dataset that cannot be opened, is merged, comes twice, is not its newest version or has another
            tokenizer; or that another process changed meanwhile.
    """
    stores = open_sources(paths)
    if _is_done(stores, request):
        return Deduplicated(stores, stores, None, done_before=True)
    names = distinct_names([store.path for store in stores])
    corpus = Corpus.of(stores)
    removal = _search(corpus, stores, request, num_workers, address, report)
    table = removed_table(corpus, stores, names, removal)
    summary = Summary.of(stores, names, table)
    if dry_run:
        return Deduplicated(stores, stores, summary)
    for store in stores:  # what stays in one decides what goes from another
        if Store.open(store.path).checksum != store.checksum:
            raise DataError(f"{str(store.path)!r} was changed while duplicates were looked for; run the command again")
    operation = {"kind": OPERATION, "settings": request.tree(), "datasets": _described(stores, summary)}
    after = []
    for name, store in zip(names, stores, strict=True):
        own = table.filter(pc.field("dataset") == name)
        dropped = {split: own.filter(pc.field("split") == split)["document"].to_numpy() for split in SPLITS}
        attachments = {REMOVED: parquet(own.drop_columns(["dataset"]))}
        after.append(versions.drop_documents(store, dropped, operation, attachments) if len(own) else store)
    return Deduplicated(stores, tuple(after), summary)


def _search(
    corpus: Corpus,
    stores: Sequence[Store],
    request: Request,
    num_workers: int | None,
    address: str | None,
    report: Report,
) -> Removal:
    find = functools.partial(find_duplicates, corpus, across_only=request.across_only, report=report)
    if request.settings is None:
        return find(Settings(), None)
    runs = dict(enumerate(corpus.runs(TASK_TOKENS)))
    here = num_workers is None and address is None and int(corpus.lengths_N.sum()) < HERE_TOKENS
    arguments = (tuple(stores), request.settings, None if here else 1)
    with Sketches.room_for(len(corpus), request.settings) as sketches:
        done = 0
        for number, sketch in map_tasks(Sketcher, arguments, runs, num_workers=num_workers, address=address, here=here):
            sketches.put(runs[number].number, *sketch)
            done += len(runs[number].ends_D)
            report(Progress("signatures", done, len(corpus)))
        return find(request.settings, sketches)


class Sketcher:
    """Makes the sketches of runs of documents: what an actor of the pool does."""

    def __init__(self, stores: Sequence[Store], settings: Settings, threads: int | None) -> None:
        """threads: of rensa in this process, None for its default (all cores)."""
        self.stores, self.settings = stores, settings
        if threads is not None:
            os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when rensa first needs its threads

    def __call__(self, _: int, run: Run) -> tuple[np.ndarray, np.ndarray]:
        return run.sketch(functools.partial(self.stores[run.dataset].read, run.split), self.settings)


def open_sources(paths: Sequence[str | Path]) -> tuple[Store, ...]:
    """The datasets, in order, all of one tokenizer.

    Raises:
        DataError: see `dedup`.
    """
    if not paths:
        raise DataError("name at least one prepared dataset")
    seen: dict[Path, str | Path] = {}
    stores: list[Store] = []
    for path in paths:
        if (Path(path) / MIXTURE).exists():
            inner = " ".join(str(store.path) for store in open_dataset(path).stores)
            raise DataError(
                f"{str(path)!r} is a merged dataset; name its sources instead, and then merge them again: {inner}"
            )
        store = Store.open(path)
        if (where := store.path.resolve()) in seen:
            raise DataError(f"{str(path)!r} is named twice; name each dataset once, in the order of their precedence")
        seen[where] = path
        newest = Store.open(store.path).version
        if store.version != newest:
            raise DataError(f"{str(path)!r} is not the newest version, {newest}; name the dataset without a version")
        if stores and store.tokenizer != stores[0].tokenizer:
            raise DataError(
                f"{str(path)!r} has vocab_size {store.tokenizer.vocab_size or 'null (all)'} and {str(paths[0])!r} has "
                f"{stores[0].tokenizer.vocab_size or 'null (all)'}; only datasets of one tokenizer can be compared"
            )
        stores.append(store)
    return tuple(stores)


def distinct_names(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """The folders' names, told apart by their places where they are equal."""
    names = [Path(path).resolve().name for path in paths]
    return tuple(name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1))


def _described(stores: Sequence[Store], summary: Summary) -> list[dict[str, Any]]:
    """What each dataset was before, and how many documents it loses."""
    described = []
    for name, store in zip(summary.names, stores, strict=True):
        lines = [line for line in summary.lines if line.dataset == name]
        counts = {kind: sum(getattr(line, kind) for line in lines) for kind in ("exact", "near")}
        described.append({"name": name, "fingerprint": store.fingerprint, **counts})
    return described


def _is_done(stores: Sequence[Store], request: Request) -> bool:
    """Whether these versions are what this very request left of the same datasets: those that lost documents were made
    by it, and the others are as it saw them."""
    operations = [store.manifest["operation"] for store in stores]
    made = next((each for each in operations if each["kind"] == OPERATION), None)
    if made is None or made["settings"] != request.tree() or len(made["datasets"]) != len(stores):
        return False
    return all(
        operation == made if seen["exact"] + seen["near"] else store.fingerprint == seen["fingerprint"]
        for store, operation, seen in zip(stores, operations, made["datasets"], strict=True)
    )
