"""Training under Ray Train: killed, interrupted and crashed runs end as unbroken ones; errors reach the person."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import blues
from blues import config as cfg
from blues.cluster import session
from blues.cluster.train import _Run, choose_device, run_training
from blues.errors import CheckpointError, ClusterError, ConfigError, DataError
from blues.experiment import Experiment
from blues.tracking.spool import read_history
from blues.tracking.tracker import MemoryTracker
from blues.training.checkpoint import latest_checkpoint, step_folder
from blues.training.observer import Event
from tests.tracking.test_specialization_plots import make_report
from tests.training.test_trainer import assert_identical, train
from tests.training.tiny import experiment, make_dataset, run_workers

OBJECT_STORE = 200 * 2**20
WORKER_NAME = "ray::RayTrainWorker"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ray_session():
    with session.connect("local", num_cpus=2, object_store_memory=OBJECT_STORE) as connected:
        yield connected


def two_workers(data: Path, **training) -> Experiment:
    return experiment(data, **{"parallel.num_workers": 2, **training})


class Command:
    """`python -m jobs.train ...` in a process group of its own, as a terminal would start it."""

    def __init__(self, exp: Experiment, run_dir: Path) -> None:
        tree = run_dir.with_suffix(".yaml")
        cfg.save(exp, tree)
        self.run_dir, self.log = run_dir, run_dir.with_suffix(".log")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", str(tree), "--run-dir", str(run_dir)],
                cwd=Path(blues.__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal_at(self, step: int, number: int, *, group: bool = True) -> int:
        """Signal the whole group, or the command alone, once the checkpoint of `step` is there; the exit status."""
        give_up = time.monotonic() + 120
        while not step_folder(self.run_dir, step).exists():
            assert self.process.poll() is None and time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.02)
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.process.wait(60)

    def wait(self) -> int:
        try:
            return self.process.wait(120)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def unbroken(exp: Experiment, run_dir: Path) -> None:
    train(exp, run_dir)


@pytest.mark.ray
def test_killed_and_started_again_equals_unbroken(data, tmp_path):
    """SIGKILL in mid-run, the same command again: bit for bit the weights of two workers that nobody disturbed (and
    that Ray did not start), every metric once, and no Ray process left."""
    exp = two_workers(data, steps=120, checkpoint_every=20, log_every=10, validate_every=60)
    run_dir = tmp_path / "run"
    killed = Command(exp, run_dir)
    assert killed.signal_at(40, signal.SIGKILL) == -signal.SIGKILL
    again = Command(exp, run_dir)  # the killed run's workers live on for some seconds: it must wait for them
    assert again.wait() == 0, again.log.read_text()

    log = again.log.read_text()
    assert "going on from step" in log and "finished 120 steps" in log and "Traceback" not in log
    run_workers(2, unbroken, exp, tmp_path / "unbroken")
    assert_identical(run_dir, tmp_path / "unbroken")
    history = read_history(run_dir / "metrics.jsonl")
    assert [step for step, _ in history["train/loss"]] == list(range(10, 121, 10))
    assert [step for step, _ in history["validation/loss"]] == [60, 120]
    assert not [process for process in psutil.process_iter() if str(killed.process.pid) in session_of(process)]


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_at_a_terminal_leaves_a_resumable_run(data, tmp_path):
    """The signal goes to the whole process group, as from a terminal; Ray's own processes must not take it."""
    exp = two_workers(data, steps=200, checkpoint_every=20, log_every=20, validate_every=0)
    command = Command(exp, tmp_path / "run")
    assert command.signal_at(20, signal.SIGINT) == 130, command.log.read_text()
    log = command.log.read_text()
    assert "stopping: the workers save" in log and "the same command goes on from there" in log
    assert "Traceback" not in log
    again = Command(exp, tmp_path / "run")
    assert again.wait() == 0, again.log.read_text()
    run_workers(2, unbroken, exp, tmp_path / "unbroken")
    assert_identical(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.ray
def test_sigterm_saves_and_stops(data, tmp_path):
    """What `timeout`, a container or a batch system sends; Ray's own handler for it dumps core."""
    exp = two_workers(data, steps=5000, checkpoint_every=20, log_every=20, validate_every=0)
    command = Command(exp, tmp_path / "run")
    assert command.signal_at(20, signal.SIGTERM, group=False) == 130, command.log.read_text()
    log = command.log.read_text()
    assert "stopped and saved at step" in log and "***" not in log and "Traceback" not in log
    assert latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.ray
def test_a_run_inside_a_ray_that_is_there_interrupted_and_resumed(data, tmp_path, ray_session):
    """As in a trial of a sweep: the connection stays, events and metrics reach the caller; Ctrl-C saves."""
    exp = two_workers(data, steps=80, checkpoint_every=0, **{"parallel.zero_stage": 3})
    tracker, events, out = MemoryTracker(), [], io.StringIO()
    interrupter = Interrupter(at_step=10)
    stopped = run_training(exp, tmp_path / "run", tracker=tracker, on_event=interrupter, out=out)
    assert session_is_alive() and stopped.interrupted and not stopped.finished and 10 <= stopped.step < 80
    assert stopped.checkpoint == step_folder(tmp_path / "run", stopped.step)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert f"stopped and saved at step {stopped.step}/80; the same command goes on from there" in out.getvalue()

    result = run_training(exp, tmp_path / "run", tracker=tracker, on_event=events.append, out=out)
    assert session_is_alive() and result.finished and not result.interrupted
    assert (events[0].kind, events[0].step) == ("start", stopped.step) and events[-1].kind == "end"
    assert [step for step, _ in tracker.history("train/loss")] == list(range(1, 81))
    assert result.metrics["validation/loss"] == tracker.history("validation/loss")[-1][1]
    assert tracker.params["training.steps"] == "80" and "blues.data" in tracker.tags
    assert tracker.status is None  # the caller's to finish
    assert not (tmp_path / "run" / ".ray").exists()
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"worker-0.log", "worker-1.log"}
    assert "2 x cpu in float32, ZeRO 3" in out.getvalue() and "finished 80 steps" in out.getvalue()

    again = io.StringIO()
    finished = run_training(exp, tmp_path / "run", out=again)
    assert finished.finished and "has finished its 80 steps; --fresh" in again.getvalue()
    with pytest.raises(CheckpointError, match="was trained on other data than .*first"):
        run_training(exp.override({"data.path": str(data.parent / "first")}), tmp_path / "run", out=again)
    with pytest.raises(CheckpointError, match="data.phases would change the weights of samples"):
        run_training(exp.override({"data.phases": [{"start": 639, "weights": [1, 0]}]}), tmp_path / "run", out=again)
    assert cfg.read(Experiment, tmp_path / "run" / "experiment.yaml") == exp, "what was refused is not written"
    later = exp.override({"data.phases": [{"start": 640, "weights": [1, 0]}]})
    assert run_training(later, tmp_path / "run", out=again).finished


class Interrupter:
    """Sends this process Ctrl-C at the first training event from a step on."""

    def __init__(self, at_step: int) -> None:
        self.at_step, self.done = at_step, False

    def __call__(self, event) -> None:
        if not self.done and event.kind == "train" and event.step >= self.at_step:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)


def session_of(process: psutil.Process) -> str:
    """The name of the Ray session folder that a process has open (Ray puts the driver's pid into it)."""
    with contextlib.suppress(psutil.Error):
        return " ".join(file.path for file in process.open_files() if "/session_" in file.path)
    return ""


@pytest.mark.ray
@pytest.mark.slow
def test_a_crashed_worker_is_restarted_from_the_newest_checkpoint(data, tmp_path, ray_session):
    exp = two_workers(data, steps=60, checkpoint_every=20, log_every=20)
    kill = WorkerKiller()
    out = io.StringIO()
    result = run_training(exp, tmp_path / "run", on_event=kill, out=out)
    assert kill.done and result.finished
    assert "the workers were restarted and go on from step" in out.getvalue()
    run_workers(2, unbroken, exp, tmp_path / "unbroken")
    assert_identical(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_fails_for_good_names_its_log(data, tmp_path, ray_session):
    exp = two_workers(data, steps=2000, checkpoint_every=20, max_failures=0)
    with pytest.raises(ClusterError, match=r"training failed on worker \d.*worker-\d\.log"):
        run_training(exp, tmp_path / "run", on_event=WorkerKiller(), progress=False)
    assert session_is_alive()


@pytest.mark.ray
@pytest.mark.slow
def test_what_only_a_worker_can_see_reaches_the_person_as_its_own_error(data, tmp_path, ray_session):
    exp = two_workers(data)
    train(exp.override({"training.parallel.num_workers": 1}), tmp_path / "run", stop_after=1)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"tensor .* \[96, 32\] .* \[128, 32\]; look at model.ffn_dim"):
        run_training(exp.override({"model.ffn_dim": 64}), tmp_path / "run", progress=False)
    assert time.monotonic() - began < 60  # not tried again max_failures times


class WorkerKiller:
    """Kills one worker at the first checkpoint."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, event) -> None:
        if event.kind == "checkpoint" and not self.done:
            family = psutil.Process().children(recursive=True)
            workers = [child for child in family if WORKER_NAME in name_of(child)]
            workers[-1].kill()
            self.done = True


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def session_is_alive() -> bool:
    import ray

    return ray.is_initialized()


def test_data_that_cannot_be_used_is_told_before_anything_is_written(data, tmp_path):
    exp = two_workers(data).override({"data.path": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match="nowhere"):
        run_training(exp, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without CUDA")
def test_cuda_that_is_not_there_is_told_before_anything_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "is_connected", lambda: False)  # as at a prompt, without this module's Ray
    exp = two_workers(data, **{"parallel.device": "cuda"})
    with pytest.raises(ConfigError, match="num_workers=2 needs as many GPUs and this machine has 0"):
        run_training(exp, tmp_path / "run", address="local")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "gpus", "chosen"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda"), ("auto", 1, None)],
)
def test_auto_takes_gpus_if_there_are_any(data, asked, gpus, chosen):
    exp = two_workers(data, **{"parallel.device": asked})
    if chosen is None:
        with pytest.raises(ConfigError, match="needs as many GPUs and this machine has 1"):
            choose_device(exp, gpus, all_there_is=True)
    else:
        assert choose_device(exp, gpus, all_there_is=True) == chosen


def test_a_growing_cluster_may_still_bring_the_gpus(data):
    exp = two_workers(data, **{"parallel.device": "cuda"})
    assert choose_device(exp, 0, all_there_is=False) == "cuda"
    undecided = two_workers(data, **{"parallel.device": "auto"})
    with pytest.raises(ConfigError, match="no GPU now.*device=cuda to wait for them, or .*device=cpu"):
        choose_device(undecided, 0, all_there_is=False)


def test_a_report_on_the_experts_reaches_the_tracker_with_its_figures(data, tmp_path):
    """The file of all figures, and PNGs that the next report replaces."""
    make_report(tmp_path / "specialization", 10, [4])
    tracker, exp = MemoryTracker(), two_workers(data)
    run = _Run(exp, tmp_path, tracker, None, None, "")
    path = tmp_path / "specialization" / "step-00000010.json"
    metrics = {"experts/coactivation": 0.5}
    run._handle(Event(kind="specialization", step=10, metrics=metrics, details={"path": str(path)}))
    assert tracker.history("experts/coactivation") == [(10, 0.5)]
    names = {(str(Path(file).relative_to(tmp_path)), folder) for file, folder in tracker.artifacts}
    assert ("specialization/step-00000010.json", "specialization") in names
    assert {("figures/coactivation.png", "figures"), ("figures/vocabulary_input.png", "figures")} <= names
