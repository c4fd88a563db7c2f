"""Connecting to Ray and leaving as one came."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from blues.cluster import session
from blues.errors import ClusterError, DataError


def family(pid: int | None = None) -> set[psutil.Process]:
    """The processes below one, this one by default."""
    return set(psutil.Process(pid).children(recursive=True))


def has_raylet(processes: set[psutil.Process]) -> bool:
    names = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(process.name())
    return "raylet" in names


@pytest.mark.ray
def test_a_private_ray_listens_on_this_machine_only_and_ends_with_the_block(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    before = set(psutil.Process().children(recursive=True))
    with session.connect(num_cpus=3, object_store_memory=200 * 2**20) as outer:
        assert outer.started and outer.resources["CPU"] == 3
        with session.connect() as inner:
            assert not inner.started and inner.address == outer.address
        assert ray.is_initialized(), "the inner block must not stop what it did not start"
        family = [child for child in psutil.Process().children(recursive=True) if child not in before]
        open_to_others = {
            (child.name(), connection.laddr)
            for child in family
            for connection in child.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith(("127.0.0.1", "::1"))
        }
        assert family and not open_to_others
        commands = " ".join(word for child in family for word in child.cmdline())
        assert "raylet" in commands and not any(name in commands for name in ("monitor.py", "dashboard.py"))
    assert not ray.is_initialized()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_an_address_where_nobody_answers_is_told_at_once(monkeypatch):
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        before, began = dict(os.environ), time.monotonic()
        with (
            pytest.raises(ClusterError, match=f"no Ray cluster answers at {address} .*check --address and RAY_ADDRESS"),
            session.connect(num_cpus=2),
        ):
            pass
        assert time.monotonic() - began < 10
    assert dict(os.environ) == {**before, "RAY_ADDRESS": address}, "the environment is left as it was"


def test_what_a_private_ray_leaves_out_is_still_called_so():
    """Another name in another release of Ray would start it again, unseen."""
    from ray._private import node

    before = {name: getattr(node.Node, name) for name in session.UNUSED}
    with session._private_node():
        assert all(getattr(node.Node, name) is not method for name, method in before.items())
    assert all(getattr(node.Node, name) is method for name, method in before.items())


def test_work_that_is_done_soon_starts_no_ray(monkeypatch):
    monkeypatch.setattr(session, "connect", lambda *_, **__: pytest.fail("Ray was started"))
    with session.connect_beside(lambda: 7) as result:
        assert result == 7

    def wrong():
        raise DataError("wrong")

    with pytest.raises(DataError, match="wrong"), session.connect_beside(wrong):
        pytest.fail("there is no result")


def test_work_that_is_left_alone_is_stopped(monkeypatch):
    monkeypatch.setattr(session, "GRACE_S", 0.01)
    stopped = threading.Event()

    def work():
        try:
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            stopped.set()

    with pytest.raises(ClusterError), session.connect_beside(work, "127.0.0.1:1"):
        pytest.fail("there is no cluster")
    assert stopped.wait(10)


@pytest.mark.ray
def test_ray_starts_beside_work_and_is_gone_after_an_error_of_it(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before, began, there = family(), threading.Event(), set()

    def work():
        began.set()
        while not has_raylet(family() - before):
            time.sleep(0.02)
        there.update(family() - before)
        raise DataError("the source is damaged")

    with pytest.raises(DataError, match="the source is damaged"), session.connect_beside(work, num_cpus=1):
        pytest.fail("there is no result")
    assert began.is_set() and there and not session.is_connected()
    _, alive = psutil.wait_procs(there | (family() - before), timeout=10)
    assert not alive


@pytest.mark.ray
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, signal.SIGTERM)])
def test_a_signal_while_ray_starts_ends_all_of_it(tmp_path, number, status):
    """The work would take a minute; nobody waits for it."""
    program = (
        "import sys, time, jobs.prepare; from blues.data.reading import sources; from blues.cli import main; "
        "sources.plan = lambda *_, **__: time.sleep(60); sys.exit(main(sys.argv[1:]))"
    )
    words = ["prepare", "--input-dir", str(tmp_path), "--data-cache-dir", str(tmp_path / "out"), "--num-workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != session.ADDRESS}
    process = subprocess.Popen([sys.executable, "-c", program, *words], env=environment, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 60
    while not has_raylet(there := family(process.pid)):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode in (status, -status), error
    assert number != signal.SIGINT or b"interrupted" in error
    _, alive = psutil.wait_procs(there, timeout=15)
    assert not alive and not (tmp_path / "out").exists()
