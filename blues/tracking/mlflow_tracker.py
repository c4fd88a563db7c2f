"""The MLflow run that follows RUN/metrics.jsonl, sent by a thread of its own.

In: the run folder (metrics.jsonl grows there) and calls of `Tracker`. Out: the same in an MLflow run, whenever the
server can be reached; training never waits for it.

Everything to send is on the disk first: metrics in metrics.jsonl, the rest in tracking.json (`Outbox`), with how far
the server has acknowledged. A point carries the time of its line, and MLflow records equal points once, so a request
repeated after a crash changes nothing; after a return to a checkpoint the server is asked which steps it has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from blues.errors import TrackingError
from blues.tracking.destinations import Destination, named
from blues.tracking.mlflow_run import METRICS_PER_REQUEST, MLflowRun, Point, Refused
from blues.tracking.outbox import Entries, Outbox, State, Status, read_state
from blues.tracking.redaction import redact
from blues.tracking.spool import Line, MetricsFile, read_lines

log = logging.getLogger(__name__)

COALESCE_S = 0.5
FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 30.0
FINISH_S = 30.0


class MLflowTracker:
    """Sends a run to MLflow in the background.

    Args:
        run_dir: RUN, whose metrics.jsonl is sent.
        destination: where to; closed by `finish`.
        experiment, run_name, parent_run_id: of the MLflow run.
        metrics: the opened metrics file; None sends what the folder holds, as it is.
        resume_step: as for `Tracking`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        destination: Destination,
        experiment: str,
        run_name: str,
        parent_run_id: str | None = None,
        metrics: MetricsFile | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._metrics_path = self.run_dir / "metrics.jsonl"
        self._destination = destination
        fresh = State(server=destination.name, experiment=experiment, run_name=run_name, parent_run_id=parent_run_id)
        self._outbox = Outbox(self.run_dir / "tracking.json", fresh)
        if metrics is not None:
            self._outbox.rewind(resume_step, metrics.path.stat().st_size, metrics.dropped_from)
        self._reopen = metrics is not None
        self._run: MLflowRun | None = None
        self._uri: str | None = None
        self._away_since: float | None = None
        self._ready, self._wake = threading.Event(), threading.Event()
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._send_until_closed, name="blues-mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run id, once the run exists."""
        return self._outbox.state.run_id

    @property
    def url(self) -> str | None:
        """The run's page, once the run exists on a server with pages."""
        run, uri = self._run, self._uri
        if run is None or uri is None or not uri.startswith("http"):
            return None
        return f"{redact(uri).rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.run_id}"

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait until the run exists on the server; False when it does not within the time."""
        return self._ready.wait(timeout_s)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._outbox.add(Entries(params={name: str(value) for name, value in params.items()}))
        self._wake.set()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._outbox.add(Entries(tags={name: str(value) for name, value in tags.items()}))
        self._wake.set()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """The values are in metrics.jsonl already; send what is new there."""
        self._wake.set()

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self._outbox.add(Entries(artifacts=[[str(Path(path).resolve()), folder]]))
        self._wake.set()

    def finish(self, status: Status = "FINISHED") -> None:
        """Record how the run ended and send the rest, for at most `FINISH_S`; says what could not be sent."""
        self._outbox.add(Entries(status=status))
        self.close(FINISH_S)

    def close(self, timeout_s: float) -> bool:
        """Send the rest for at most `timeout_s` and stop; says what could not be sent. True when nothing is left."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        self._abandoned.set()
        lines, others = self.unsent()
        if lines or others:
            log.warning(
                "MLflow (%s) has not received %d lines of metrics and %d other entries of %s%s. They are kept there; "
                "`blues ui --run %s` sends them, and so does starting the run again.",
                self._destination.name,
                lines,
                others,
                self.run_dir,
                f" ({self._failure})" if self._failure else "",
                self.run_dir,
            )
        self._destination.close()
        self._outbox.close()
        return not (lines or others)

    def unsent(self) -> tuple[int, int]:
        """How many lines of metrics.jsonl, and how many other entries, the server has not acknowledged."""
        state = self._outbox.snapshot()
        return sum(1 for _ in self._unsent_lines(state)), len(state.pending)

    def _send_until_closed(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._abandoned.is_set():
            try:
                if self._run is None:
                    self._connect()
                self._send_once()
            except Exception as error:  # anything MLflow, requests or the disk raise: training must go on
                self._note_away(error)
                self._run = None
                if self._closing.wait(retry_s):
                    self._abandoned.wait(FIRST_RETRY_S)
                retry_s = min(2 * retry_s, LONGEST_RETRY_S)
                continue
            retry_s = FIRST_RETRY_S
            self._note_back()
            if self._closing.is_set():
                if self.unsent() == (0, 0):
                    return
            else:
                self._wake.wait()
                self._wake.clear()
                self._closing.wait(COALESCE_S)  # several metrics of one step travel together

    def _connect(self) -> None:
        uri = self._destination.connect()
        state = self._outbox.snapshot()
        run = MLflowRun(
            uri,
            experiment=state.experiment,
            run_id=state.run_id,
            run_name=state.run_name,
            key=state.key,
            parent_run_id=state.parent_run_id,
            reopen=self._reopen,
        )
        if run.run_id != state.run_id:
            if state.run_id is not None:
                log.warning("MLflow no longer has run %s of %s; it is sent anew", state.run_id, self.run_dir)
            self._outbox.begin_run(run.run_id)
        self._run, self._uri = run, uri
        self._ready.set()

    def _send_once(self) -> None:
        """Everything that is unsent now; the end of the run last."""
        run = self._run
        assert run is not None
        state = self._outbox.snapshot()
        pending, status = state.pending, state.pending.status
        pending.status = None
        if pending.params:
            self._try(run, "parameters", partial(self._send_params, run, pending.params))
        if pending.tags:
            self._try(run, "tags", partial(run.set_tags, pending.tags))
        self._send_metrics(run, state)
        for path, folder in pending.artifacts:
            if Path(path).is_file():
                self._try(run, path, partial(run.log_artifact, path, folder))
            else:
                log.warning("%s is gone and is not sent to MLflow", path)
        if len(pending):
            self._outbox.acknowledge(pending)
        if status is not None:
            self._try(run, f"status {status}", partial(run.end, status))
            self._outbox.acknowledge(Entries(status=status))

    def _send_params(self, run: MLflowRun, params: dict[str, str]) -> None:
        for name, (old, new) in run.log_params(params).items():
            log.warning("MLflow keeps parameter %s=%s of the first start; it is now %s", name, old, new)

    def _send_metrics(self, run: MLflowRun, state: State) -> None:
        for batch in _batches(self._unsent_lines(state)):
            points = [
                Point(name, value, round(1000 * line.time), line.step)
                for line in batch
                for name, value in line.metrics.items()
            ]
            what = f"metrics of steps {batch[0].step} to {batch[-1].step}"
            self._try(run, what, partial(run.log_points, points, state.replay_after))
            self._outbox.acknowledge(sent_bytes=batch[-1].end)

    def _try(self, run: MLflowRun, what: str, send: Callable[[], None]) -> None:
        """What the server will never accept is said and left out, so that the rest still arrives."""
        try:
            send()
        except Refused as error:
            if not run.exists():
                raise
            log.warning("MLflow refuses %s of %s: %s", what, self.run_dir, error)

    def _unsent_lines(self, state: State) -> Iterator[Line]:
        if self._metrics_path.exists():
            yield from read_lines(self._metrics_path, self._start_of_unsent(state))

    def _start_of_unsent(self, state: State) -> int:
        """`sent_bytes`, or 0 when it does not lie between two lines (the file was changed by hand)."""
        if state.sent_bytes == 0:
            return 0
        with open(self._metrics_path, "rb") as file:
            file.seek(state.sent_bytes - 1)
            return state.sent_bytes if file.read(1) == b"\n" else 0

    def _note_away(self, error: Exception) -> None:
        self._failure = redact(" ".join(str(error).split()))[:1000]
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning(
                "MLflow (%s) cannot be reached: %s. The run goes on; its metrics are kept in %s and sent later.",
                self._destination.name,
                self._failure,
                self._metrics_path,
            )

    def _note_back(self) -> None:
        self._failure = ""
        if self._away_since is not None:
            log.warning(
                "MLflow (%s) is back after %.0f s; it has everything.",
                self._destination.name,
                time.monotonic() - self._away_since,
            )
            self._away_since = None


def send_unsent(run_dir: str | Path, timeout_s: float = FINISH_S) -> bool:
    """Send what an ended run could not; True when the server has everything.

    Raises:
        TrackingError: the folder has no MLflow record, or a process is still recording it.
    """
    state = read_state(Path(run_dir) / "tracking.json")
    if state is None:
        raise TrackingError(
            f"{str(run_dir)!r} has no tracking.json, so nothing of it waits for MLflow; give the folder of a run that "
            "was trained with tracking.enabled=true"
        )
    tracker = MLflowTracker(
        run_dir, destination=named(state.server), experiment=state.experiment, run_name=state.run_name
    )
    return tracker.close(timeout_s)


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Consecutive lines that fill about one request."""
    batch: list[Line] = []
    points = 0
    for line in lines:
        if batch and points + len(line.metrics) > METRICS_PER_REQUEST:
            yield batch
            batch, points = [], 0
        batch.append(line)
        points += len(line.metrics)
    if batch:
        yield batch
