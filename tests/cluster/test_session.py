"""Connecting to Ray and leaving as one came."""

import os
import socket
import time

import psutil
import pytest

from blues.cluster import session
from blues.errors import ClusterError


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
