"""blues ui: attach or start, send what waits, end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from blues.errors import TrackingError
from blues.tracking.server import LocalServer
from blues.tracking.tracker import Tracking
from blues.tracking.ui import serve


def test_attaches_to_a_running_server(server: LocalServer) -> None:
    said: list[str] = []

    def stop(_: float) -> bool:
        assert requests.get(f"{server.url}/health", timeout=5).ok
        return True

    serve(server.directory, say=said.append, stop=stop, port=1)
    assert said[0].startswith(f"MLflow: {server.url} ")
    assert "not 1" in said[1]


def test_sends_the_rest_of_a_run_and_shows_its_server(server: LocalServer, tmp_path: Path) -> None:
    with Tracking.Config(directory=str(server.directory)).build(run_dir=tmp_path, run_name="r") as tracker:
        assert tracker.wait_until_ready(30)
    said: list[str] = []
    serve("elsewhere", runs=[tmp_path], say=said.append, stop=lambda _: True)
    assert said[0] == f"{tmp_path}: MLflow has everything"
    assert server.url in said[1]


def test_says_what_is_not_there(server: LocalServer, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no MLflow directory"):
        serve(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    with pytest.raises(TrackingError, match="not a run folder"):
        serve(tmp_path, runs=[tmp_path])
    for name, uri in (("a", server.url), ("b", server.url.replace("127.0.0.1", "localhost"))):
        with Tracking.Config(uri=uri).build(run_dir=tmp_path / name, run_name=name) as tracker:
            assert tracker.wait_until_ready(30)
    with pytest.raises(TrackingError, match="different MLflow servers"):
        serve(tmp_path, runs=[tmp_path / "a", tmp_path / "b"])


def test_ctrl_c_ends_the_command(server: LocalServer) -> None:
    command = [sys.executable, "-m", "jobs.ui", "--directory", str(server.directory)]
    restore = (  # a test run in the background of a shell inherits an ignored SIGINT
        "import signal, os, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", restore, *command], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert server.url in child.stdout.readline()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(20) == 0
