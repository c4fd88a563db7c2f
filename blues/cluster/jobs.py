"""Send a job to a Ray cluster, follow its log, and hand back its exit status.

In: a job's name and arguments (`train`, `["tiny", "--data-cache-dir", "data"]`) and a job server. Out: the job's
printed log as it appears, and its exit status. `python -m jobs.NAME ARGUMENTS` is what runs there, as it would here.

Without an address `local_cluster` starts a Ray head for the time of one job: all its ports on 127.0.0.1, behind a
token of its own, in a temporary folder of its own. It is stopped process by process (those it started, no others), and
it stops by itself when its starter is killed.

Reference: Ray Jobs API, https://docs.ray.io/en/latest/cluster/running-applications/job-submission/
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil
import requests

from blues.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

JOB_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # `ray job stop` then does what Ctrl-C does at a terminal: training saves and leaves a resumable run.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
}
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
START_SECONDS = 90.0
AGENT_SECONDS = 30.0
RECONNECT_SECONDS = 60.0
RECONNECT_HELD_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class JobServer:
    """Where jobs are sent. `folder`: the jobs' working directory if they run on this machine, None if elsewhere."""

    address: str
    headers: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


def submit(
    server: JobServer,
    job: str,
    arguments: Sequence[str],
    *,
    working_dir: str | None = None,
    submission_id: str | None = None,
    num_cpus: float = 0,
    num_gpus: float = 0,
) -> str:
    """Start `python -m jobs.JOB ARGUMENTS` on the cluster and return its submission id.

    On another machine `working_dir` (less what .gitignore names) is uploaded and is the job's working directory.
    num_cpus, num_gpus: reserved for the job's driver alone; its workers reserve their own.

    Raises:
        ClusterError: unreachable, unauthorized, a submission id that is taken, a folder too large to upload.
    """
    client = connect(server)
    environment: dict[str, Any] = {"env_vars": dict(JOB_ENVIRONMENT)}
    if server.folder is None and working_dir is not None:
        if not Path(working_dir).is_dir():
            raise ClusterError(f"working directory {working_dir!r} is not a folder; give --working-dir one to upload")
        environment |= {"working_dir": str(Path(working_dir).resolve()), "excludes": ["/.git/", "/.venv/"]}
    give_up = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint(job, arguments, server.folder),
                submission_id=submission_id,
                runtime_env=environment,
                metadata={"blues_job": job},
                entrypoint_num_cpus=num_cpus,
                entrypoint_num_gpus=num_gpus,
            )
        except Exception as error:
            if "No available agent" not in str(error) or time.monotonic() > give_up:
                raise _explained(error, server, f"submitting {job!r}", submission_id) from error
            time.sleep(1.0)  # a head that has just started has no job agent yet


def entrypoint(job: str, arguments: Sequence[str], folder: Path | None = None) -> str:
    """The shell command of a job: in `folder` with this interpreter, or with the cluster's own `python`."""
    words = ["-m", f"jobs.{job}", *arguments]
    if folder is None:
        return shlex.join(["python", *words])
    # -P: a folder of the user's that happens to be called jobs/ must not be taken for Blues' own
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join([sys.executable, '-P', *words])}"


def follow(server: JobServer, submission_id: str, out: TextIO | None = None) -> int:
    """Print the job's log as it grows (to stdout if `out` is None) and return its exit status when it ends.

    A broken connection is taken up again where it broke; the log is printed once.

    Raises:
        ClusterError: the job does not exist, or the cluster was out of reach for a minute.
    """
    client, out = connect(server), out or sys.stdout
    shown, outage_began = 0, 0.0
    try:
        client.get_job_info(submission_id)
    except Exception as error:
        raise _explained(error, server, f"following job {submission_id!r}") from error
    while True:
        attempt_began = time.monotonic()
        try:
            before = shown
            shown = asyncio.run(_tail(client, submission_id, out, shown))
            details = _job_info(client, submission_id, shown)
            if details.status.is_terminal():
                return _exit_status(details, out)
            outage_began = 0.0
            time.sleep(0.2 if shown > before else 1.0)
        except _TailBroken as broken:
            held = time.monotonic() - attempt_began > RECONNECT_HELD_SECONDS
            if broken.shown > shown or held or not outage_began:  # there was contact since the last break
                outage_began = time.monotonic()
            shown = broken.shown
            if time.monotonic() - outage_began > RECONNECT_SECONDS:
                raise _explained(broken.cause, server, f"following job {submission_id!r}") from broken
            time.sleep(1.0)
        except Exception as error:
            raise _explained(error, server, f"following job {submission_id!r}") from error


class _TailBroken(Exception):
    """The log's connection broke after `shown` characters."""

    def __init__(self, shown: int, cause: Exception) -> None:
        super().__init__(str(cause))
        self.shown, self.cause = shown, cause


def _job_info(client: JobSubmissionClient, submission_id: str, shown: int) -> JobDetails:
    try:
        return client.get_job_info(submission_id)
    except OSError as error:  # what both the client and its HTTP library raise for a broken connection
        raise _TailBroken(shown, error) from error


async def _tail(client: JobSubmissionClient, submission_id: str, out: TextIO, shown: int) -> int:
    """Print the log past its first `shown` characters; return how many have been printed in all."""
    import aiohttp

    position = 0
    try:
        async for text in client.tail_job_logs(submission_id):
            fresh = text[max(0, shown - position) :]
            position += len(text)
            shown = max(shown, position)
            out.write(fresh)
            out.flush()
    except (RuntimeError, OSError, aiohttp.ClientError) as error:  # the server closed early, or the network broke
        raise _TailBroken(shown, error) from error
    return shown


def _exit_status(details: JobDetails, out: TextIO) -> int:
    """The process's own status; a job that never started or was stopped gets 1, and the reason is printed."""
    code = details.driver_exit_code
    if details.status.value == "SUCCEEDED":
        return 0
    if code is None:
        reason = (details.message or "no reason was given").strip().splitlines()[0]
        print(f"The job ended as {details.status.value}: {reason}", file=out)
        return 1
    return code if code >= 0 else 128 - code  # killed by a signal: what a shell would report


def stop(server: JobServer, submission_id: str) -> str:
    """Ask the job to stop as by Ctrl-C, wait until it has, and return its last words (the last line of its log).

    Raises:
        ClusterError: the job does not exist or the cluster is out of reach.
    """
    client = connect(server)
    try:
        client.stop_job(submission_id)
        while not client.get_job_status(submission_id).is_terminal():
            time.sleep(0.2)
        return (client.get_job_logs(submission_id).strip().splitlines() or [""])[-1]
    except Exception as error:
        raise _explained(error, server, f"stopping job {submission_id!r}") from error


def connect(server: JobServer) -> JobSubmissionClient:
    """A client of the job server.

    Raises:
        ClusterError: nobody answers at the address, or the cluster wants a token.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports every closed socket
    # Ray lets RAY_ADDRESS override the address given here; the person's own word counts more.
    hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        return JobSubmissionClient(server.address, headers=dict(server.headers))
    except Exception as error:
        raise _explained(error, server, "connecting") from error
    finally:
        os.environ.update(hidden)


def server_at(address: str) -> JobServer:
    """The job server at an address as people type it: `http://HOST:8265`, `HOST:8265`, `ray://HOST:10001`."""
    return JobServer(address=address if "://" in address or address == "auto" else f"http://{address}")


def _explained(error: Exception, server: JobServer, doing: str, submission_id: str | None = None) -> ClusterError:
    """One sentence for what Ray reports as an HTTP status and somebody else's traceback."""
    from ray.exceptions import AuthenticationError

    text, where = str(error), server.address
    if isinstance(error, ClusterError):
        return error
    if isinstance(error, AuthenticationError):
        return ClusterError(
            f"the cluster at {where} refused this user: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or put the token "
            "into ~/.ray/auth_token) as on the cluster's head"
        )
    if "already exists" in text:
        return ClusterError(f"submission id {submission_id!r} is taken on {where}; give another --submission-id")
    if "does not exist" in text and "job" in text.lower():
        return ClusterError(f"{doing}: no such job on {where}; `ray job list --address {where}` shows those it knows")
    if "No available agent" in text:
        return ClusterError(
            f"the cluster at {where} runs no job agent: its port 52365 is probably taken; start the head with "
            "`ray start --head --dashboard-agent-listen-port 0`"
        )
    if "exceeds the maximum size" in text or "size limit" in text.lower():
        return ClusterError(
            "the working directory is too large to upload; name data and runs in .gitignore, or give --working-dir a "
            "folder that holds the code alone"
        )
    if isinstance(error, (ConnectionError, requests.exceptions.RequestException, OSError)):
        return ClusterError(
            f"no Ray cluster answers at {where}; check the address, or start a tunnel with "
            "`ray dashboard cluster.yaml`, or leave --address out to use a local cluster"
        )
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    return ClusterError(f"{doing} at {where} failed: {last}")


@contextlib.contextmanager
def local_cluster(num_cpus: int | None = None, folder: str | Path = ".") -> Iterator[JobServer]:
    """A Ray cluster of this machine for the time of the `with` block; jobs run in `folder`.

    num_cpus: what the cluster offers (None: as many as the machine has).

    Raises:
        ClusterError: Ray did not start; names its log.
    """
    home = Path(tempfile.mkdtemp(prefix="blues-", dir=_short_temporary_folder()))
    token, log = secrets.token_hex(32), home / "start.log"
    port, client_port = _free_ports(2)
    environment = {name: value for name, value in os.environ.items() if name not in ADDRESS_VARIABLES}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for "this machine only": every port on 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    options = {
        "node-ip-address": "127.0.0.1",
        "port": 0,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": 0,
        "dashboard-agent-grpc-port": 0,
        "ray-client-server-port": client_port,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": home,
    } | ({} if num_cpus is None else {"num-cpus": num_cpus})
    command += [f"--{name}={value}" for name, value in options.items()]
    server = JobServer(
        address=f"http://127.0.0.1:{port}",
        headers={"Authorization": f"Bearer {token}"},
        folder=Path(folder).resolve(),
    )
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal is for the job, not for the cluster under it
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        _await_start(process, server, log)
        yield server
    finally:
        stop_process_tree(psutil.Process(process.pid) if process.poll() is None else None)
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def _await_start(process: subprocess.Popen, server: JobServer, log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            answer = requests.get(f"{server.address}/api/version", headers=server.headers, timeout=2)
            if answer.status_code == 200:
                return
        except requests.exceptions.RequestException:
            pass  # not listening yet; the loop has its own end
        if process.poll() is not None or time.monotonic() > give_up:
            lines = log.read_text(errors="replace").strip().splitlines() or ["Ray printed nothing"]
            raise ClusterError(f"a local Ray cluster could not be started: {lines[-1]}")
        time.sleep(0.2)


def stop_process_tree(root: psutil.Process | None, patience: float = 4.0) -> None:
    """Stop one process and all its descendants as they are now: first politely, after `patience` seconds by force."""
    if root is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [*root.children(recursive=True), root]
        root.terminate()  # `ray start --block` ends its own processes in order
        _, alive = psutil.wait_procs(tree, timeout=patience)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=patience)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the starter dies, even by SIGKILL (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _short_temporary_folder() -> str | None:
    """Ray puts sockets deep below its folder and a socket's path has at most 107 bytes: a long TMPDIR will not do."""
    return "/tmp" if len(tempfile.gettempdir()) > 30 and os.access("/tmp", os.W_OK) else None


def _free_ports(count: int) -> list[int]:
    """Distinct loopback ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
