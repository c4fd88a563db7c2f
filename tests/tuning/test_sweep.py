"""Sweeps: the plan covers the space, trials run and are compared, nothing finished is trained twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from blues import config as cfg
from blues.errors import ConfigError, DataError
from tests.training.tiny import experiment, make_dataset
from tuning import sweep
from tuning.spaces import choice, product

ROUTERS = choice("model.moe.router", ["noisy_top_k", "softmax_top_k"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A few steps of a two-layer mixture on one worker; no MLflow."""
    data = make_dataset(tmp_path_factory.mktemp("data"))
    return experiment(
        data, steps=4, global_batch_size=2, micro_batch_size=2, validate_every=2, checkpoint_every=2, log_every=1
    ).override({"training.parallel.num_workers": 1, "tracking.enabled": False})


def test_a_plan_is_every_point_with_every_seed_in_folders_of_their_own(base):
    trials = sweep.plan(base, ROUTERS, seeds=2)
    assert [trial.name for trial in trials] == [
        "noisy_top_k-seed-0",
        "noisy_top_k-seed-1",
        "softmax_top_k-seed-0",
        "softmax_top_k-seed-1",
    ]
    assert [(t.experiment.training.seed, t.experiment.data.seed) for t in trials] == [(0, 0), (1, 1)] * 2


def test_points_that_come_to_the_same_experiment_are_run_once(base):
    top_k = base.model.moe.top_k
    assert len(sweep.plan(base, product() + choice("model.moe.top_k", [top_k]))) == 1


def test_a_point_that_is_no_experiment_is_named(base):
    with pytest.raises(ConfigError, match=r"search space point 'top_k=99': .*top_k"):
        sweep.plan(base, choice("model.moe.top_k", [1, 99]))
    with pytest.raises(ConfigError, match="at least 1 seed"):
        sweep.plan(base, ROUTERS, seeds=0)


def test_a_missing_dataset_stops_the_sweep_before_any_trial(base, tmp_path):
    lost = base.override({"data.path": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match="nowhere"):
        sweep.run_sweep(sweep.plan(lost, ROUTERS), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.ray
def test_trials_run_are_compared_and_are_not_trained_again(base, tmp_path):
    out = io.StringIO()
    result = sweep.run_sweep(sweep.plan(base, ROUTERS), tmp_path / "sweep", out=out)
    assert result.failed == {}
    assert {variant.name for variant in result.comparison.variants} == {"noisy_top_k", "softmax_top_k"}
    assert "One seed cannot tell" in json.loads((tmp_path / "sweep" / "comparison.json").read_text())["verdict"]
    assert not (tmp_path / "sweep" / sweep.TUNE).exists()
    runs = {trial.name: (tmp_path / "sweep" / trial.name / "run.json").read_bytes() for trial in result.trials}

    again = sweep.run_sweep(sweep.plan(base, ROUTERS), tmp_path / "sweep", out=io.StringIO())
    assert again.comparison.rows() == result.comparison.rows()
    assert runs == {trial.name: (tmp_path / "sweep" / trial.name / "run.json").read_bytes() for trial in again.trials}


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_fails_is_told_and_the_others_go_on(base, tmp_path):
    """The second trial's checkpoint folder is a file, as a full or read-only disk would be."""
    trials = sweep.plan(base, ROUTERS)
    folder = tmp_path / "sweep" / trials[1].name
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("in the way")
    result = sweep.run_sweep(trials, tmp_path / "sweep", out=io.StringIO())
    assert list(result.failed) == [trials[1].name] and result.failed[trials[1].name]
    assert [variant.runs[0].folder.name for variant in result.comparison.variants] == [trials[0].name]


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(base, tmp_path):
    longer = base.override({"training.steps": 400, "training.checkpoint_every": 20})
    cfg.save(longer, tmp_path / "base.yaml")
    command = [sys.executable, "-m", "jobs.sweep", "router", "--experiment", str(tmp_path / "base.yaml")]
    command += ["--run-dir", str(tmp_path / "sweep")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoints = tmp_path / "sweep" / "noisy_top_k-seed-0" / "checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert first.poll() is None, first.stdout and first.stdout.read()
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    assert first.stdout is not None
    output = first.stdout.read()
    assert first.wait(timeout=60) == 130 and "Traceback" not in output, output
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    starts = json.loads((tmp_path / "sweep" / "noisy_top_k-seed-0" / "run.json").read_text())
    assert len(starts["starts"]) == 2 and "final loss" in second.stdout
