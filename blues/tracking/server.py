"""One local MLflow server per directory, shared by every Blues process that uses the directory.

In: a directory. Out: a `LocalServer` with the URL of a running server; the server ends soon after its last user ends,
however that user ends.

Three locks (flock: the kernel frees them when a process dies) say everything:
- users.lock: every user holds it shared. The server tries to get it exclusively each second; when it can, nobody is
  left, and it stops. A user who comes at that moment waits until the server is gone, then starts a new one.
- server.lock: the server holds it for life, so free means that no server runs, whatever server.json says.
- start.lock: held while a user looks for a server or starts one, so that two do not start at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import requests

from blues.errors import TrackingError

START_S = 120.0
"""How long a start may take; the first one creates the database (2.5 s on two cores, much more on a cold disk)."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What server.json says about a running server."""

    pid: int
    started: float
    """Start of the process in seconds since 1970: a later process with the same pid is not the server."""
    port: int
    url: str


class LocalServer:
    """A use of the directory's server; `close` (or the end of this process) ends the use.

    Args:
        directory: made when absent; a folder of a local disk.
        port: 0 takes a free one. Ignored when a server already runs (look at `url`).
        timeout_s: how long to wait for the server to answer.

    Raises:
        TrackingError: the directory cannot be used, or the server does not start (with the end of its log).
    """

    def __init__(self, directory: str | Path, *, port: int = 0, timeout_s: float = START_S) -> None:
        self.directory = Path(directory).resolve()
        self._port = port
        self._child: subprocess.Popen | None = None
        deadline = time.monotonic() + timeout_s
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._users = open(self.directory / "users.lock", "a")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise TrackingError(
                f"cannot use {str(self.directory)!r} for the MLflow server: {error.strerror}; "
                "set tracking.directory to a folder that you can write"
            ) from None
        try:
            self._lock(self._users, fcntl.LOCK_SH, deadline)
            self._entry = self._find_or_start(deadline)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return self._entry.url

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._entry.pid

    def ensure(self, timeout_s: float = START_S) -> str:
        """The URL of the server, which is started again when it has died.

        Raises:
            TrackingError: it does not start, or it hangs.
        """
        self._entry = self._find_or_start(time.monotonic() + timeout_s)
        return self.url

    def close(self) -> None:
        """End this use. The server stops within seconds if it was the last."""
        self._users.close()

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_or_start(self, deadline: float) -> Entry:
        with open(self.directory / "start.lock", "a") as start:
            self._lock(start, fcntl.LOCK_EX, deadline)
            tried = False
            while time.monotonic() < deadline:
                entry = read_entry(self.directory)
                if entry is not None and _answers(entry):
                    return entry
                if self._child is not None and self._child.poll() is not None:
                    self._child = None
                    if tried:
                        raise TrackingError(f"the local MLflow server did not start{self._log_tail()}")
                if not tried and not is_running(self.directory):
                    self._child, tried = self._start(), True
                time.sleep(0.05)
        raise TrackingError(f"the local MLflow server over {str(self.directory)!r} does not answer{self._log_tail()}")

    def _start(self) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "blues.tracking.server_process", str(self.directory)]
        with open(self.directory / "server.log", "wb") as log:
            return subprocess.Popen(
                [*command, "--port", str(self._port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the user's program, which may still have points to send
            )

    def _log_tail(self, lines: int = 6) -> str:
        path = self.directory / "server.log"
        try:
            text = path.read_text(errors="replace").strip().splitlines()
        except OSError:
            text = []
        if not text:
            return f" and left no log in {str(path)!r}"
        return f"; the last lines of {str(path)!r} are:\n" + "\n".join(text[-lines:])

    def _lock(self, file: IO, kind: int, deadline: float) -> None:
        while True:
            try:
                return fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"the local MLflow server over {str(self.directory)!r} neither answers nor ends; "
                        f"end its process (see {str(self.directory / 'server.json')!r}) and try again"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                raise TrackingError(
                    f"{str(self.directory)!r} is on a file system without file locks ({error.strerror}); "
                    "set tracking.directory to a folder of a local disk, or tracking.uri to an MLflow server"
                ) from None


def is_running(directory: str | Path) -> bool:
    """Whether a server process has the directory, be it starting, serving or stopping."""
    try:
        with open(Path(directory) / "server.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def read_entry(directory: str | Path) -> Entry | None:
    """The directory's server.json if it tells of a living process; None when absent, damaged or stale."""
    try:
        entry = Entry(**json.loads((Path(directory) / "server.json").read_text()))
        process = psutil.Process(entry.pid)
        # the start time is counted from the boot, whose clock may be corrected by a little
        same = abs(process.create_time() - entry.started) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return entry if same else None


def _answers(entry: Entry) -> bool:
    session = requests.Session()
    session.trust_env = False  # a proxy of the environment must not see 127.0.0.1
    try:
        return session.get(f"{entry.url}/health", timeout=2).ok
    except requests.RequestException:
        return False
    finally:
        session.close()
