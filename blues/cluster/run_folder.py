"""The folder of one run: whose it is, whether this experiment may go on in it, and that one process at a time does.

    RUN/experiment.yaml   the configuration tree          RUN/checkpoints/   step-00000100/, ...
    RUN/run.json          provenance of every start       RUN/figures/       loss curve, expert load
    RUN/metrics.jsonl     every metric, the truth         RUN/logs/          what each worker printed
    RUN/tracking.json     the MLflow run that follows     RUN/specialization/   what each expert learned
    RUN/pruning/          if it began as a pruned model: recipe, losses, figure
    RUN/extension.json    if it extends another run's context: what was measured before and after

In: a path and an experiment. Out: the folder, held for the time of a `with` block, or a sentence why not.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from blues import config as cfg
from blues.errors import ConfigError
from blues.experiment import Experiment

EXPERIMENT, RECORD, METRICS, TRACKING = "experiment.yaml", "run.json", "metrics.jsonl", "tracking.json"
CHECKPOINTS, FIGURES, LOGS, RAY = "checkpoints", "figures", "logs", ".ray"
SPECIALIZATION, PRUNING, EXTENSION = "specialization", "pruning", "extension.json"
DRIVER_LOCK, WORKER_LOCK = ".driver.lock", ".worker.lock"
OWN = (
    EXPERIMENT,
    RECORD,
    METRICS,
    TRACKING,
    CHECKPOINTS,
    FIGURES,
    SPECIALIZATION,
    PRUNING,
    EXTENSION,
    LOGS,
    RAY,
    DRIVER_LOCK,
    WORKER_LOCK,
)

FREE = (
    "data.path",  # what it holds is compared by the checkpoint's data fingerprint, and
    "data.phases",  # so is whether they leave the samples alone that were trained on
    "data.max_cached_batches",
    "data.pin_memory",
    "training.parallel",
    "training.micro_batch_size",
    "training.log_every",
    "training.validate_every",
    "training.validation_samples",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.specialization",
    "training.max_failures",
    "tracking",
    "inference",
    "evaluation",
)
"""What may change between two starts of a run: where, how often, and how the batch is spread. The global batches stay
the same; with another spread router noise is drawn anew, so the weights are as good but not the same bits."""


@contextlib.contextmanager
def hold(
    run_dir: str | Path,
    experiment: Experiment,
    *,
    fresh: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
) -> Iterator[Path]:
    """Make or reopen the folder of a run and keep other processes out of it inside the `with` block.

    The lock is the kernel's: a killed process holds nothing. `fresh` empties the folder of an earlier run first.
    `check` may refuse what it finds in the folder, before this experiment is written into it.

    Raises:
        ConfigError: not a run folder; another process trains in it; it belongs to another configuration (names the
            keys that differ).
    """
    folder = Path(run_dir).resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give --run-dir a folder")
    if folder.is_dir() and not (folder / EXPERIMENT).exists():
        foreign = sorted(child.name for child in folder.iterdir() if child.name not in OWN)
        if foreign:
            raise ConfigError(
                f"{folder} is not a run folder (it has {foreign[0]!r} and no {EXPERIMENT}); give --run-dir a new one"
            )
    if not fresh:
        _check_same(folder, experiment)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / DRIVER_LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another process is training in {folder}; wait for it, or give another --run-dir") from None
    with lock:
        if fresh:
            _empty(folder)
        check(folder)
        cfg.save(experiment, folder / EXPERIMENT)
        yield folder


def worker_lock(folder: Path) -> FileLock:
    """Held by worker 0 while it trains: workers outlive a killed driver by some seconds, and two must not write."""
    return FileLock(folder / WORKER_LOCK, timeout=60)


def _check_same(folder: Path, experiment: Experiment) -> None:
    if not (folder / EXPERIMENT).exists():
        return
    earlier = cfg.read(Experiment, folder / EXPERIMENT)
    changed = {path: values for path, values in cfg.difference(earlier, experiment).items() if not _is_free(path)}
    if changed:
        listed = [f"{path} ({was!r} there, {now!r} here)" for path, (was, now) in changed.items()]
        more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
        raise ConfigError(
            f"{folder} holds a run of another configuration: {', '.join(listed[:4])}{more}; "
            "give another --run-dir, or --fresh to delete that run and start over"
        )


def _is_free(path: str) -> bool:
    return any(path == free or path.startswith(f"{free}.") for free in FREE)


def _empty(folder: Path) -> None:
    """Delete what Blues wrote, and nothing else."""
    for name in OWN:
        path = folder / name
        if name in (DRIVER_LOCK, WORKER_LOCK) or not path.exists():
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
