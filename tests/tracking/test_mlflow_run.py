"""One MLflow run against a real server: limits, repetition, loss of the run."""

from __future__ import annotations

import math
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from blues.tracking.mlflow_run import MLflowRun, Point, Refused, legal_name
from blues.tracking.server import LocalServer


def open_run(server: LocalServer, **changes) -> MLflowRun:
    settings = {"experiment": "runs", "run_id": None, "run_name": "r", "key": uuid.uuid4().hex, **changes}
    return MLflowRun(server.url, **settings)


@pytest.fixture
def client(server: LocalServer) -> MlflowClient:
    return MlflowClient(server.url)


def test_points_beyond_one_request_and_repeated_requests(server: LocalServer, client: MlflowClient) -> None:
    run = open_run(server)
    points = [Point(f"m/{i}", float(i), 1_700_000_000_000 + i, step) for step in (1, 2) for i in range(700)]
    run.log_points(points)
    run.log_points(points)  # as after a crash between the answer and its acknowledgement
    for name in ("m/0", "m/699"):
        assert [point.step for point in client.get_metric_history(run.run_id, name)] == [1, 2]
    run.log_points([Point("nan", math.nan, 1, 1), Point("inf", math.inf, 1, 1)])
    assert math.isnan(client.get_metric_history(run.run_id, "nan")[0].value)
    assert client.get_metric_history(run.run_id, "inf")[0].value > 1e308


def test_points_trained_again_are_left_out(server: LocalServer, client: MlflowClient) -> None:
    run = open_run(server)
    run.log_points([Point("loss", float(step), 1000 + step, step) for step in range(1, 9)])
    again = open_run(server, run_id=run.run_id)
    assert again.run_id == run.run_id
    again.log_points([Point("loss", 10.0 * step, 2000 + step, step) for step in range(6, 12)], replay_after=5)
    history = client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [
        *((step, float(step)) for step in range(1, 9)),
        *((step, 10.0 * step) for step in range(9, 12)),
    ]


def test_a_run_whose_creation_was_not_acknowledged_is_found(server: LocalServer) -> None:
    first = open_run(server, key="lost-answer")
    assert open_run(server, key="lost-answer").run_id == first.run_id
    assert open_run(server).run_id != first.run_id


def test_params_keep_their_first_value_within_limits(server: LocalServer, client: MlflowClient) -> None:
    run = open_run(server)
    params = {f"model.p{i}": str(i) for i in range(230)} | {"long": "x" * 9000, "odd+name": "1"}
    assert run.log_params(params) == {}
    assert run.log_params({"model.p3": "3"}) == {}
    assert open_run(server, run_id=run.run_id).log_params({"model.p3": "4", "new": "5"}) == {"model.p3": ("3", "4")}
    recorded = client.get_run(run.run_id).data.params
    assert len(recorded) == 233
    assert recorded["long"] == "x" * 6000
    assert recorded["odd_name"] == "1"
    assert (recorded["model.p3"], recorded["new"]) == ("3", "5")


def test_tags_artifacts_parent_and_end(server: LocalServer, client: MlflowClient, tmp_path: Path) -> None:
    parent = open_run(server)
    run = open_run(server, parent_run_id=parent.run_id)
    run.set_tags({f"t{i}": "x" * 9000 for i in range(120)})
    run.set_tags({"t0": "later"})
    (tmp_path / "loss.png").write_bytes(b"picture")
    run.log_artifact(tmp_path / "loss.png", "figures")
    run.log_artifact(tmp_path / "loss.png", "../outside")
    assert [file.path for file in client.list_artifacts(run.run_id, "outside")] == ["outside/loss.png"]
    with pytest.raises(Refused, match="No such file"):
        run.log_artifact(tmp_path / "absent.png", "figures")
    run.end("KILLED")
    info = client.get_run(run.run_id)
    assert info.info.status == "KILLED"
    assert info.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (info.data.tags["t0"], len(info.data.tags["t119"])) == ("later", 8000)
    assert [file.path for file in client.list_artifacts(run.run_id, "figures")] == ["figures/loss.png"]
    assert open_run(server, run_id=run.run_id, reopen=False).exists()
    assert client.get_run(run.run_id).info.status == "KILLED"
    open_run(server, run_id=run.run_id)
    assert client.get_run(run.run_id).info.status == "RUNNING"


def test_a_deleted_run_is_noticed_and_made_anew(server: LocalServer, client: MlflowClient) -> None:
    run = open_run(server, key="deleted")
    client.delete_run(run.run_id)
    assert not run.exists()
    with pytest.raises(Refused, match="deleted"):
        run.log_points([Point("m", 1.0, 1, 1)])
    assert open_run(server, run_id=run.run_id, key="deleted").run_id != run.run_id
    assert open_run(server, run_id="0" * 32).exists()


def test_a_deleted_experiment_is_restored(server: LocalServer, client: MlflowClient) -> None:
    run = open_run(server, experiment="comes back")
    client.delete_experiment(run.experiment_id)
    assert open_run(server, experiment="comes back").experiment_id == run.experiment_id


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("experts/layer_01/load_03", "experts/layer_01/load_03"),
        ("validation/loss/C++ (std)", "validation/loss/C__ _std_"),
        ("validation/loss//a/../b", "validation/loss/a/b"),
        ("/", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_are_made_legal(server: LocalServer, name: str, legal: str) -> None:
    assert legal_name(name) == legal
    open_run(server).log_points([Point(name, 1.0, 1, 1)])  # refused by the server if it were not
