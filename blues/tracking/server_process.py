"""The local MLflow server: one process, `python -m blues.tracking.server_process DIRECTORY [--port N]`.

In: a directory (DIRECTORY/mlflow.db, DIRECTORY/artifacts). Out: MLflow's pages and API on 127.0.0.1, and
DIRECTORY/server.json while it runs. Started by `blues.tracking.server`, which explains the locks.

`mlflow server --workers 1` would do the same with two processes (the command waits while a child serves), in twice the
time, on a port chosen before it is bound, and with a job queue beside it. Here MLflow's application runs in this
process on a socket that is already bound, and the process ends when nobody holds a shared lock on DIRECTORY/users.lock.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import psutil

from blues.config import write_atomic

USERS_POLL_S = 1.0
SHUTDOWN_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Serve until the last user is gone or SIGTERM. Exit code 3: another server has this directory."""
    parser = argparse.ArgumentParser(prog="blues.tracking.server_process", description="The local MLflow server.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    args = parser.parse_args(arguments)
    directory = args.directory.resolve()
    with open(directory / "server.lock", "a") as lock, open(directory / "users.lock", "a") as users:
        if not _lock(lock.fileno(), patience_s=2.0):
            print(f"another server already serves {directory}", file=sys.stderr)
            return 3
        try:
            _serve(directory, args.port, users.fileno())
        finally:
            (directory / "server.json").unlink(missing_ok=True)
    return 0


def _lock(lock: int, patience_s: float) -> bool:
    """Take the server's lock; patient, because who asks whether a server runs holds it for a moment."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _serve(directory: Path, port: int, users: int) -> None:
    listener = _bind(port)
    store = f"sqlite:///{directory}/mlflow.db"
    _set_environment(store, directory / "artifacts")
    # Imported here: MLflow reads its environment when it is imported.
    import uvicorn
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(store, None, "mlflow-artifacts:/")  # creates or migrates the database
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(SHUTDOWN_S))
    server = uvicorn.Server(config)
    threading.Thread(target=_end_with_last_user, args=(server, users), daemon=True).start()
    entry = {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "port": listener.getsockname()[1],
        "url": f"http://127.0.0.1:{listener.getsockname()[1]}",
    }
    write_atomic(directory / "server.json", json.dumps(entry).encode())
    server.run(sockets=[listener])


def _bind(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise SystemExit(f"cannot use port {port} of 127.0.0.1: {error.strerror}") from None
    listener.listen(128)
    return listener


def _set_environment(store: str, artifacts: Path) -> None:
    from mlflow.server import constants

    os.environ.update(
        {
            constants.BACKEND_STORE_URI_ENV_VAR: store,
            constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
            constants.ARTIFACTS_DESTINATION_ENV_VAR: str(artifacts),
            constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        }
    )


def _end_with_last_user(server, users: int) -> None:
    """Ask the server to stop once the users' lock is free, and keep it locked: who comes now waits for our end."""
    while True:
        time.sleep(USERS_POLL_S)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        break
    server.should_exit = True
    time.sleep(2 * SHUTDOWN_S)  # a request that never ends must not keep the process
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
