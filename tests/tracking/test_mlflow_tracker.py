"""The MLflow run follows metrics.jsonl: outages, kills, returns to a checkpoint; training never waits."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from blues.errors import TrackingError
from blues.tracking import mlflow_run, mlflow_tracker
from blues.tracking.destinations import RemoteDestination
from blues.tracking.mlflow_tracker import MLflowTracker, send_unsent
from blues.tracking.server import LocalServer
from blues.tracking.spool import MetricsFile, read_lines
from blues.tracking.tracker import JsonlTracker


class Switch:
    """A destination that is away until it is switched on."""

    def __init__(self, url: str, on: bool = False) -> None:
        self.name, self.url, self.on = url, url, on

    def connect(self) -> str:
        return self.url if self.on else "http://127.0.0.1:9"  # the discard port: nobody listens

    def close(self) -> None:
        pass


@pytest.fixture
def client(server: LocalServer) -> MlflowClient:
    return MlflowClient(server.url)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "COALESCE_S", 0.05)
    monkeypatch.setattr(mlflow_tracker, "FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(mlflow_tracker, "LONGEST_RETRY_S", 0.2)


def start(run_dir: Path, destination, resume_step: int | None = None) -> tuple[JsonlTracker, MLflowTracker]:
    spool = JsonlTracker(run_dir, resume_step=resume_step)
    follower = MLflowTracker(
        run_dir, destination=destination, experiment="follow", run_name="r", metrics=spool.file, resume_step=resume_step
    )
    return spool, follower


def log(trackers: tuple[JsonlTracker, MLflowTracker], steps: range, scale: float = 1.0) -> None:
    for step in steps:
        for tracker in trackers:
            tracker.log_metrics({"train/loss": scale * step}, step)


def history(client: MlflowClient, run_id: str | None) -> list[tuple[int, float]]:
    assert run_id is not None
    return [(point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")]


def test_everything_arrives(server: LocalServer, client: MlflowClient, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    trackers = start(run_dir, RemoteDestination(server.url))
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"picture")
    trackers[1].log_params({"model.dim": 64, "seed": None})
    trackers[1].set_tags({"blues.data": "abc"})
    log(trackers, range(1, 40))
    trackers[1].log_artifact(picture, "figures")
    trackers[1].log_artifact(tmp_path / "gone.png")
    trackers[1].finish("FINISHED")
    run = client.get_run(trackers[1].run_id)
    assert history(client, trackers[1].run_id) == [(step, float(step)) for step in range(1, 40)]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model.dim": "64", "seed": "None"}
    assert run.data.tags["blues.data"] == "abc"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/loss.png"]
    assert trackers[1].url == f"{server.url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    (line,) = [line for line in read_lines(run_dir / "metrics.jsonl") if line.step == 7]
    assert client.get_metric_history(run.info.run_id, "train/loss")[6].timestamp == round(1000 * line.time)


def test_an_outage_costs_nothing_but_one_warning_and_is_made_up(
    server: LocalServer, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    destination = Switch(server.url)
    with caplog.at_level(logging.WARNING, "blues.tracking"):
        began = time.monotonic()
        trackers = start(tmp_path, destination)
        log(trackers, range(1, 60))
        trackers[1].log_params({"a": 1})
        assert time.monotonic() - began < 2.0
        assert not trackers[1].wait_until_ready(1.0)
        assert [record.message for record in caplog.records if "cannot be reached" in record.message] == [
            caplog.records[0].message
        ]
        assert "The run goes on" in caplog.text
        destination.on = True
        assert trackers[1].wait_until_ready(20)
        log(trackers, range(60, 70))
        trackers[1].finish()
    assert [record.message for record in caplog.records][-1].endswith("it has everything.")
    assert len(caplog.records) == 2
    assert history(client, trackers[1].run_id) == [(step, float(step)) for step in range(1, 70)]


def test_what_could_not_be_sent_is_said_and_sent_later(
    server: LocalServer,
    client: MlflowClient,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlflow_tracker, "FINISH_S", 0.5)
    trackers = start(tmp_path, Switch(server.url))
    log(trackers, range(1, 4))
    began = time.monotonic()
    trackers[1].finish("FAILED")
    assert time.monotonic() - began < 5
    assert "has not received 3 lines of metrics and 1 other entries" in caplog.text
    assert f"`blues ui --run {tmp_path}`" in caplog.text
    assert trackers[1].run_id is None
    assert send_unsent(tmp_path, timeout_s=20)
    (run,) = client.search_runs([client.get_experiment_by_name("follow").experiment_id], max_results=1)
    assert run.info.status == "FAILED"
    assert history(client, run.info.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert send_unsent(tmp_path, timeout_s=20)  # nothing is left: nothing changes
    assert client.get_run(run.info.run_id).info.status == "FAILED"
    with pytest.raises(TrackingError, match="no tracking.json"):
        send_unsent(tmp_path / "elsewhere")


def test_resuming_from_a_checkpoint_leaves_each_point_once_on_both_sides(
    server: LocalServer, client: MlflowClient, tmp_path: Path
) -> None:
    first = start(tmp_path, RemoteDestination(server.url))
    log(first, range(1, 9))
    first[1].finish("KILLED")
    second = start(tmp_path, RemoteDestination(server.url), resume_step=5)
    log(second, range(6, 13), scale=10.0)
    second[1].finish()
    assert second[1].run_id == first[1].run_id
    assert [line.step for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 13))
    points = history(client, second[1].run_id)
    assert [step for step, _ in points] == list(range(1, 13))
    assert dict(points)[12] == 120.0
    assert client.get_run(second[1].run_id).info.status == "FINISHED"


def test_a_kill_between_answer_and_acknowledgement_duplicates_nothing(
    server: LocalServer, client: MlflowClient, tmp_path: Path
) -> None:
    first = start(tmp_path, RemoteDestination(server.url))
    log(first, range(1, 9))
    first[1].finish()
    with open(tmp_path / "tracking.json", "r+") as file:  # as if the last acknowledgements were never written
        text = file.read().replace(f'"sent_bytes": {(tmp_path / "metrics.jsonl").stat().st_size}', '"sent_bytes": 0')
        assert '"sent_bytes": 0' in text
        file.seek(0)
        file.write(text)
        file.truncate()
    second = start(tmp_path, RemoteDestination(server.url))
    log(second, range(9, 11))
    second[1].finish()
    assert [step for step, _ in history(client, first[1].run_id)] == list(range(1, 11))


def test_sigkill_of_the_run_loses_and_doubles_nothing(
    server: LocalServer, client: MlflowClient, tmp_path: Path
) -> None:
    program = (
        "import sys, itertools; from blues.tracking.tracker import Tracking\n"
        "config = Tracking.Config(uri=sys.argv[2], experiment='kill')\n"
        "t = config.build(run_dir=sys.argv[1], run_name='r', resume_step=0)\n"
        "t.wait_until_ready(60)\n"
        "for step in itertools.count(1):\n"
        "    t.log_metrics({'train/loss': step}, step); print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), server.url]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(500):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    MetricsFile(tmp_path / "metrics.jsonl").close()  # cuts the torn line, as the next start does
    steps = [line.step for line in read_lines(tmp_path / "metrics.jsonl")]
    assert send_unsent(tmp_path, timeout_s=60)
    (run,) = client.search_runs([client.get_experiment_by_name("kill").experiment_id])
    assert history(client, run.info.run_id) == [(step, float(step)) for step in steps]


def test_a_run_deleted_meanwhile_is_sent_anew(
    server: LocalServer, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = start(tmp_path, RemoteDestination(server.url))
    trackers[1].log_params({"a": 1})
    log(trackers, range(1, 4))
    assert trackers[1].wait_until_ready(20)
    first = trackers[1].run_id
    assert first is not None
    while trackers[1].unsent() != (0, 0):
        time.sleep(0.02)
    client.delete_run(first)
    log(trackers, range(4, 6))
    trackers[1].finish()
    assert trackers[1].run_id != first
    assert len(history(client, trackers[1].run_id)) == 5
    assert client.get_run(trackers[1].run_id).data.params == {"a": "1"}
    assert "no longer has run" in caplog.text


def test_a_changed_parameter_is_said_and_the_first_value_kept(
    server: LocalServer, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for value in (1, 2):
        trackers = start(tmp_path, RemoteDestination(server.url))
        trackers[1].log_params({"training.log_every": value})
        trackers[1].finish()
    assert client.get_run(trackers[1].run_id).data.params == {"training.log_every": "1"}
    assert "keeps parameter training.log_every=1 of the first start; it is now 2" in caplog.text


def test_what_mlflow_refuses_does_not_hold_up_the_rest(
    server: LocalServer,
    client: MlflowClient,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlflow_run, "legal_name", lambda name: name)
    trackers = start(tmp_path, RemoteDestination(server.url))
    assert trackers[1].wait_until_ready(20)
    trackers[1].set_tags({"a+b": "the server allows no plus"})
    log(trackers, range(1, 3))
    trackers[1].finish()
    assert f"MLflow refuses tags of {tmp_path}" in caplog.text
    assert "a+b" in caplog.text
    assert len(history(client, trackers[1].run_id)) == 2
    assert client.get_run(trackers[1].run_id).info.status == "FINISHED"
