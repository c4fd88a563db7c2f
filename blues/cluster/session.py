"""Being connected to Ray, and leaving as one came.

In: an address or nothing. Out: a connected process for the time of a `with` block. Without an address a private local
Ray is started: quiet, every port on 127.0.0.1, never an existing cluster by accident. RAY_ADDRESS (which Ray sets
inside a submitted job) or an explicit address attaches to a running cluster. Only what was started here is stopped.

A killed process takes its local Ray with it: Ray's own processes ask the kernel for it, their workers follow within
seconds and the last agents when they miss their head.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blues.errors import ClusterError

ADDRESS, LOCAL = "RAY_ADDRESS", "local"
KNOCK_S = 5.0
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for "this machine only": every port on 127.0.0.1
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # how long agents outlive a killed head (default 60)
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process, to watch for a cloud that is not there
}
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; Ray warns in every process otherwise
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a finished worker is noticed this late
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers keep the working directory
    "RAY_TRAIN_METRICS_ENABLED": "0",  # Ray's own gauges of its controller; ours go to the tracker
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Session:
    """A connection. started: whether this process started the cluster (and stops it). resources: what it has now."""

    address: str
    started: bool

    @property
    def resources(self) -> Mapping[str, float]:
        import ray

        return ray.cluster_resources()

    @property
    def one_machine(self) -> bool:
        """Whether no other machine can join: the cluster's head listens on the loopback address only."""
        return self.address.startswith("127.0.0.1:")


def resolve(address: str | None) -> str:
    """Where `connect(address)` would connect a process that is not connected yet."""
    return address or os.environ.get(ADDRESS) or LOCAL


def is_connected() -> bool:
    """Whether this process is connected to Ray already (a driver, or a worker such as a trial of a sweep)."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextlib.contextmanager
def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_memory: int | None = None,
) -> Iterator[Session]:
    """Be connected to Ray inside the `with` block.

    Args:
        address: "local" for a private one; "auto", "HOST:6379" or "ray://HOST:10001" for a running cluster. None:
            RAY_ADDRESS if that is set, else "local". A process that is connected already stays as it is.
        num_cpus: CPUs that a private Ray offers (None: as many as the machine has). More than there are is allowed.
        num_gpus: likewise GPUs. object_store_memory: bytes.

    Raises:
        ClusterError: Ray cannot be started, or nothing answers at the address.
    """
    chosen = resolve(address)
    local = chosen == LOCAL
    with _environment(QUIET_ENVIRONMENT | (LOCAL_ENVIRONMENT if local else {})):
        import ray

        if ray.is_initialized():
            yield Session(address=ray.get_runtime_context().gcs_address, started=False)
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if local:
            options |= {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "object_store_memory": object_store_memory,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
            }
        try:
            with _loopback() if local else contextlib.nullcontext():
                if not local:
                    _knock(chosen)
                ray.init(address=chosen, **options)
        except Exception as error:
            raise _explained(error, chosen) from error
        try:
            yield Session(address=ray.get_runtime_context().gcs_address, started=local)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set what the person has not set, for the time of the block."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Let Ray keep 127.0.0.1, which it otherwise replaces by the machine's address for others.

    It reads its switch (in LOCAL_ENVIRONMENT) when it is imported, which may have happened before.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _knock(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself tries for minutes.

    Raises:
        OSError: no connection to HOST:PORT.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def _explained(error: Exception, address: str) -> ClusterError:
    """One sentence for Ray's account of why there is no connection."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if address == LOCAL:
        return ClusterError(f"a local Ray could not be started: {reason}")
    return ClusterError(
        f"no Ray cluster answers at {address} ({reason}); check --address and {ADDRESS}, or leave both out to run here"
    )
