"""Training under Ray Train: the driver that starts workers, listens, tracks and shows, and the workers' own part.

In: an `Experiment` and a run folder. Out: a `TrainingResult`; checkpoints, metrics, figures and logs in the folder.

The driver takes no CPU of the cluster. Workers send events through the mailbox; a crash of a worker restarts all of
them from the newest checkpoint (`training.max_failures` times). Ctrl-C, or SIGTERM to this process, lets the workers
save at the next step; a second one aborts. The same call again resumes. Inside a process that is connected to Ray
already, such as a Ray Tune trial, that connection is used and left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch

from blues import config as cfg
from blues import errors
from blues.cluster import run_folder, session
from blues.cluster.progress import Progress, duration
from blues.data.mixture.batches import Mixture
from blues.errors import BluesError, ClusterError, ConfigError
from blues.evaluation.unigram import unigram_entropy
from blues.experiment import Experiment
from blues.tracking import plots, provenance
from blues.tracking.specialization_plots import specialization_figures
from blues.tracking.spool import read_history
from blues.tracking.tracker import Tracker, Tracking
from blues.training.checkpoint import latest_checkpoint, read_checkpoint
from blues.training.observer import Event, Observer

POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run stands. metrics: the newest value of each. interrupted: stopped by Ctrl-C; the same call resumes."""

    run_dir: Path
    step: int
    steps: int
    interrupted: bool
    checkpoint: Path | None
    metrics: dict[str, float]
    figures: list[Path] = field(default_factory=list)
    tracking_url: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.steps


def run_training(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    tracker: Tracker | None = None,
    progress: bool = True,
    on_event: Callable[[Event], None] | None = None,
    address: str | None = None,
    fresh: bool = False,
    out: TextIO | None = None,
) -> TrainingResult:
    """Train in `run_dir`, from its newest checkpoint if it has one.

    Args:
        tracker: where metrics go; None builds `experiment.tracking` and finishes it. A tracker given here is the
            caller's to finish.
        progress: whether to print; `out` says where (stdout when None).
        on_event: called in this process with every event, after it was tracked.
        address: of a running Ray cluster; see `session.connect`.
        fresh: delete an earlier run in the folder first.

    Raises:
        ConfigError: the folder belongs to another run, devices are missing. DataError: the dataset cannot be used.
        CheckpointError: the checkpoint does not fit. ClusterError: Ray or a worker failed for good (names the log).
        KeyboardInterrupt: a second Ctrl-C, or one before training began.
    """
    screen = Progress(experiment.name, experiment.training.steps, out=out) if progress else None
    data = _open_data(experiment)
    if session.resolve(address) == session.LOCAL and not session.is_connected():
        choose_device(experiment, torch.cuda.device_count(), all_there_is=True)  # before anything is written
    start = 0

    def find_start(folder: Path) -> None:
        nonlocal start
        newest = latest_checkpoint(folder, screen.warn if screen else lambda message: None)
        if newest:
            checkpoint = read_checkpoint(newest, verify=False)
            start = checkpoint.step
            samples = start * experiment.training.global_batch_size
            checkpoint.check_data(data.fingerprint_until(samples), samples, cfg.dump(experiment))

    with run_folder.hold(run_dir, experiment, fresh=fresh, check=find_start) as folder:
        if start >= experiment.training.steps:
            return _finished_before(experiment, folder, screen)
        if tracker is not None:
            return _Run(experiment, folder, tracker, screen, on_event, data.fingerprint).execute(address)
        own: Tracking = experiment.tracking.build(run_dir=folder, run_name=experiment.name, resume_step=start)
        with own:
            result = _Run(experiment, folder, own, screen, on_event, data.fingerprint).execute(address)
            if result.interrupted:
                own.outcome = "KILLED"
        return result


def _open_data(experiment: Experiment) -> Mixture:
    """Open both splits here first, where an error is one sentence at once; the training data."""
    data: Mixture = experiment.data.build(split="train")
    if experiment.training.validation_samples:
        experiment.data.build(split="validation")
    return data


def _finished_before(experiment: Experiment, folder: Path, screen: Progress | None) -> TrainingResult:
    steps = experiment.training.steps
    metrics = folder / run_folder.METRICS
    newest = {name: points[-1][1] for name, points in read_history(metrics).items()} if metrics.exists() else {}
    if screen:
        screen.note(f"{folder} has finished its {steps:,} steps; --fresh trains it anew, --run-dir another one")
    return TrainingResult(
        run_dir=folder,
        step=steps,
        steps=steps,
        interrupted=False,
        checkpoint=latest_checkpoint(folder),
        metrics=newest,
        figures=sorted((folder / run_folder.FIGURES).glob("*.png")),
    )


class _Run:
    """One start of a run, on the driver."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        tracker: Tracker,
        screen: Progress | None,
        on_event: Callable[[Event], None] | None,
        fingerprint: str,
    ) -> None:
        self.experiment, self.folder, self.tracker, self.screen = experiment, folder, tracker, screen
        self.on_event, self.fingerprint = on_event, fingerprint
        self.metrics: dict[str, float] = {}
        self.step, self.started = 0, False
        self.began = time.monotonic()
        self.stop_requests = 0

    def execute(self, address: str | None) -> TrainingResult:
        parallel = self.experiment.training.parallel
        cpus = max(os.cpu_count() or 1, parallel.num_workers * parallel.cpus_per_worker)
        if self.screen:
            self.screen.note(f"run folder: {self.folder}")
            self.screen.note(f"starting Ray and {parallel.num_workers} workers, some ten seconds ...")
        # Importing Ray Train takes as long as starting Ray, which mostly waits: do both at once.
        threading.Thread(target=import_module, args=("ray.train.torch",), daemon=True).start()
        # The signals after the connection: starting Ray puts a handler of its own, which dumps core, on SIGTERM.
        with session.connect(address, num_cpus=cpus) as ray_session, self._signals():
            gpus = int(ray_session.resources.get("GPU", 0))
            device = choose_device(self.experiment, gpus, all_there_is=ray_session.one_machine)
            record = provenance.record(
                self.experiment, data_fingerprint=self.fingerprint, device=f"{parallel.num_workers} x {device}"
            )
            provenance.save(self.folder / run_folder.RECORD, record)
            self.tracker.log_params(provenance.params(self.experiment))
            self.tracker.set_tags(provenance.tags(record))
            self.tracker.log_artifact(self.folder / run_folder.EXPERIMENT)
            floor = self._floor()
            self._train(device, one_machine=ray_session.one_machine)
        return self._conclude(floor)

    def _train(self, device: str, *, one_machine: bool) -> None:
        """Run the workers in a thread (Ray would take Ctrl-C from the main one) and listen meanwhile."""
        import ray

        from blues.cluster.mailbox import open_mailbox

        mailbox = open_mailbox()
        outcome: list[BaseException | None] = []

        def fit() -> None:
            try:
                _make_trainer(self.experiment, self.folder, device, mailbox, one_machine=one_machine).fit()
                outcome.append(None)
            except BaseException as error:  # handed to the main thread
                outcome.append(error)

        thread = threading.Thread(target=fit, daemon=True, name="ray-train")
        thread.start()
        handled, asked = 0, False
        while True:
            running = thread.is_alive()
            events, failure = ray.get(mailbox.take.remote(handled))
            for event in events:
                self._handle(event)
            handled += len(events)
            if failure is not None:
                raise getattr(errors, failure[0], BluesError)(failure[1])
            if not running and not events:
                break
            if self.stop_requests and not asked:
                mailbox.request_stop.remote()
                asked = True
            time.sleep(POLL_S if running else 0)
        if outcome[0] is not None:
            raise self._explained(outcome[0]) from outcome[0]
        shutil.rmtree(self.folder / run_folder.RAY, ignore_errors=True)

    def _handle(self, event: Event) -> None:
        """Keep, show and pass on one event."""
        self.started, self.step = True, event.step
        if event.metrics:
            self.metrics |= event.metrics
            self.tracker.log_metrics(event.metrics, event.step)
        if event.kind == "specialization":
            self.tracker.log_artifact(event.details["path"], folder=run_folder.SPECIALIZATION)
            for figure in specialization_figures(self.folder, name=self.experiment.name):
                self.tracker.log_artifact(figure, folder=run_folder.FIGURES)
        if self.screen:
            self.screen.show(event)
        if self.on_event is not None:
            self.on_event(event)

    def _conclude(self, unigram_entropy: float | None) -> TrainingResult:
        """Figures, the last words, the result."""
        drawable = (self.folder / run_folder.METRICS).exists()  # a caller's tracker may keep its metrics elsewhere
        figures = []
        if drawable:
            figures = plots.figures(self.folder, name=self.experiment.name, unigram_entropy=unigram_entropy)
            figures += specialization_figures(self.folder, name=self.experiment.name)
        for figure in figures:
            self.tracker.log_artifact(figure, folder=run_folder.FIGURES)
        steps, taken = self.experiment.training.steps, duration(time.monotonic() - self.began)
        result = TrainingResult(
            run_dir=self.folder,
            step=self.step,
            steps=steps,
            interrupted=self.step < steps,
            checkpoint=latest_checkpoint(self.folder),
            metrics=self.metrics,
            figures=figures,
            tracking_url=getattr(self.tracker, "url", None),
        )
        if self.screen and result.interrupted:
            self.screen.note(f"stopped and saved at step {self.step:,}/{steps:,}; the same command goes on from there")
        elif self.screen:
            self.screen.note(f"finished {steps:,} steps in {taken}; checkpoint: {result.checkpoint}")
        return result

    def _floor(self) -> float | None:
        """The unigram entropy of the held-out text, for the loss curve: what a model without context would reach."""
        if not self.experiment.training.validation_samples:
            return None
        return unigram_entropy(self.experiment.data.path).own

    def _explained(self, error: BaseException) -> BluesError:
        """Which worker failed, with what, and where its log is."""
        failures = getattr(error, "worker_failures", None) or {}
        if not failures:
            return ClusterError(f"training could not run under Ray: {_last_line(error)}")
        rank, cause = sorted(failures.items())[0]
        log = self.folder / run_folder.LOGS / f"worker-{rank}.log"
        return ClusterError(f"training failed on worker {rank}: {_last_line(cause)}; its log: {log}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask to save and stop; the second, or one before the first event, interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(number: int, frame: Any) -> None:
            self.stop_requests += 1
            if self.stop_requests > 1 or not self.started:
                raise KeyboardInterrupt
            if self.screen:
                self.screen.note("stopping: the workers save at the next step (Ctrl-C again aborts without saving)")

        earlier = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, previous in earlier.items():
                signal.signal(number, previous)


def choose_device(experiment: Experiment, gpus: int, *, all_there_is: bool) -> str:
    """What the workers compute on: as configured, `auto` is CUDA if there is any GPU and refused where one may come.

    Args:
        gpus: how many there are now. all_there_is: whether no more will come (this machine, not a growing cluster).

    Raises:
        ConfigError: CUDA, and fewer GPUs than workers; `auto`, and no GPU yet.
    """
    parallel = experiment.training.parallel
    if parallel.device == "auto" and not gpus and not all_there_is:
        raise ConfigError(
            "training.parallel.device=auto: this cluster has no GPU now and may get some when they are asked for; say "
            "training.parallel.device=cuda to wait for them, or training.parallel.device=cpu"
        )
    device = ("cuda" if gpus else "cpu") if parallel.device == "auto" else parallel.device
    if device == "cuda" and gpus < parallel.num_workers and all_there_is:
        raise ConfigError(
            f"training.parallel.device={parallel.device} with num_workers={parallel.num_workers} needs as many GPUs "
            f"and this machine has {gpus}; use training.parallel.device=cpu, fewer workers, or --address of a cluster"
        )
    return device


def _make_trainer(experiment: Experiment, folder: Path, device: str, mailbox: Any, *, one_machine: bool) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from blues.cluster.rendezvous import FileRendezvous

    training = experiment.training
    on_cuda = device == "cuda"
    # The workers need not share the driver's working directory.
    placed = experiment.override(
        {"data.path": str(Path(experiment.data.path).resolve()), "training.parallel.device": device}
    )
    backend, meeting_place = "nccl" if on_cuda else "gloo", folder / run_folder.RAY
    meeting_place.mkdir(exist_ok=True)
    torch_config = TorchConfig(backend=backend)
    if one_machine:
        torch_config = FileRendezvous(backend=backend, folder=str(meeting_place))
    return TorchTrainer(
        _work,
        train_loop_config={
            "tree": cfg.dump(experiment),
            "placed": cfg.dump(placed),
            "folder": str(folder),
            "mailbox": mailbox,
        },
        torch_config=torch_config,
        scaling_config=ScalingConfig(
            num_workers=training.parallel.num_workers,
            use_gpu=on_cuda,
            resources_per_worker={"CPU": training.parallel.cpus_per_worker} | ({"GPU": 1} if on_cuda else {}),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder / run_folder.RAY),
            failure_config=FailureConfig(max_failures=training.max_failures),
        ),
    )


def _work(loop: dict[str, Any]) -> None:
    """One worker: everything it prints goes to its log, what it measures to the mailbox."""
    import ray

    from blues.cluster.mailbox import MailboxObserver

    rank = int(os.environ["RANK"])
    folder, mailbox = Path(loop["folder"]), loop["mailbox"]
    _print_to(folder / run_folder.LOGS / f"worker-{rank}.log")
    observer = MailboxObserver(lambda events: ray.get(mailbox.put.remote(events))) if rank == 0 else Observer()
    try:
        experiment = cfg.load(Experiment, loop["placed"])
        with run_folder.worker_lock(folder) if rank == 0 else contextlib.nullcontext():
            experiment.training.build(
                model=experiment.model.build(seed=experiment.training.seed),
                train_data=experiment.data.build(split="train"),
                validation_data=_validation_data(experiment),
                run_dir=folder,
                tree=loop["tree"],
                observer=observer,
            ).run()
    except BluesError as error:
        traceback.print_exc()
        ray.get(mailbox.fail.remote(type(error).__name__, str(error)))
        raise
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        if isinstance(observer, MailboxObserver):
            observer.close()


def _validation_data(experiment: Experiment) -> Any:
    return experiment.data.build(split="validation") if experiment.training.validation_samples else None


def _print_to(path: Path) -> None:
    """Let this process write to `path` what it prints, libraries and native code included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _last_line(error: BaseException) -> str:
    """The line of a (remote) traceback that says what went wrong."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
