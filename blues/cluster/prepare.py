"""Preparing a dataset with Ray Data: files to chunks of tokens, in parallel, resumable, the same for any parallelism.

In: a `Plan` of source files, a tokenizer, an output directory. Out: a dataset directory (see `blues.data.store`).

The plan's tasks are the rows of a Ray dataset; a pool of actors, each with its tokenizer loaded once, reads, tokenizes
and writes one task after the other. Only task numbers and counts travel through Ray, never text or tokens, so memory
stays at one document per actor however large the source is. The dataset grows beside its final name and gets it in the
end by one rename. On a cluster of several machines source and output must be on a file system that all of them see.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from blues import config as cfg
from blues.cluster import session
from blues.data import store as st
from blues.data.chunks import CHUNKS, ChunkRecord
from blues.data.manifest import MANIFEST, MIXTURE, encode_json, partial_directory
from blues.data.shards import TASKS, Recipe, Split, TaskResult, rejected_file, rejected_line, result_file, run_task
from blues.data.sources import Plan
from blues.data.tokenizer import Tokenizer
from blues.data.versions import Draft, write_version
from blues.errors import BluesError, DataError

REQUEST = "request.json"
"""In a growing dataset: what is being made of what, so that only the same command goes on with it."""

Report = Callable[["Prepared"], None]


@dataclass(frozen=True)
class Prepared:
    """How far it is: tasks and source bytes done, of all; what came of them. `resumed` and `bytes_resumed`: what an
    earlier run did. `seconds` of this run, the start of Ray included."""

    tasks: int
    tasks_done: int
    bytes: int
    bytes_done: int
    documents: int
    tokens: int
    rejected: int
    resumed: int
    bytes_resumed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Source bytes per second of this run."""
        return (self.bytes_done - self.bytes_resumed) / max(self.seconds, 1e-9)


def prepare(
    plan: Plan,
    output: str | Path,
    tokenizer: Tokenizer.Config,
    *,
    validation_fraction: float = 0.05,
    num_workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    report: Report = lambda _: None,
) -> st.Store:
    """Make the dataset `output`, or go on with one that was interrupted; one that is there already is left as it is.

    Args:
        validation_fraction: share of the documents held out as the split `validation`, chosen by a hash of their ids;
            each split gets at least one document if there are two or more (of different ids) and the share is positive,
            and a document that is alone is for training.
        num_workers: actors, one CPU each; None for all CPUs of the cluster.
        overwrite: replace another dataset at `output`.
        report: called after every task.

    Raises:
        DataError: `output` holds something else, a source cannot be read, or no document came of it.
    """
    output = Path(output)
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation fraction {validation_fraction} is not a share; give a number in [0, 1)")
    request = _request(plan, tokenizer, validation_fraction)
    if _is_there(output, request, overwrite):
        return st.Store.open(output)
    partial = partial_directory(output)
    _make_writable(partial.parent)
    lock = FileLock(partial.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"another process is preparing {str(output)!r}; wait for it, or choose another name") from None
    try:
        _open_partial(partial, request)
        work = _Work(plan, partial, tokenizer, Split.fraction(validation_fraction), report)
        work.run(num_workers, address)
        if validation_fraction:
            work.fill_splits()
        work.finish(request)
        _publish(partial, output)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
    return st.Store.open(output)


class _Work:
    """The tasks of one dataset and their results."""

    def __init__(self, plan: Plan, partial: Path, tokenizer: Tokenizer.Config, split: Split, report: Report) -> None:
        self.plan, self.partial, self.tokenizer, self.split, self.report = plan, partial, tokenizer, split, report
        self.tasks = plan.tasks()
        self.began = time.monotonic()
        found = ((number, TaskResult.read(partial, number)) for number in range(len(self.tasks)))
        self.results: dict[int, TaskResult] = {number: result for number, result in found if result is not None}
        self.resumed = set(self.results)

    def run(self, num_workers: int | None, address: str | None) -> None:
        """Do what is not done yet."""
        missing = [number for number in range(len(self.tasks)) if number not in self.results]
        self.report(self.state())
        if not missing:
            return
        with session.connect(address, num_cpus=num_workers) as connected:
            workers = num_workers or max(1, int(connected.resources.get("CPU", 1)))
            # Ray warns on the terminal of every actor it may restart; on one machine none needs to be.
            restarts = {"max_restarts": 0} if connected.one_machine else {}
            for number, result in self._map(missing, min(workers, len(missing)), restarts):
                self.results[number] = result
                self.report(self.state())

    def _map(self, numbers: Sequence[int], workers: int, options: dict[str, Any]) -> Iterator[tuple[int, TaskResult]]:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the caller's report says how far it is
        dataset = ray.data.from_items(
            [{"task": number} for number in numbers], override_num_blocks=min(len(numbers), 16 * workers)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray 2.60 has no other way yet to pass `max_restarts`
            done = dataset.map_batches(
                cast(Any, _Worker),
                fn_constructor_args=(self.partial.absolute(), self.plan.root.absolute(), self.tokenizer, self.split),
                fn_kwargs={"tasks": ray.put(self.tasks)},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=1,
                **options,
            )
        for row in done.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            number = int(row["task"])
            result = TaskResult.read(self.partial, number)
            if result is None:
                raise DataError(
                    f"task {number} was done elsewhere and its files are not at {str(self.partial)!r}; source and "
                    "output must lie on a file system that every machine of the cluster sees"
                )
            yield number, result

    def fill_splits(self) -> None:
        """Move the border to the nearest id where a small dataset left a split empty, and redo the tasks it crosses.

        Decided by the ids alone, not by what lies in the splits by now: an interrupted move is finished, not mistaken
        for an ordinary split.
        """
        extremes = {
            task: (result.lowest, result.highest)
            for task, result in self.results.items()
            if result.lowest is not None and result.highest is not None
        }
        lowest = min((low for low, _ in extremes.values()), default=0)
        highest = max((high for _, high in extremes.values()), default=0)
        if lowest == highest:
            split = Split(0)  # one id, so nothing can be held out without being trained on
        elif self.split.of(lowest) != "validation":
            split = Split(lowest + 1)
        elif self.split.of(highest) != "train":
            split = Split(highest)
        else:
            return
        for task, (low, high) in extremes.items():
            if {chunk.split for chunk in self.results[task].chunks} != {split.of(low), split.of(high)}:
                self._discard(task)
                self.results[task] = run_task(
                    self.partial, task, self.plan.root, self.tasks[task], self.tokenizer.build(), Recipe(split)
                )

    def _discard(self, task: int) -> None:
        result_file(self.partial, task).unlink()
        for chunk in self.results[task].chunks:
            for record in (chunk.data, chunk.index):
                (self.partial / record.file).unlink()

    def finish(self, request: dict[str, Any]) -> None:
        """Join the rejected rows, remove what only the making needed, write the manifest."""
        ordered = [self.results[number] for number in range(len(self.tasks))]
        rejected = Counter(record.reason for record in self.plan.rejected)
        for result in ordered:
            rejected.update(result.rejected)
        if not any(result.documents for result in ordered):
            sentence = _nothing_usable(self.plan, rejected, self.partial, len(ordered))
            shutil.rmtree(self.partial)  # there is nothing to go on with
            raise DataError(sentence)
        chunks = [chunk for result in ordered for chunk in result.chunks]
        lines = [rejected_line(record) for record in self.plan.rejected]
        content = b"".join([*lines, *(rejected_file(self.partial, n).read_bytes() for n in range(len(ordered)))])
        draft = Draft(
            tokenizer=self.tokenizer,
            operation={"kind": "prepare"},
            chunks={split: [chunk for chunk in chunks if chunk.split == split] for split in st.SPLITS},
            settings=request["settings"],
            sources=[request["source"]],
            rejected=rejected,
            quarantine=content,
        )
        write_version(self.partial, 1, draft)
        self._remove_leftovers(chunks)
        shutil.rmtree(self.partial / TASKS)
        (self.partial / REQUEST).unlink()

    def _remove_leftovers(self, chunks: Sequence[ChunkRecord]) -> None:
        """Half-written files of workers that were killed."""
        whole = {record.file for chunk in chunks for record in (chunk.data, chunk.index)}
        for path in (self.partial / CHUNKS).iterdir():
            if path.relative_to(self.partial).as_posix() not in whole:
                path.unlink(missing_ok=True)

    def state(self) -> Prepared:
        """How far it is."""
        weights = [sum(part.bytes for part in task) for task in self.tasks]
        return Prepared(
            tasks=len(self.tasks),
            tasks_done=len(self.results),
            bytes=sum(weights),
            bytes_done=sum(weights[number] for number in self.results),
            documents=sum(result.documents for result in self.results.values()),
            tokens=sum(result.tokens for result in self.results.values()),
            rejected=sum(sum(result.rejected.values()) for result in self.results.values()),
            resumed=len(self.resumed),
            bytes_resumed=sum(weights[number] for number in self.resumed),
            seconds=time.monotonic() - self.began,
        )


class _Worker:
    """An actor of the pool."""

    def __init__(self, partial: Path, root: Path, tokenizer: Tokenizer.Config, split: Split) -> None:
        self.partial, self.root, self.split = partial, root, split
        self.tokenizer = tokenizer.build()

    def __call__(self, batch: dict[str, Any], tasks: Any) -> dict[str, Any]:
        import ray

        if isinstance(tasks, ray.ObjectRef):
            tasks = ray.get(tasks)
        number, error = int(batch["task"][0]), ""
        try:
            run_task(self.partial, number, self.root, tasks[number], self.tokenizer, Recipe(self.split))
        except BluesError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"cannot write {str(self.partial)!r}: {problem.strerror}; check its permissions and free space"
        return {"task": [number], "error": [error]}


def _request(plan: Plan, tokenizer: Tokenizer.Config, validation_fraction: float) -> dict[str, Any]:
    """What decides the content of the dataset: equal requests give equal datasets."""
    columns = sorted({(part.kind, part.text_column, part.id_column) for part in plan.parts}, key=str)
    return {
        "settings": {
            "validation_fraction": validation_fraction,
            "formats": [dict(zip(("kind", "text_column", "id_column"), names, strict=True)) for names in columns],
        },
        "source": {
            "name": plan.name,
            "files": plan.files,
            "bytes": plan.bytes,
            "ignored": plan.ignored,
            "xxh3": plan.content,
        },
        "tokenizer": cfg.dump(tokenizer),
    }


def _is_there(output: Path, request: dict[str, Any], overwrite: bool) -> bool:
    """Whether this very dataset is there already.

    Raises:
        DataError: something else is.
    """
    if output.is_file():
        raise DataError(f"{str(output)!r} is a file; choose a directory for the dataset")
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / MANIFEST).exists():
        kind = "a merged dataset" if (output / MIXTURE).exists() else "something else"
        raise DataError(f"{str(output)!r} already holds {kind}; choose another --data-cache-dir")
    if overwrite:
        return False
    manifest = st.Store.open(output).manifest
    present = {"settings": manifest["settings"], "source": manifest["sources"][0]}
    present["tokenizer"] = manifest["tokenizer"]["config"]
    if present == request:
        return True
    differing = ", ".join(key for key in request if present[key] != request[key])
    raise DataError(
        f"{str(output)!r} already holds another dataset (other {differing}); choose another --data-cache-dir, or "
        "--overwrite to replace it"
    )


def _open_partial(partial: Path, request: dict[str, Any]) -> None:
    """The growing dataset of this request; one of another request is started anew."""
    try:
        same = json.loads((partial / REQUEST).read_bytes()) == request
    except (OSError, ValueError):
        same = False
    if same:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    cfg.write_atomic(partial / REQUEST, encode_json(request))


def _make_writable(folder: Path) -> None:
    """Make a folder, and be sure that files can be made in it (a lock that cannot be made looks like one that is held).

    Raises:
        DataError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"cannot write into {str(folder)!r} ({error.strerror}); choose another place for the dataset"
        ) from None


def _publish(partial: Path, output: Path) -> None:
    """Give the finished dataset its name. One that is replaced stays whole until the new one takes its place."""
    replaced = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _nothing_usable(plan: Plan, rejected: Counter[str], partial: Path, tasks: int) -> str:
    """Why no document came of the source, with the first rejected row."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common(3))
    example = ""
    for number in range(tasks):
        first = rejected_file(partial, number).read_bytes().partition(b"\n")[0]
        if first:
            row = json.loads(first)
            place = row["file"] if row["row"] is None else f"{row['file']} row {row['row']}"
            example = f"; first: {place}: {' '.join((row['reason'], row.get('detail', ''))).strip()}"
            break
    total = sum(rejected.values())
    if not total:
        return f"{plan.name!r} holds no rows; nothing was prepared"
    return f"none of the {total:,} rows of {plan.name!r} can be used ({reasons}{example}); mend the source"


def count_bytes(number: float) -> str:
    """`1.2 GB`, `3.4 MB`, `512 B` (powers of ten)."""
    if number < 1000:
        return f"{number:.0f} B"
    power = min(4, int(math.log10(number) // 3))
    return f"{number / 1000**power:.1f} {'kMGT'[power - 1]}B"
