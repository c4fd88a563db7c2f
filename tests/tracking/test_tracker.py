"""The tracker that training talks to."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from blues.config import dump, load
from blues.errors import ConfigError, TrackingError
from blues.tracking.destinations import LocalDestination, RemoteDestination, choose, named
from blues.tracking.server import LocalServer, is_running
from blues.tracking.tracker import CompositeTracker, JsonlTracker, MemoryTracker, Tracker, Tracking


def test_every_tracker_has_the_protocol(tmp_path: Path) -> None:
    for tracker in (MemoryTracker(), JsonlTracker(tmp_path), CompositeTracker([])):
        assert isinstance(tracker, Tracker)


def test_memory_tracker_keeps_first_points_and_last_tags(tmp_path: Path) -> None:
    memory, other = MemoryTracker(), MemoryTracker()
    tracker = CompositeTracker([memory, other])
    tracker.log_metrics({"a": 2}, 2)
    tracker.log_metrics({"a": 1}, 1)
    tracker.log_metrics({"a": 9}, 2)
    tracker.set_tags({"t": "x"})
    tracker.set_tags({"t": "y"})
    tracker.log_params({"p": 1})
    tracker.log_params({"p": 2, "q": 3})
    tracker.log_artifact(tmp_path / "f", "figures")
    tracker.finish("KILLED")
    assert memory.history("a") == [(1, 1.0), (2, 2.0)]
    assert (memory.tags, memory.params) == ({"t": "y"}, {"p": 1, "q": 3})
    assert (memory.artifacts, memory.status) == ([(tmp_path / "f", "figures")], "KILLED")
    assert vars(memory) == vars(other)


def test_switched_off_it_writes_metrics_only(tmp_path: Path) -> None:
    with Tracking.Config(enabled=False).build(run_dir=tmp_path, run_name="r") as tracker:
        tracker.log_params({"a": 1})
        tracker.log_metrics({"m": 1.0}, 1)
        assert (tracker.url, tracker.run_id, tracker.wait_until_ready(0)) == (None, None, False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_local_server_is_started_followed_restarted_and_ended(tmp_path: Path) -> None:
    config = Tracking.Config(directory=str(tmp_path / "mlflow"), experiment="local")
    began = time.monotonic()
    with config.build(run_dir=tmp_path / "run", run_name="r", parent_run_id=None) as tracker:
        assert time.monotonic() - began < 1.0  # the server starts beside the training
        tracker.log_metrics({"m": 1.0}, 1)
        assert tracker.wait_until_ready(60)
        first = tracker.url
        assert first is not None
        with LocalServer(tmp_path / "mlflow") as shared:
            os.kill(shared.pid, signal.SIGKILL)
        tracker.log_metrics({"m": 2.0}, 2)
    with LocalServer(tmp_path / "mlflow") as again:
        run = MlflowClient(again.url).get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert [point.step for point in MlflowClient(again.url).get_metric_history(tracker.run_id, "m")] == [1, 2]
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "tracking.json"]
    deadline = time.monotonic() + 15
    while is_running(tmp_path / "mlflow") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(tmp_path / "mlflow")


def test_child_runs_point_to_their_parent(server: LocalServer, tmp_path: Path) -> None:
    config = Tracking.Config(uri=server.url, experiment="sweep")
    with config.build(run_dir=tmp_path / "sweep", run_name="sweep") as parent:
        assert parent.wait_until_ready(30)
        with config.build(run_dir=tmp_path / "trial", run_name="trial", parent_run_id=parent.run_id) as child:
            assert child.wait_until_ready(30)
    tags = MlflowClient(server.url).get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id
    assert tags["mlflow.runName"] == "trial"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (None, "FINISHED")]
)
def test_how_the_block_ends_is_how_the_run_ends(tmp_path: Path, error: type[BaseException] | None, status: str) -> None:
    memory = MemoryTracker()
    tracker = Tracking.Config(enabled=False).build(run_dir=tmp_path, run_name="r")
    tracker.trackers = (*tracker.trackers, memory)
    if error is None:
        with tracker:
            pass
    else:
        with pytest.raises(error), tracker:
            raise error
    assert memory.status == status


def test_a_uri_that_was_asked_for_must_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 cannot be used .*tracking\.uri=null"):
        Tracking.Config(uri="http://127.0.0.1:9").build(run_dir=tmp_path, run_name="r")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI") as caught:
        Tracking.Config().build(run_dir=tmp_path, run_name="r")
    assert "hunter2" not in str(caught.value)
    assert time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_credentials_are_not_part_of_a_configuration() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as caught:
        Tracking.Config(uri="http://me:hunter2@host")
    assert "hunter2" not in str(caught.value)
    for field in ("experiment", "directory"):
        with pytest.raises(ConfigError, match=field):
            Tracking.Config(**{field: " "})
    config = Tracking.Config(uri="http://host:5000", experiment="e")
    assert load(Tracking.Config, dump(config)) == config


def test_credentials_of_the_environment_stay_out_of_the_run_folder(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.url.replace("http://", "http://me:hunter2@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with Tracking.Config().build(run_dir=tmp_path, run_name="r") as tracker:
        assert tracker.wait_until_ready(30)
        assert "hunter2" not in str(tracker.url)
    assert "hunter2" not in (tmp_path / "tracking.json").read_text()
    name = json.loads((tmp_path / "tracking.json").read_text())["server"]
    assert named(name).connect() == uri  # what was left unsent goes where the environment says


def test_destinations(server: LocalServer, tmp_path: Path) -> None:
    assert isinstance(choose(None, tmp_path), LocalDestination)
    assert choose(None, tmp_path).name == f"local:{tmp_path}"
    assert isinstance(choose(server.url, tmp_path), RemoteDestination)
    assert isinstance(named(f"local:{tmp_path}"), LocalDestination)
