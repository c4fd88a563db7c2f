"""Sweeps: Ray Tune over Ray Train, one training run for each point of a space and each seed.

In: an experiment, a `Space`, a number of seeds and a folder. Out: run folders below the sweep's folder, a live table,
one MLflow run with a child for each trial, and the comparison of the finished runs.

    SWEEP/NAME/...          a run folder as `blues train` makes it, one for each trial
    SWEEP/comparison.*      JSON, CSV and PNG

A trial is finished when its run folder says so: the same call again trains what is missing, from each run's newest
checkpoint, and a call with more seeds or points adds to the same folder.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from blues import config as cfg
from blues.cluster import run_folder, session
from blues.cluster.train import run_training
from blues.errors import BluesError, ConfigError
from blues.experiment import Experiment
from blues.tracking import provenance
from blues.tracking.tracker import Tracking
from blues.training.checkpoint import latest_checkpoint, read_checkpoint
from blues.training.observer import Event
from tuning.board import Board
from tuning.compare import Comparison, Run, compare, label
from tuning.figures import draw_comparison
from tuning.spaces import Space

TUNE = ".tune"
"""Ray Tune's own records, below the sweep's folder; nobody needs them afterwards."""

DRIVER = {"node:__internal_head__": 0.001}
"""What a trial's driver takes: no CPU at all, and a place on the head (Tune refuses an empty claim). Were it a
thousandth of a CPU, two workers would not fit on two CPUs any more and the trial would wait for itself."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep. name: also the run folder's."""

    name: str
    experiment: Experiment

    def folder(self, sweep_dir: Path) -> Path:
        return sweep_dir / self.name


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """comparison: of the finished trials; None if there is none. failed: the reason by trial name."""

    sweep_dir: Path
    trials: tuple[Trial, ...]
    failed: dict[str, str]
    comparison: Comparison | None
    files: tuple[Path, ...] = ()
    tracking_url: str | None = None


def plan(base: Experiment, space: Space, *, seeds: int = 1) -> tuple[Trial, ...]:
    """The trials of a sweep: every point with every seed; points that come to the same experiment once.

    Seed i adds i to the seeds of the weights and of the data order, so that variants can be compared seed by seed.

    Raises:
        ConfigError: a point that is no valid experiment (names the point), or no seeds.
    """
    if seeds < 1:
        raise ConfigError(f"a sweep needs at least 1 seed (--seeds), got {seeds}")
    trials: dict[str, Trial] = {}
    for changes in space:
        for seed in range(seeds):
            moved = {
                "training.seed": changes.get("training.seed", base.training.seed) + seed,
                "data.seed": changes.get("data.seed", base.data.seed) + seed,
            }
            try:
                varied = base.override({**changes, **moved})
            except ConfigError as error:
                raise ConfigError(f"search space point {label(changes)!r}: {error}") from None
            name = slug(f"{label(changes) or base.name} seed-{varied.training.seed}")
            if any(trial.experiment.replace(name=varied.name) == varied for trial in trials.values()):
                continue
            name = name if name not in trials else f"{name}-{len(trials)}"
            trials[name] = Trial(name=name, experiment=varied.replace(name=name))
    return tuple(trials.values())


def run_sweep(
    trials: Sequence[Trial],
    sweep_dir: str | Path,
    *,
    name: str = "sweep",
    max_concurrent: int | None = None,
    address: str | None = None,
    out: TextIO | None = None,
) -> SweepResult:
    """Train every trial that is not finished, and compare those that are.

    Args:
        trials: from `plan`.
        name: of the sweep's run in MLflow.
        max_concurrent: trials at a time (None: as many as the cluster has room for).
        address: of a running Ray cluster, see `session.connect`.
        out: where the live table is printed (stdout when None).

    Raises:
        ConfigError: a run folder holds a run of another configuration. DataError: the dataset cannot be used.
        ClusterError: no Ray answers. KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    sweep_dir = Path(sweep_dir).resolve()
    trials = [_placed(trial) for trial in trials]
    _check(trials, sweep_dir)
    board = Board({trial.name: trial.experiment.training.steps for trial in trials}, out=out)
    missing = []
    for trial in trials:
        if is_finished(trial, sweep_dir):
            board.finish(trial.name, "done", **_standing(trial, sweep_dir))
        else:
            missing.append(trial)
    failed: dict[str, str] = {}
    with _parent_run(trials[0].experiment, sweep_dir, name) as parent:
        if missing:
            failed = _tune(missing, sweep_dir, parent.run_id, board, max_concurrent, address)
        runs = [Run.read(trial.folder(sweep_dir)) for trial in trials if is_finished(trial, sweep_dir)]
        comparison = compare(runs) if runs else None
        files: tuple[Path, ...] = ()
        if comparison:
            figure = draw_comparison(comparison, Path(sweep_dir) / "comparison.png")
            files = (*comparison.save(sweep_dir), figure)
        for file in files:
            parent.log_artifact(file, folder="comparison")
        url = parent.url
    return SweepResult(
        sweep_dir=sweep_dir,
        trials=tuple(trials),
        failed=failed,
        comparison=comparison,
        files=files,
        tracking_url=url,
    )


def _placed(trial: Trial) -> Trial:
    """With absolute paths: a trial's driver need not share the working directory of the sweep."""
    experiment = trial.experiment
    places = {"data.path": experiment.data.path, "tracking.directory": experiment.tracking.directory}
    absolute = {path: str(Path(place).resolve()) for path, place in places.items() if place}
    return Trial(name=trial.name, experiment=experiment.override(absolute))


def is_finished(trial: Trial, sweep_dir: Path) -> bool:
    """Whether the trial's run folder holds a good checkpoint of its last step."""
    return _step(trial.folder(sweep_dir)) >= trial.experiment.training.steps


def _step(folder: Path) -> int:
    """The step of the newest good checkpoint of a run folder, 0 without one."""
    newest = latest_checkpoint(folder) if folder.is_dir() else None
    return read_checkpoint(newest, verify=False).step if newest else 0


def _check(trials: Sequence[Trial], sweep_dir: Path) -> None:
    """What would stop a trial stops the sweep before it starts: the dataset, and folders of other runs."""
    if not trials:
        raise ConfigError("the search space has no points")
    for data in dict.fromkeys(trial.experiment.data for trial in trials):
        data.build(split="train")
        data.build(split="validation")
    for trial in trials:
        with run_folder.hold(trial.folder(sweep_dir), trial.experiment):
            continue


def _standing(trial: Trial, sweep_dir: Path) -> dict[str, Any]:
    """The fields of the board's row of a finished trial."""
    run = Run.read(trial.folder(sweep_dir))
    measures = {name: None if math.isnan(value) else value for name, value in run.measures().items()}
    return {
        "step": trial.experiment.training.steps,
        "validation": measures["final_loss"],
        "speed": measures["tokens_per_second"],
        "balance": measures["balance"],
    }


@contextmanager
def _parent_run(experiment: Experiment, sweep_dir: Path, name: str) -> Iterator[Tracking]:
    """The sweep's own run in MLflow: its children are the trials. It holds the server open meanwhile."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with experiment.tracking.build(run_dir=sweep_dir, run_name=name) as parent:
        if experiment.tracking.enabled:
            parent.wait_until_ready()
        parent.log_params(provenance.params(experiment.replace(name=name)))
        parent.set_tags({"blues.kind": "sweep"})
        yield parent


def _tune(
    trials: Sequence[Trial],
    sweep_dir: Path,
    parent_run_id: str | None,
    board: Board,
    max_concurrent: int | None,
    address: str | None,
) -> dict[str, str]:
    """Run these trials under Ray Tune; the reason of each that failed."""
    needed = (trial.experiment.training.parallel for trial in trials)
    cpus = max(os.cpu_count() or 1, *(parallel.num_workers * parallel.cpus_per_worker for parallel in needed))
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's own would swallow Ctrl-C and return
    reasons: dict[str, str] = {}
    with session.connect(address, num_cpus=cpus) as connection:
        from ray import tune

        room = _room(trials, connection.resources)
        tuner = tune.Tuner(
            tune.with_resources(_train_trial, DRIVER),
            param_space={
                "trial": tune.grid_search([{"name": t.name, "tree": cfg.dump(t.experiment)} for t in trials]),
                "sweep_dir": str(sweep_dir),
                "parent_run_id": parent_run_id,
            },
            tune_config=tune.TuneConfig(
                max_concurrent_trials=min(room, max_concurrent or room),
                trial_name_creator=lambda trial: trial.config["trial"]["name"],
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=TUNE, storage_path=str(sweep_dir), callbacks=[_listener(board, reasons)], verbose=0
            ),
        )
        try:
            tuner.fit()
        finally:
            shutil.rmtree(sweep_dir / TUNE, ignore_errors=True)
    unfinished = [trial.name for trial in trials if not is_finished(trial, sweep_dir)]
    return {name: reasons.get(name, "it ended before its last step") for name in unfinished}


def _train_trial(config: dict[str, Any]) -> None:
    """The driver of one trial, in a process of Ray Tune that takes no CPU."""
    from ray import tune

    name, folder = config["trial"]["name"], Path(config["sweep_dir"]) / config["trial"]["name"]
    experiment = cfg.load(Experiment, config["trial"]["tree"])

    def report(event: Event) -> None:
        tune.report({"kind": event.kind, "step": event.step, "metrics": event.metrics})

    try:
        with experiment.tracking.build(
            run_dir=folder, run_name=name, resume_step=_step(folder), parent_run_id=config["parent_run_id"]
        ) as tracker:
            run_training(experiment, folder, tracker=tracker, progress=False, on_event=report)
    except BluesError as error:  # a sentence for the person; Tune would wrap it into a traceback
        tune.report({"kind": "failed", "step": 0, "metrics": {}, "reason": str(error)})


def _listener(board: Board, reasons: dict[str, str]) -> Any:
    """Tells the board what trials report, and keeps the reasons of those that failed."""
    from ray import tune

    class Listener(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            name = trial.config["trial"]["name"]
            if result["kind"] == "failed":
                reasons[name] = result["reason"]
            else:
                board.report(name, result["kind"], result["step"], result["metrics"])

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            name = trial.config["trial"]["name"]
            board.finish(name, "failed" if name in reasons else "done")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            name = trial.config["trial"]["name"]
            lines = [line.strip() for line in str(trial.get_error()).splitlines() if line.strip()]
            reasons[name] = lines[-1] if lines else "its driver died"
            board.finish(name, "failed")

    return Listener()


def _room(trials: Sequence[Trial], resources: Mapping[str, float]) -> int:
    """How many trials' workers the cluster can hold at once; at least one, for a cluster that can still grow."""
    rooms = []
    for parallel in (trial.experiment.training.parallel for trial in trials):
        rooms.append(resources.get("CPU", 0) // (parallel.num_workers * parallel.cpus_per_worker))
        on_cuda = parallel.device == "cuda" or (parallel.device == "auto" and resources.get("GPU", 0) > 0)
        if on_cuda:
            rooms.append(resources.get("GPU", 0) // parallel.num_workers)
    return max(1, int(min(rooms)))


def slug(words: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "-", words).strip("-.")
