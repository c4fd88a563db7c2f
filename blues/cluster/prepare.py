"""Preparing a dataset with Ray Data: files to chunks of tokens, in parallel, resumable, the same for any parallelism.

In: a `Plan` of source files (or a function that makes it: Ray starts meanwhile), settings, an output directory. Out: a
dataset directory (`blues.data.storage.store`), or the next version of the one that is there.

The tasks of `blues.data.preparing.build` are done by a pool of actors, each with its tokenizer loaded once, that read,
tokenize and write one task after the other. Only task numbers and counts travel through Ray, never text or tokens, so
memory stays at about a megabyte of text per actor however large the source is. On a cluster of several machines source
and output must be on a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from blues.cluster import session
from blues.cluster.pool import map_tasks, modules_of
from blues.data.preparing.base import Ahead, Base, Mode, Settings, files_table, find_base, holds_dataset
from blues.data.preparing.build import Build, Progress
from blues.data.preparing.shards import Recipe, TaskResult, run_task
from blues.data.reading.readers import Part
from blues.data.reading.sources import Plan
from blues.data.storage.chunks import Compression
from blues.data.storage.growing import recover
from blues.data.storage.manifest import partial_directory
from blues.data.storage.store import Store
from blues.data.storage.versions import exclusive
from blues.data.tokenizer import Tokenizer
from blues.errors import DataError
from blues.tracking.provenance import code_version

HERE_BYTES = 32 << 20
"""An update that reads no more than this is done without Ray, whose start alone takes longer."""
HERE_FRESH_BYTES = 8 << 20
"""Likewise a dataset that is new: for it Ray starts while the source is looked through."""


@dataclass
class Prepared:
    """What came of `plan`. made: whether anything was done at all. progress: of the tasks, at the end. tokenizers: what
    tokenized in the workers. fell_back: why workers went over to tiktoken, where they did. rechecked: documents that a
    fast tokenizer's worker tokenized with tiktoken too."""

    store: Store
    plan: Plan
    made: bool
    progress: Progress | None = None
    tokenizers: frozenset[str] = frozenset()
    fell_back: list[str] = field(default_factory=list)
    rechecked: int = 0


def prepare(
    source: Plan | Callable[..., Plan],
    output: str | Path,
    tokenizer: Tokenizer.Config,
    *,
    validation_fraction: float = 0.05,
    compression: Compression = "none",
    mode: Mode = "prepare",
    overwrite: bool = False,
    backend: str = "tiktoken",
    num_workers: int | None = None,
    address: str | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Prepared:
    """Make the dataset `output`, or go on with one that was interrupted; one that is there already is left as it is.

    Args:
        source: what is read, or a function that looks for it (it is called in a thread, while Ray starts, if a new
            dataset is to be made; for an update with `known`, see `sources.plan`).
        validation_fraction: share of the documents held out as the split `validation`, chosen by a hash of their ids;
            each split gets at least one document if there are two or more (of different ids) and the share is positive,
            and a document that is alone is for training.
        compression: of the chunks.
        mode: `update` reads what changed in the source since, and makes a new version; `append` adds the source to
            those that are there, as a new version. Both prepare where there is nothing yet.
        overwrite: replace another dataset at `output`.
        backend: of the tokenizer; changes the speed, never the tokens.
        num_workers: actors, one CPU each; None for all CPUs of the cluster.
        report: called after every task.

    Raises:
        DataError: `output` holds something else, a source cannot be read, or no document came of it.
    """
    output = Path(output)
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the name {str(output)!r} is not UTF-8, which Ray needs; choose another --data-cache-dir"
        ) from None
    settings = Settings(tokenizer, validation_fraction, compression)
    began = time.monotonic()
    fresh = not holds_dataset(output) or overwrite
    with contextlib.ExitStack() as open_until_done:
        ahead = None
        if mode == "update" and not fresh and callable(source):
            ahead = Ahead(output, tokenizer)
            open_until_done.callback(ahead.close)
            source = functools.partial(source, known=ahead.known)
        plan = open_until_done.enter_context(_planned(source, fresh, num_workers, address))
        open_until_done.enter_context(exclusive(output))
        recover(output)
        base = find_base(output, plan, settings, mode, ahead) if holds_dataset(output) and not overwrite else None
        table = files_table(plan, 0 if base is None else base.origin)
        if base is not None and mode == "prepare":
            _refuse_other(base, plan, table)
        if base is not None and mode != "append" and base.holds(table):
            return Prepared(base.newest, plan, made=False)
        build = Build(plan, table, partial_directory(output), settings, base)
        build.began = began  # Ray may have started before there was a plan
        if ahead is not None:
            ahead.wait_for_tokenizer()
        done = _do_tasks(build, backend, num_workers, address, report)
        store = build.publish(output, _operation(build, mode), code_version())
    return Prepared(store, plan, True, build.progress(), done.tokenizers, done.fell_back, done.rechecked)


def _planned(
    source: Plan | Callable[..., Plan], fresh: bool, num_workers: int | None, address: str | None
) -> contextlib.AbstractContextManager[Plan]:
    """The plan, with Ray connected if it took a while and will be needed: an update may find that it needs none."""
    if isinstance(source, Plan):
        return contextlib.nullcontext(source)
    if not fresh:
        return contextlib.nullcontext(source())
    return session.connect_beside(source, address, num_cpus=num_workers, preload=modules_of(_Worker))


@dataclass
class _Done:
    tokenizers: frozenset[str] = frozenset()
    fell_back: list[str] = field(default_factory=list)
    rechecked: int = 0

    def add(self, outcome: dict[str, Any]) -> None:
        self.tokenizers |= {outcome["backend"]}
        self.rechecked += outcome["rechecked"]
        if outcome["fell_back"] and outcome["fell_back"] not in self.fell_back:
            self.fell_back.append(outcome["fell_back"])


def _do_tasks(
    build: Build, backend: str, num_workers: int | None, address: str | None, report: Callable[[Progress], None]
) -> _Done:
    """Do what is not done yet, and what settling the splits asks for again."""
    done = _Done()
    while True:
        report(build.progress())
        tasks = {number: build.tasks[number] for number in build.missing}
        size = sum(build.weights[number] for number in tasks)
        small = size <= (HERE_FRESH_BYTES if build.base is None else HERE_BYTES)
        here = small and address is None and num_workers is None
        arguments = (
            build.partial.absolute(),
            build.plan.root.absolute(),
            build.settings.tokenizer,
            backend,
            build.recipe,
            (os.cpu_count() or 1) if here else 1,  # threads that tokenize
        )
        for number, outcome in map_tasks(
            _Worker, arguments, tasks, num_workers=num_workers, address=address, here=here
        ):
            build.done(number)
            done.add(outcome)
            report(build.progress())
        if build.fill_splits():
            return done


class _Worker:
    """Reads, tokenizes and writes one task after the other, in an actor of the pool."""

    def __init__(
        self, partial: Path, root: Any, tokenizer: Tokenizer.Config, backend: str, recipe: Recipe, threads: int
    ) -> None:
        self.partial, self.root, self.recipe = partial, root, recipe
        self.tokenizer = tokenizer.build(backend=backend, threads=threads)
        self.rechecked = 0

    def __call__(self, number: int, parts: tuple[Part, ...]) -> dict[str, Any]:
        if TaskResult.read(self.partial, number) is None:  # an actor that died may have left it whole
            try:
                run_task(self.partial, number, self.root, parts, self.tokenizer, self.recipe)
            except OSError as problem:
                raise DataError(
                    f"cannot write {str(self.partial)!r}: {problem.strerror}; check its permissions and free space"
                ) from None
        before, self.rechecked = self.rechecked, self.tokenizer.rechecked
        return {
            "backend": self.tokenizer.backend,
            "fell_back": self.tokenizer.fell_back,
            "rechecked": self.rechecked - before,
        }


def _operation(build: Build, mode: Mode) -> dict[str, Any]:
    """What made the version, for its manifest."""
    kind = "prepare" if build.base is None else mode
    operation: dict[str, Any] = {"kind": kind, "source": build.plan.name}
    if build.base is not None:
        operation |= {
            "files_read": len(build.plan.files) - build.kept,
            "files_kept": build.kept,
            "files_removed": build.removed,
            "all_again": build.all_again,
        }
    return operation


def _refuse_other(base: Base, plan: Plan, table: pa.Table) -> None:
    """Raise unless the dataset that is there is the one that is asked for."""
    output = str(base.newest.path)
    if len(base.raw.manifest["sources"]) > 1:
        raise DataError(f"{output!r} holds more than {plan.name!r}; --update it, or choose another --data-cache-dir")
    if base.own_files.select(["file", "content"]).equals(table.select(["file", "content"])) and not base.holds(table):
        raise DataError(
            f"{output!r} was read from the same files with other options (columns, encoding, format); name the same, "
            "--update to read them anew as a new version, or --overwrite to replace it"
        )
    if not base.holds(table):
        raise DataError(
            f"{output!r} already holds another dataset: {plan.name!r} is not what it was made of. --update makes a new "
            "version of what changed, --append adds this source, --overwrite replaces it; or choose another "
            "--data-cache-dir"
        )


def count_bytes(number: float) -> str:
    """`1.2 GB`, `3.4 MB`, `512 B` (powers of ten)."""
    if number < 1000:
        return f"{number:.0f} B"
    power = min(4, int(math.log10(number) // 3))
    return f"{number / 1000**power:.1f} {'kMGT'[power - 1]}B"
