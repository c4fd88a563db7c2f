"""Where a run comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import blues
from blues.config import configclass, load
from blues.errors import TrackingError
from blues.tracking import provenance
from blues.tracking.tracker import Tracking


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_record_starts_the_run_again(tmp_path: Path) -> None:
    config = Tracking.Config(experiment="e")
    record = provenance.record(config, data_fingerprint="abc", device="2 x cpu", command=["blues", "train", "my run"])
    assert load(Tracking.Config, record["configuration"]) == config
    assert record["command"] == "blues train 'my run'"
    assert (record["data_fingerprint"], record["device"]) == ("abc", "2 x cpu")
    assert record["versions"]["blues"] == blues.__version__
    assert {"torch", "ray", "deepspeed", "mlflow", "tiktoken", "numpy", "python"} <= record["versions"].keys()
    assert all(record["versions"].values())
    path = tmp_path / "run.json"
    provenance.save(path, record)
    provenance.save(path, {**record, "device": "8 x cuda"})
    assert [start["device"] for start in provenance.load(path)] == ["2 x cpu", "8 x cuda"]
    assert json.loads(path.read_text())["starts"][0] == record


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert provenance.load(path) == []
    path.write_text("{")
    with pytest.raises(TrackingError, match="damaged; move it away"):
        provenance.save(path, {})
    assert path.read_text() == "{"


def test_this_process_s_command_without_secrets() -> None:
    assert Path(sys.orig_argv[0]).name in provenance.record(Tracking.Config())["command"]
    record = provenance.record(Tracking.Config(), command=["blues", "tracking.uri=http://me:hunter2@h"])
    assert "hunter2" not in json.dumps(record)


def test_commit_and_dirtiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert provenance.git_commit(package) == (None, None)  # not in a checkout
    git(tmp_path, "init", "-q")
    assert provenance.git_commit(package) == (None, None)  # in somebody's checkout, but not part of it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "m")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_commit(package) == (head, False)
    (tmp_path / "note").write_text("untracked")
    assert provenance.git_commit(package) == (head, False)
    (package / "__init__.py").write_text("changed")
    assert provenance.git_commit(package) == (head, True)
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a git hook
    assert provenance.git_commit(package) == (head, True)
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit(package) == (None, None)  # no git at all


def test_params_and_tags_are_text() -> None:
    @configclass
    class Tree(Tracking.Config):
        many: tuple[int, ...] = (1, 2)

    assert provenance.params(Tree(experiment="e")) == {
        "uri": "null",
        "directory": "mlflow",
        "experiment": "e",
        "enabled": "true",
        "many": "[1, 2]",
    }
    record = provenance.record(Tracking.Config(), device="cpu") | {"commit": "c0ffee", "dirty": True, "user": None}
    tags = provenance.tags(record)
    assert all(isinstance(value, str) for value in tags.values())
    assert (tags["mlflow.source.git.commit"], tags["blues.dirty"]) == ("c0ffee", "true")
    assert tags["blues.version.python"] == record["versions"]["python"]
    assert "mlflow.user" not in tags
    assert "blues.data" not in tags
