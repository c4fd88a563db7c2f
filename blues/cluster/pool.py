"""Many tasks on a pool of Ray Data actors: how datasets are prepared, compared and written in parallel.

In: a worker class, the arguments of its construction, tasks by number. Out: each task's result as soon as it is done.

A worker is made once in each actor, so that what is costly to load is loaded once. Only task numbers and results pass
through Ray's data plane, and the tasks themselves lie once in its object store: memory does not grow with their number
or with what they read. Work that is too small to be worth a cluster's start is done in this process instead.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from blues.cluster import session
from blues.errors import BluesError, DataError

Worker = Callable[[int, Any], Any]
"""Called with a task's number and the task; returns something small."""

MOST_BLOCKS = 512
"""Task numbers come in blocks, of one task where there are no more than this: who is done first takes the next one."""


def modules_of(make: Callable[..., Worker]) -> Sequence[str]:
    """What an actor imports before it can make a worker, for `session.connect`."""
    return "ray.data", make.__module__


def map_tasks(
    make: Callable[..., Worker],
    arguments: tuple[Any, ...],
    tasks: Mapping[int, Any],
    *,
    num_workers: int | None = None,
    address: str | None = None,
    here: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Do all tasks, and yield (number, result) of each in the order in which they end.

    Args:
        make: class (or function) that makes a worker of `arguments`; both must pickle.
        num_workers: actors, one CPU each; None for all CPUs of the cluster.
        here: do them one after the other in this process, without Ray.

    Raises:
        BluesError: what a worker raised (a `DataError` with its sentence if it was raised in another process).
    """
    if not tasks:
        return
    if here:
        worker = make(*arguments)
        for number, task in tasks.items():
            yield number, worker(number, task)
        return
    with session.connect(address, num_cpus=num_workers, preload=modules_of(make)) as connected:
        workers = min(num_workers or max(1, int(connected.resources.get("CPU", 1))), len(tasks))
        # Ray warns on the terminal of every actor it may restart; on one machine none needs to be.
        restarts = {"max_restarts": 0} if connected.one_machine else {}
        yield from _stream(make, arguments, tasks, workers, restarts)


def _stream(
    make: Callable[..., Worker],
    arguments: tuple[Any, ...],
    tasks: Mapping[int, Any],
    workers: int,
    options: dict[str, Any],
) -> Iterator[tuple[int, Any]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the caller says how far it is
    with _settings(ray.data.DataContext.get_current()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 has no other way yet to pass `max_restarts`
        blocks = min(len(tasks), max(MOST_BLOCKS, 16 * workers))
        dataset = ray.data.from_items([{"task": number} for number in tasks], override_num_blocks=blocks)
        done = dataset.map_batches(
            cast(Any, _Actor),
            fn_constructor_args=(make, arguments),
            fn_kwargs={"tasks": ray.put(dict(tasks))},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            **options,
        )
    for block in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):  # none is held back
        for row in cast(pa.Table, block).to_pylist():
            if row["error"]:
                raise DataError(row["error"])
            yield row["task"], pickle.loads(row["result"])


@contextlib.contextmanager
def _settings(context: Any) -> Iterator[None]:
    """Settings for the datasets that are made inside the block, which keep them.

    target_max_block_size: of the results. Each is handed on when it is there, not with others that follow."""
    ours = {"enable_progress_bars": False, "print_on_execution_start": False, "target_max_block_size": 1}
    before = {name: getattr(context, name) for name in ours}
    for name, value in ours.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


class _Actor:
    """Holds one worker. Errors that are meant for a person come back as their sentence, others as Ray's."""

    def __init__(self, make: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
        self.worker = make(*arguments)
        self.tasks: dict[int, Any] | None = None

    def __call__(self, batch: dict[str, Any], tasks: Any) -> dict[str, Any]:
        import ray

        if self.tasks is None:  # fetched once, not for every task
            self.tasks = ray.get(tasks) if isinstance(tasks, ray.ObjectRef) else tasks
        number = int(batch["task"][0])
        try:
            result, error = self.worker(number, self.tasks[number]), ""
        except BluesError as problem:
            result, error = None, str(problem)
        return {"task": [number], "result": [pickle.dumps(result)], "error": [error]}
