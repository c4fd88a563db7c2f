"""Where a run's numbers go: the tracker that training talks to.

In: parameters, tags, metrics by step and files, from the driver process. Out: RUN/metrics.jsonl (the truth, always),
and an MLflow run that follows it (blues/tracking/mlflow_tracker.py) unless tracking is switched off.

    tracker = experiment.tracking.build(run_dir="runs/tiny", run_name="tiny", resume_step=None)
    with tracker:
        tracker.log_params(provenance.params(experiment))
        tracker.log_metrics({"train/loss": 3.2}, step=10)
        tracker.log_artifact("runs/tiny/figures/loss.png", folder="figures")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from blues import config as cfg
from blues.config import Configurable, configclass
from blues.errors import ConfigError
from blues.tracking.destinations import choose
from blues.tracking.mlflow_tracker import MLflowTracker
from blues.tracking.outbox import Status
from blues.tracking.redaction import has_credentials, redact
from blues.tracking.spool import MetricsFile


@runtime_checkable
class Tracker(Protocol):
    """What training needs of a tracker. No method raises because a server is away."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings of the run; a setting keeps its first value."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record facts about the run; a later value replaces an earlier one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a training step. A (metric, step) that already stands is left as it is."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a copy of a file under `folder`; the same name again replaces it."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Say how the run ended. Waits a bounded time for what is still on its way."""


class MemoryTracker:
    """Keeps everything in lists and dicts: for tests and notebooks."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.tags: dict[str, str] = {}
        self.points: dict[tuple[str, int], float] = {}
        self.artifacts: list[tuple[Path, str]] = []
        self.status: Status | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params = {**params, **self.params}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.points.setdefault((name, step), float(value))

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self.artifacts.append((Path(path), folder))

    def finish(self, status: Status = "FINISHED") -> None:
        self.status = status

    def history(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of a metric, in order of steps."""
        return sorted((step, value) for (metric, step), value in self.points.items() if metric == name)


class JsonlTracker:
    """Metrics to RUN/metrics.jsonl, each line on the disk when `log_metrics` returns. The rest has other files."""

    def __init__(self, run_dir: str | Path, *, resume_step: int | None = None) -> None:
        self.file = MetricsFile(Path(run_dir) / "metrics.jsonl", keep_until=resume_step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """RUN/experiment.yaml holds the settings."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """RUN/run.json holds the facts about the run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.file.append(metrics, step)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """The file itself is in the run folder."""

    def finish(self, status: Status = "FINISHED") -> None:
        self.file.close()


class CompositeTracker:
    """Sends everything to each of its trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log_params(self, params: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log_params(params)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        for tracker in self.trackers:
            tracker.set_tags(tags)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log_metrics(metrics, step)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        for tracker in self.trackers:
            tracker.log_artifact(path, folder)

    def finish(self, status: Status = "FINISHED") -> None:
        for tracker in self.trackers:
            tracker.finish(status)


class Tracking(CompositeTracker, Configurable):
    """The tracker of one run: its metrics file and, unless switched off, its MLflow run.

    Args (of `config.build`):
        run_dir: the run folder; must exist or be creatable.
        run_name: the run's name in MLflow.
        resume_step: the checkpoint's step when a run goes on; later lines of metrics.jsonl are dropped, since the
            steps they tell of are trained again. None starts or continues without dropping anything.
        parent_run_id: MLflow id of the run that this one is a part of (a sweep).

    Raises:
        TrackingError: `uri` was asked for explicitly and nothing answers there.
    """

    @configclass
    class Config(cfg.Config):
        uri: str | None = None
        """An MLflow server to use (http://..., or any MLflow tracking URI). None: MLFLOW_TRACKING_URI, or else a
        local server that Blues starts over `directory`. Credentials: MLFLOW_TRACKING_USERNAME and _PASSWORD, or
        MLFLOW_TRACKING_TOKEN."""
        directory: str = "mlflow"
        """Where the local server keeps its database and artifacts; every Blues process over it shares one server."""
        experiment: str = "blues"
        """The MLflow experiment that the run belongs to."""
        enabled: bool = True
        """False: metrics.jsonl only."""

        def __post_init__(self) -> None:
            if self.uri and has_credentials(self.uri):
                raise ConfigError(
                    f"uri {redact(self.uri)!r} holds credentials, which would be saved with the run; leave them out "
                    "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                )
            if not self.experiment.strip():
                raise ConfigError("experiment must not be empty: it names the MLflow experiment")
            if not self.directory.strip():
                raise ConfigError("directory must not be empty: the local MLflow server keeps its database there")

    config: Config

    def __init__(
        self,
        config: Config,
        *,
        run_dir: str | Path,
        run_name: str,
        resume_step: int | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        self.config = config
        destination = choose(config.uri, config.directory) if config.enabled else None
        self.jsonl = JsonlTracker(run_dir, resume_step=resume_step)
        self.mlflow: MLflowTracker | None = None
        if destination is not None:
            self.mlflow = MLflowTracker(
                run_dir,
                destination=destination,
                experiment=config.experiment,
                run_name=run_name,
                parent_run_id=parent_run_id,
                metrics=self.jsonl.file,
                resume_step=resume_step,
            )
        super().__init__([self.jsonl] if self.mlflow is None else [self.jsonl, self.mlflow])
        self.outcome: Status = "FINISHED"
        """How the run ended, for a `with` block that is left without an error."""

    @property
    def url(self) -> str | None:
        """The run's page in the MLflow interface; None while there is none."""
        return self.mlflow.url if self.mlflow else None

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None while there is none."""
        return self.mlflow.run_id if self.mlflow else None

    def wait_until_ready(self, timeout_s: float = 60.0) -> bool:
        """Wait until the MLflow run exists (`run_id`, `url`); False when it does not within the time."""
        return self.mlflow is not None and self.mlflow.wait_until_ready(timeout_s)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish(self.outcome)
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
