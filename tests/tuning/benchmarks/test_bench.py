"""Rounds of fresh processes: by turns, nothing lost by a failure or Ctrl-C, a missing package named with its remedy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from blues.errors import ConfigError
from tuning.benchmarks.bench import Bench, Call, MeasurementFailed, Probe
from tuning.benchmarks.record import Record

MEASURED = """
import os, pathlib, sys, time

def note(meter, log, name):
    with open(log, "a") as file:
        file.write(f"{name} {os.getpid()}\\n")
    return {"MB/s": 7.0}

def fall(meter):
    print("warming up")
    raise RuntimeError("the disk is on fire")

def die(meter):
    os.abort()

def wait(meter, started):
    pathlib.Path(started).write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def bench(tmp_path) -> Bench:
    (tmp_path / "measured.py").write_text(MEASURED)
    lines: list[str] = []
    made = Bench(tmp_path / "work", Record(tmp_path / "r.json", {}), repeat=2, say=lines.append)
    made.begin("group", "of tests")
    return made


def call(tmp_path, function, **arguments) -> Call:
    return Call(str(tmp_path / "measured.py"), function, arguments)


def noting(tmp_path, name) -> Probe:
    return Probe(name, "blues", call(tmp_path, "note", log=str(tmp_path / "log"), name=name), ("MB/s",))


def test_probes_take_turns_each_run_in_a_process_of_its_own(bench, tmp_path):
    made = bench.measure("group", [noting(tmp_path, "a"), noting(tmp_path, "b")])
    names, processes = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert names == ("a", "b", "a", "b") and len(set(processes)) == 4
    assert made["a"].spread("MB/s").values == (7.0, 7.0)
    assert all(len(run["load"]) == 3 and run["process_s"] > 0 for run in made["a"].runs)


def test_a_failure_is_recorded_with_its_reason_once_and_stops_nobody(bench, tmp_path):
    probes = [
        Probe("falls", "peer", call(tmp_path, "fall"), ("MB/s",)),
        Probe("dies", "peer", call(tmp_path, "die"), ("MB/s",)),
        noting(tmp_path, "a"),
    ]
    made = bench.measure("group", probes)
    assert "the disk is on fire (exit status 1; everything it wrote:" in made["falls"].problem
    assert f"killed by signal {int(signal.SIGABRT)}" in made["dies"].problem
    assert len(made["a"].runs) == 2 and bench.record.failed == [made["falls"], made["dies"]]
    log = made["falls"].problem.rpartition(": ")[2].rstrip(")")
    assert "warming up" in open(log).read()  # noqa: SIM115
    saved = json.loads((tmp_path / "r.json").read_text())["measurements"]
    assert [bool(tree["problem"]) for tree in saved] == [True, True, False]


def test_what_cannot_be_made_ready_is_a_failure_of_that_probe_alone(bench, tmp_path):
    def before():
        raise MeasurementFailed("no room")

    lost = Probe("lost", "peer", call(tmp_path, "note", log="", name=""), ("MB/s",), before=before)
    made = bench.measure("group", [lost, noting(tmp_path, "a")])
    assert made["lost"].problem == "no room" and len(made["a"].runs) == 2


def test_a_package_that_is_not_there_is_named_with_the_command_and_skipped_visibly(bench, tmp_path):
    missing = Call(str(tmp_path / "measured.py"), "fall", {}, packages=("numpy", "no-such-package"))
    made = bench.measure("group", [Probe("peer", "peer", missing, ("MB/s",), before=pytest.fail)])
    sentence = f"no-such-package not installed; {sys.executable} -m pip install no-such-package"
    assert made["peer"].problem == sentence and made["peer"].skipped and not bench.record.failed
    assert "numpy" in made["peer"].versions
    assert f"skipped: {sentence}" in bench.record.table()


def test_an_interpreter_that_cannot_be_run_is_named(bench, tmp_path):
    absent = Call(str(tmp_path / "measured.py"), "fall", {}, python=str(tmp_path / "python"), packages=("numpy",))
    with pytest.raises(ConfigError, match="--peer-python"):
        bench.measure("group", [Probe("peer", "peer", absent, ("MB/s",))])


def test_ctrl_c_ends_the_measured_process_too(tmp_path):
    (tmp_path / "measured.py").write_text(MEASURED)
    started = tmp_path / "started"
    code = (
        "from pathlib import Path; from tuning.benchmarks.bench import *; from tuning.benchmarks.record import Record\n"
        f"bench = Bench(Path({str(tmp_path / 'work')!r}), Record(Path({str(tmp_path / 'r.json')!r}), {{}}))\n"
        f"bench.call(Call({str(tmp_path / 'measured.py')!r}, 'wait', {{'started': {str(started)!r}}}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode and b"KeyboardInterrupt" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_no_rounds_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--repeat must be at least 1, got 0"):
        Bench(tmp_path, Record(tmp_path / "r.json", {}), repeat=0)
