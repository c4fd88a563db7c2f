"""One MLflow run as plain calls, within MLflow's limits on names, lengths and sizes of requests.

In: a tracking URI and what to record. Out: requests to the server; each call returns when the server has answered,
raises when it has not, and can be repeated without recording anything twice.

The only module that imports mlflow into a Blues process (the local server is its own process).
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from blues.tracking.redaction import redact

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
KEY_LENGTH = 250
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
PERMANENT = frozenset({400, 404, 413})
"""HTTP answers that stay the same however often one asks."""
KEY_TAG = "blues.key"


@dataclass(frozen=True)
class Point:
    """A value of a metric. `time` in milliseconds since 1970 is part of its identity for MLflow."""

    name: str
    value: float
    time: int
    step: int


class Refused(Exception):
    """The server understood the request and will never accept it."""


class MLflowRun:
    """A run on a server, found by `run_id` or `key`, or made.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the experiment; made when absent.
        run_id: the run to go on with. One that the server does not have (any more) is made anew.
        key: identifies the run where there is no id yet.
        reopen: the run goes on: one that had ended is running again.

    Raises:
        Refused: the server rejects the experiment or run.
        Exception: the server cannot be reached (MLflow's and requests' exceptions).
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        run_id: str | None,
        run_name: str,
        key: str,
        parent_run_id: str | None = None,
        reopen: bool = True,
    ) -> None:
        self._client = client(uri)
        self._histories: dict[str, set[int]] = {}
        experiment_id = self._experiment(experiment)
        run = self._get(run_id) if run_id else None
        if run is None:
            found = self._call("search_runs", [experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
            run = found[0] if found else None
        if run is None:
            tags = {KEY_TAG: key}
            if parent_run_id:
                tags["mlflow.parentRunId"] = parent_run_id
            run = self._call("create_run", experiment_id, run_name=run_name, tags=tags)
        elif reopen and run.info.status != "RUNNING":
            self._call("update_run", run.info.run_id, status="RUNNING")
        self.run_id: str = run.info.run_id
        self.experiment_id = experiment_id
        self._params = dict(run.data.params)

    def log_points(self, points: Iterable[Point], replay_after: int | None = None) -> None:
        """Record points. Those of steps after `replay_after` that the server already has are left out.

        A point equal in name, step, time and value to a recorded one is recorded once (MLflow's own rule).
        """
        from mlflow.entities import Metric

        metrics = []
        for point in points:
            name = legal_name(point.name)
            if replay_after is None or point.step <= replay_after or point.step not in self._recorded_steps(name):
                metrics.append(Metric(name, point.value, point.time, point.step))
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            self._call("log_batch", self.run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])

    def log_params(self, params: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Record parameters that the run does not have yet.

        Returns those that it has with another value, as {name: (recorded, refused)}: MLflow never changes one.
        """
        from mlflow.entities import Param

        wanted = {legal_name(name): value[:PARAM_LENGTH] for name, value in params.items()}
        fresh = [Param(name, value) for name, value in wanted.items() if name not in self._params]
        for start in range(0, len(fresh), PARAMS_PER_REQUEST):
            self._call("log_batch", self.run_id, params=fresh[start : start + PARAMS_PER_REQUEST])
        self._params.update({param.key: param.value for param in fresh})
        return {name: (self._params[name], value) for name, value in wanted.items() if self._params[name] != value}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record or replace tags."""
        from mlflow.entities import RunTag

        entities = [RunTag(legal_name(name), value[:TAG_LENGTH]) for name, value in tags.items()]
        for start in range(0, len(entities), PARAMS_PER_REQUEST):
            self._call("log_batch", self.run_id, tags=entities[start : start + PARAMS_PER_REQUEST])

    def log_artifact(self, path: str | Path, folder: str) -> None:
        """Upload a file under `folder`, replacing one of the same name."""
        self._call("log_artifact", self.run_id, str(path), legal_name(folder) if folder else None)

    def end(self, status: str) -> None:
        """Record how the run ended."""
        self._call("set_terminated", self.run_id, status=status)

    def exists(self) -> bool:
        """Whether the server still has the run (a person may have deleted it)."""
        return self._get(self.run_id) is not None

    def _experiment(self, name: str) -> str:
        found = self._call("get_experiment_by_name", name)
        if found is None:
            try:
                return self._call("create_experiment", name)
            except Refused:  # another process made it in between
                found = self._call("get_experiment_by_name", name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._call("restore_experiment", found.experiment_id)
        return found.experiment_id

    def _get(self, run_id: str) -> Any:
        try:
            run = self._call("get_run", run_id)
        except Refused:
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _recorded_steps(self, name: str) -> set[int]:
        if name not in self._histories:
            self._histories[name] = {metric.step for metric in self._call("get_metric_history", self.run_id, name)}
        return self._histories[name]

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return getattr(self._client, method)(*args, **kwargs)
        except (MlflowException, requests.HTTPError) as error:  # the second from uploads
            if _http_status(error) in PERMANENT:
                raise Refused(redact(" ".join(str(error).split()))) from None
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise Refused(f"{error.strerror}: {error.filename}") from None


def client(uri: str) -> Any:
    """An `MlflowClient` that answers or fails within seconds instead of retrying for minutes; no telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # Blues prints the run's page itself
    # The sending thread retries by itself, and says so; MLflow's own retries would hide an outage for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    if urllib.parse.urlsplit(uri).hostname == "127.0.0.1":
        _bypass_proxy("127.0.0.1")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _http_status(error: Any) -> int | None:
    """Of MLflow's exceptions and of requests'."""
    response = getattr(error, "response", None)
    return response.status_code if response is not None else getattr(error, "get_http_status_code", lambda: None)()


def legal_name(name: str) -> str:
    """The nearest name that MLflow accepts for a metric, parameter or tag."""
    parts = [re.sub(r"[^\w .:-]", "_", part) for part in name.split("/")]
    parts = [part for part in parts if part not in ("", ".", "..")]
    return "/".join(parts)[:KEY_LENGTH].rstrip("/") or "_"


def _bypass_proxy(host: str) -> None:
    for variable in ("no_proxy", "NO_PROXY"):
        hosts = [entry for entry in os.environ.get(variable, "").split(",") if entry]
        if host not in hosts:
            os.environ[variable] = ",".join([*hosts, host])
