"""The local server: one per directory, shared, found again, gone with its last user."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from blues.errors import TrackingError
from blues.tracking.server import LocalServer, is_running, read_entry

USER = (
    "import sys, time; from blues.tracking.server import LocalServer\n"
    "server = LocalServer(sys.argv[1]); print(server.pid, flush=True); time.sleep(300)\n"
)


def eventually(true: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return true()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_one_process_on_the_loopback_answers(server: LocalServer) -> None:
    assert requests.get(f"{server.url}/health", timeout=5).text == "OK"
    assert "<html" in requests.get(server.url, timeout=5).text
    process = psutil.Process(server.pid)
    assert process.children(recursive=True) == []  # no job runners, no workers
    listening = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    remote = [c.raddr.ip for c in process.net_connections() if c.raddr]
    assert set(remote) <= {"127.0.0.1"}  # no telemetry


def test_a_page_of_another_host_is_refused(server: LocalServer) -> None:
    answer = requests.get(
        f"{server.url}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.example"}, timeout=5
    )
    assert answer.status_code == 403


def test_a_proxy_of_the_environment_is_not_asked(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with LocalServer(server.directory) as second:
        assert second.pid == server.pid


def test_shared_by_users_who_come_at_once_and_gone_after_sigkill_of_the_last(tmp_path: Path) -> None:
    users = [
        subprocess.Popen([sys.executable, "-c", USER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        pids = {int(user.stdout.readline()) for user in users}  # type: ignore[union-attr]
        assert len(pids) == 1
        (pid,) = pids
        entry = read_entry(tmp_path)
        assert entry is not None
        assert entry.pid == pid
        os.kill(users[0].pid, signal.SIGKILL)
        time.sleep(2.5)
        assert not gone(pid)
        os.kill(users[1].pid, signal.SIGKILL)
        assert eventually(lambda: gone(pid))
        assert not is_running(tmp_path)
        assert read_entry(tmp_path) is None
    finally:
        for user in users:
            user.kill()
            user.communicate()


def test_a_hanging_server_is_an_error_and_a_killed_one_is_replaced_over_the_same_records(tmp_path: Path) -> None:
    with LocalServer(tmp_path) as ours:
        first = ours.pid
        created = requests.post(
            f"{ours.url}/api/2.0/mlflow/experiments/create", json={"name": "kept"}, timeout=10
        ).json()["experiment_id"]
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(TrackingError, match="does not answer"):
            ours.ensure(timeout_s=1)
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: not is_running(tmp_path))
        assert (tmp_path / "server.json").exists()  # stale, and known to be
        assert read_entry(tmp_path) is None
        url = ours.ensure()
        assert ours.pid != first
        answer = requests.get(f"{url}/api/2.0/mlflow/experiments/get?experiment_id={created}", timeout=10).json()
        assert answer["experiment"]["name"] == "kept"
        second = ours.pid
    assert eventually(lambda: gone(second))


def test_entries_of_other_processes_are_stale(tmp_path: Path) -> None:
    me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "port": 1, "url": "http://127.0.0.1:1"}
    path = tmp_path / "server.json"
    path.write_text(json.dumps(me))
    assert read_entry(tmp_path) is not None
    for stale in ({**me, "started": me["started"] - 60}, {**me, "pid": 2**22 + 1}, {"pid": 1}, []):
        path.write_text(json.dumps(stale))
        assert read_entry(tmp_path) is None
    path.write_text("{")
    assert read_entry(tmp_path) is None


def test_a_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, and long enough to be read as one" * 40)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"did not start; the last lines of .*server\.log.*(?s:.)*not a database"):
        LocalServer(tmp_path)
    assert time.monotonic() - began < 60
    assert not is_running(tmp_path)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrackingError, match=f"cannot use port {port} of 127.0.0.1"):
            LocalServer(tmp_path, port=port)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="tracking.directory"):
        LocalServer(tmp_path / "file" / "mlflow")


def test_threads_of_one_process_share(server: LocalServer) -> None:
    found: list[int] = []

    def use() -> None:
        with LocalServer(server.directory) as mine:
            found.append(mine.pid)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [server.pid] * 4
