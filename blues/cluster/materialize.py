"""Writing a mixture out with Ray Data: its shards in parallel, resumable, the same for any number of workers.

In: what is to be merged (`blues.data.merging.merge.combine`), settings, an output directory. Out: a prepared dataset.

Only task numbers pass through Ray's data plane; which documents a shard holds lies once in its object store, and tokens
go from the sources' files to the shard's. On a cluster of several machines all of them must see the datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blues.cluster.pool import map_tasks
from blues.data.merging.materialize import Materialization, Progress, find_present, request_of
from blues.data.merging.merge import Combination
from blues.data.merging.mixed_shards import Settings, ShardWriter
from blues.data.storage.chunks import TOKEN_TYPE
from blues.data.storage.growing import recover, written_at
from blues.data.storage.manifest import partial_directory
from blues.data.storage.store import Store
from blues.data.storage.versions import exclusive
from blues.errors import DataError
from blues.tracking.provenance import code_version

HERE_BYTES = 64 << 20
"""A mixture of no more tokens than this is written without Ray, whose start alone takes longer."""


@dataclass(frozen=True)
class Materialized:
    """What came of it. progress: at the end; None if the dataset was there already."""

    store: Store
    progress: Progress | None


def materialize(
    combined: Combination,
    output: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    num_workers: int | None = None,
    address: str | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Materialized:
    """Write a mixture out at `output`, or go on with one that was interrupted; the same one that is there is left.

    Args:
        overwrite: replace another mixture at `output`, merged or written out (never a prepared dataset).
        num_workers: actors, one CPU each; None for all CPUs of the cluster.
        report: called after every shard.

    Raises:
        DataError: `output` holds something else or is one of the sources, a source is damaged, or the settings do not
            fit the sources.
    """
    output, settings = Path(output), settings or Settings()
    for source in combined.sources:
        if source.store.path.resolve() == output.resolve():
            raise DataError(f"{str(output)!r} is one of the datasets that are merged; choose another directory")
    request = request_of(combined, settings)
    partial = partial_directory(output)
    with exclusive(output):
        recover(output)
        present = find_present(output, request, overwrite)
        if present is not None:
            return Materialized(present, None)
        with written_at(partial):
            work = Materialization(combined, settings, partial)
        report(work.progress())
        missing = work.missing
        size = sum(int(shard.picks["tokens"].sum()) for shard in missing.values()) * TOKEN_TYPE.itemsize
        here = address is None and num_workers is None and size <= HERE_BYTES
        for number, _ in map_tasks(
            ShardWriter, work.worker_arguments, missing, num_workers=num_workers, address=address, here=here
        ):
            work.done(number)
            report(work.progress())
        with written_at(partial):
            store = work.publish(output, code_version())
    return Materialized(store, work.progress())
