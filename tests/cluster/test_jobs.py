"""Jobs on a Ray cluster: the log and the exit status come back, mistakes become sentences, nothing stays behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest

from blues.cluster import jobs
from blues.errors import ClusterError

pytestmark = pytest.mark.ray

PROBE = """
import os, sys, time
def main(kind, *words):
    if kind == "say":
        print("said", *words, os.getcwd(), os.environ["RAY_ADDRESS"].split(":")[0])
    elif kind == "fail":
        print("failing"); raise SystemExit(int(words[0]))
    elif kind == "wait":
        print("waiting", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("saved", flush=True); raise SystemExit(130)
    elif kind == "die":
        os.kill(os.getpid(), 9)
main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a `jobs` package whose one job does as it is told, ahead of Blues' own on the path."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").touch()
    (folder / "jobs" / "probe.py").write_text(PROBE)
    return folder


@pytest.fixture(scope="module")
def server(home):
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(home)
    try:
        with jobs.local_cluster(num_cpus=1, folder=home) as server:
            yield server
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run(server, *arguments, **options) -> tuple[int, str]:
    out = io.StringIO()
    status = jobs.follow(server, jobs.submit(server, "probe", arguments, **options), out)
    return status, out.getvalue()


def test_a_job_runs_in_the_folder_attached_to_its_cluster_and_its_log_comes_back(server, home):
    status, log = run(server, "say", "two words", "it's", submission_id="twice")
    assert status == 0
    assert f"said two words it's {home} 127.0.0.1" in log


def test_the_exit_status_is_the_jobs_own(server):
    assert run(server, "fail", "2")[0] == 2
    assert run(server, "die")[0] == 128 + signal.SIGKILL


def test_a_taken_submission_id_is_one_sentence(server):
    if "twice" not in {job.submission_id for job in jobs.connect(server).list_jobs()}:
        assert run(server, "say", submission_id="twice")[0] == 0
    with pytest.raises(ClusterError, match=r"^submission id 'twice' is taken on http://127.0.0.1:\d+; give another"):
        jobs.submit(server, "probe", ["say"], submission_id="twice")


def test_stop_is_a_ctrl_c_for_the_job(server):
    name = jobs.submit(server, "probe", ["wait"])
    client = jobs.connect(server)
    while "waiting" not in client.get_job_logs(name):
        time.sleep(0.1)
    assert jobs.stop(server, name) == "saved"
    out = io.StringIO()
    assert jobs.follow(server, name, out) != 0


def test_a_job_that_does_not_exist_is_one_sentence(server):
    with pytest.raises(ClusterError, match=r"following job 'nobody': no such job on"):
        jobs.follow(server, "nobody", io.StringIO())


def test_a_cluster_that_wants_a_token_says_which_variables_to_set(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        stranger = jobs.JobServer(address=server.address, headers=headers)
        with pytest.raises(ClusterError, match="refused this user: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
            jobs.connect(stranger)


def test_the_address_given_wins_over_the_environment(server, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert jobs.connect(server).get_version()
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


def test_nobody_at_the_address_is_one_sentence():
    with pytest.raises(ClusterError, match="no Ray cluster answers at http://127.0.0.1:9; check the address"):
        jobs.connect(jobs.server_at("127.0.0.1:9"))


def test_only_the_loopback_interface_is_opened(server):
    port = int(server.address.rpartition(":")[2])
    head = next(p for p in psutil.Process().children(recursive=True) if _listens(p, port))
    while head.parent().pid != os.getpid():
        head = head.parent()
    open_to = {c.laddr.ip for p in [head, *head.children(recursive=True)] for c in _listening(p)}
    assert open_to <= {"127.0.0.1", "::ffff:127.0.0.1"} and open_to


def _listening(process):
    return [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]


def _listens(process, port: int) -> bool:
    return any(connection.laddr.port == port for connection in _listening(process))


def test_the_cluster_ends_with_its_starter_even_by_sigkill(tmp_path):
    code = textwrap.dedent("""
        import sys
        from blues.cluster import jobs
        with jobs.local_cluster(num_cpus=1, folder=sys.argv[1]):
            print("up", flush=True); sys.stdin.read()
    """)
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None and starter.stdout.readline() == "up\n"
    family: list[psutil.Process] = []
    while not any("raylet" in process.name() for process in family):
        time.sleep(0.2)
        family = psutil.Process(starter.pid).children(recursive=True)
    time.sleep(1.0)  # Ray takes half a minute to notice the signal if it comes while the raylet is starting
    starter.kill()
    starter.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_leaving_the_block_stops_every_process_and_removes_the_folder(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    with jobs.local_cluster(num_cpus=1, folder=tmp_path):
        family = set(psutil.Process().children(recursive=True)) - before
        (home,) = {word.partition("=")[2] for p in family for word in p.cmdline() if word.startswith("--temp-dir=")}
        assert os.path.isdir(home)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not os.path.exists(home)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (None, "python -m jobs.train tiny 'a b'"),
        ("/x y", f"cd '/x y' && exec {sys.executable} -P -m jobs.train tiny 'a b'"),
    ],
)
def test_the_entrypoint_quotes_what_a_shell_would_split(folder, expected):
    assert jobs.entrypoint("train", ["tiny", "a b"], folder) == expected


class Flaky:
    """A job server whose log breaks off after `held` seconds at each piece, on a clock of its own."""

    def __init__(self, pieces, held):
        self.pieces, self.held, self.now, self.tails = pieces, held, 1000.0, 0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def get_job_info(self, submission_id):
        ended = self.tails > len(self.pieces)
        status = SimpleNamespace(is_terminal=lambda: ended, value="SUCCEEDED" if ended else "RUNNING")
        return SimpleNamespace(status=status, driver_exit_code=0)

    async def tail_job_logs(self, submission_id):
        self.tails += 1
        yield "".join(self.pieces[: self.tails])
        self.now += self.held
        if self.tails <= len(self.pieces):
            raise RuntimeError("the connection broke")


@pytest.mark.parametrize("held", [3600.0, 0.0])
def test_a_log_that_breaks_off_is_taken_up_again_and_printed_once(monkeypatch, held):
    flaky, out = Flaky([f"piece {n}\n" for n in range(5)], held), io.StringIO()
    monkeypatch.setattr(jobs, "connect", lambda server: flaky)
    monkeypatch.setattr(jobs, "time", flaky)
    assert jobs.follow(jobs.JobServer(address="http://127.0.0.1:1"), "job", out) == 0
    assert out.getvalue() == "".join(flaky.pieces)


def test_a_cluster_that_stays_away_for_a_minute_ends_the_following(monkeypatch):
    flaky = Flaky([""] * 1000, 0.0)
    monkeypatch.setattr(jobs, "connect", lambda server: flaky)
    monkeypatch.setattr(jobs, "time", flaky)
    with pytest.raises(ClusterError):
        jobs.follow(jobs.JobServer(address="http://127.0.0.1:1"), "job", io.StringIO())
    assert 60 <= flaky.now - 1000 < 70
