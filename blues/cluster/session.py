"""Being connected to Ray, and leaving as one came.

In: an address or nothing. Out: a connected process for the time of a `with` block. Without an address a private local
Ray is started: quiet, every port on 127.0.0.1, never an existing cluster by accident. RAY_ADDRESS (which Ray sets
inside a submitted job) or an explicit address attaches to a running cluster. Only what was started here is stopped.

A killed process takes its local Ray with it: Ray's own processes ask the kernel for it, their workers follow within
seconds and the last agents when they miss their head.

A private Ray takes seconds to start. `connect_beside` does work that comes first meanwhile, and of a private Ray only
what Blues uses is started: not its log monitor, autoscaler and dashboard server.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from blues.errors import ClusterError

ADDRESS, LOCAL = "RAY_ADDRESS", "local"
KNOCK_S = 5.0
GRACE_S = 0.3
"""Work that ends within this time is not worth a start beside it."""
PRELOAD = "RAY_preload_python_modules"
"""Ray's setting for what its workers import while they wait; a Ray that does not know it starts them as ever."""
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")
"""What `ray._private.node.Node` starts for a head beyond what work needs: an autoscaler for one machine, a reader of
logs that go nowhere, and of the dashboard that is left out a server, for which the start waits a second."""
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


Result = TypeVar("Result")


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
    preload: Sequence[str] = (),
) -> Iterator[Session]:
    """Be connected to Ray inside the `with` block.

    Args:
        address: "local" for a private one; "auto", "HOST:6379" or "ray://HOST:10001" for a running cluster. None:
            RAY_ADDRESS if that is set, else "local". A process that is connected already stays as it is.
        num_cpus: CPUs that a private Ray offers (None: as many as the machine has). More than there are is allowed.
        num_gpus: likewise GPUs. object_store_memory: bytes.
        preload: modules that the workers of a private Ray import as soon as they are there, while they wait for work.

    Raises:
        ClusterError: Ray cannot be started, or nothing answers at the address.
    """
    chosen = resolve(address)
    local = chosen == LOCAL
    ahead = {PRELOAD: ",".join(preload)} if preload else {}
    with _environment(QUIET_ENVIRONMENT | (LOCAL_ENVIRONMENT | ahead if local else {})):
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
            with _private_node() if local else contextlib.nullcontext():
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
def connect_beside(
    work: Callable[[], Result],
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    preload: Sequence[str] = (),
) -> Iterator[Result]:
    """Do `work` and be connected to Ray inside the `with` block, which begins with its result.

    Ray starts while `work` is done, unless that takes no more than GRACE_S: then nothing is started, and the block
    connects itself where it needs to (see `connect`, also for the arguments). It is the work that goes to a thread, for
    Ray wants signals, and its processes live no longer than the thread that started them.

    Raises:
        ClusterError: see `connect`. What `work` raises comes as it is, once what was started has been stopped.
    """
    beside = _Beside(work)
    try:
        if beside.ends_within(GRACE_S):
            yield beside.result()
            return
        with connect(address, num_cpus=num_cpus, preload=preload):
            for module in preload:
                importlib.import_module(module)
            yield beside.result()
    finally:
        beside.stop()


class _Beside(Generic[Result]):
    """Work in a thread that a process does not wait for when it ends."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._future: Future[Result] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._future.set_result(work())
        except BaseException as error:
            self._future.set_exception(error)

    def ends_within(self, seconds: float) -> bool:
        return bool(wait([self._future], seconds).done)

    def result(self) -> Result:
        return self._future.result()

    def stop(self) -> None:
        """Raise KeyboardInterrupt in the work, if it is still done, as soon as it comes back from what it waits for."""
        if not self._future.done() and (ident := self._thread.ident) is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt))


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
def _private_node() -> Iterator[None]:
    """Let Ray keep 127.0.0.1, which it otherwise replaces by the machine's address for others, and leave UNUSED out.

    Ray reads its switch for the former (in LOCAL_ENVIRONMENT) when it is imported, which may have happened before; for
    the latter it has none. A release that names them otherwise starts them.
    """
    from ray._private import node, ray_constants

    replaced: list[tuple[Any, str, Any]] = [(ray_constants, "ENABLE_RAY_CLUSTER", False)]
    replaced += [(node.Node, name, lambda *_, **__: None) for name in UNUSED if hasattr(node.Node, name)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


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
