"""Whose folder it is, what may change in it, and that one process at a time trains there."""

import subprocess
import sys

import pytest

from blues import config as cfg
from blues.cluster import run_folder
from blues.errors import ConfigError
from blues.experiment import Experiment
from tests.training.tiny import experiment


def enter(path, exp, **options):
    with run_folder.hold(path, exp, **options) as folder:
        return folder


def test_the_tree_is_kept_and_the_same_experiment_may_come_back(tmp_path):
    exp = experiment(tmp_path / "data")
    folder = enter(tmp_path / "runs" / "a", exp)
    assert cfg.read(Experiment, folder / "experiment.yaml") == exp
    assert enter(folder, exp) == folder


def test_what_is_learned_may_not_change_and_the_keys_are_named(tmp_path):
    exp = experiment(tmp_path / "data")
    folder = enter(tmp_path / "a", exp)
    other = exp.override({"model.dim": 64, "training.optimizer.lr": 0.5})
    with pytest.raises(ConfigError, match=r"model.dim \(32 there, 64 here\), training.optimizer.lr .*--fresh"):
        enter(folder, other)
    assert cfg.read(Experiment, folder / "experiment.yaml") == exp


@pytest.mark.parametrize(
    "change",
    [
        {"training.parallel.num_workers": 2},
        {"training.log_every": 7},
        {"training.micro_batch_size": 1},
        {"tracking.enabled": True},
        {"data.path": "elsewhere"},
        {"data.phases": [{"start": 100, "weights": [0.5, 0.5]}]},
        {"data.max_cached_batches": 2},
        {"data.pin_memory": False},
    ],
)
def test_where_and_how_often_may_change(tmp_path, change):
    exp = experiment(tmp_path / "data")
    folder = enter(tmp_path / "a", exp)
    changed = exp.override(change)
    enter(folder, changed)
    assert cfg.read(Experiment, folder / "experiment.yaml") == changed


def test_a_check_refuses_before_anything_is_written(tmp_path):
    exp = experiment(tmp_path / "data")
    folder = enter(tmp_path / "a", exp)

    def refuse(found):
        assert found == folder
        raise ConfigError("not like this")

    with pytest.raises(ConfigError, match="not like this"):
        enter(folder, exp.override({"training.log_every": 7}), check=refuse)
    assert cfg.read(Experiment, folder / "experiment.yaml") == exp
    assert enter(folder, exp) == folder, "the lock was given back"


def test_fresh_deletes_what_blues_wrote_and_nothing_else(tmp_path):
    exp = experiment(tmp_path / "data")
    folder = enter(tmp_path / "a", exp)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    enter(folder, exp.override({"model.dim": 64}), fresh=True)
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_with_other_things_is_left_alone(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a run folder .*thesis.tex"):
        enter(tmp_path, experiment(tmp_path / "data"), fresh=fresh)
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        enter(tmp_path / "a", experiment(tmp_path / "data"))


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_in_the_folder_is_refused_until_it_is_dead(tmp_path):
    exp = experiment(tmp_path / "data")
    folder = enter(tmp_path / "a", exp)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder / run_folder.DRIVER_LOCK)], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process is training"):
            enter(folder, exp)
    finally:
        holder.kill()
        holder.wait()
    assert enter(folder, exp) == folder
