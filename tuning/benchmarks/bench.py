"""Runs measurements: each in a fresh process, in rounds, ours and the peers' by turns.

In: probes (a function of a file, its arguments, the interpreter it runs in). Out: their figures in a `Record`.

A fresh process for every run: nobody profits from what another one loaded, and memory is counted from the same start.
Rounds, not one probe after the other: if the machine slows down, it does so for all. What fails or is not installed is
recorded with its reason and does not stop the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blues.config import write_atomic
from blues.errors import BluesError, ConfigError
from tuning.benchmarks import worker
from tuning.benchmarks.record import Figure, Measurement, Record, Side, Spread

GRACE_S = 20.0
"""How long an interrupted measurement has to end by itself."""
_ASK = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


class MeasurementFailed(BluesError):
    """A process of a measurement that ended without an answer; says what it wrote last and where all of it stands."""


@dataclass(frozen=True)
class Call:
    """A function of a Python file, called in a process of its own: `function(Meter, **arguments)` returns figures.

    python: the interpreter. packages: distributions that it needs there. environment: variables beside the own ones.
    """

    file: str
    function: str
    arguments: Mapping[str, Any]
    python: str = sys.executable
    packages: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A measurement that is to be made. See `Measurement`.

    of: how much data, in words. before: called ahead of every run, not measured. judge: makes the figures of what the
    call returns.
    """

    name: str
    side: Side
    call: Call
    metrics: tuple[str, ...]
    note: str = ""
    before: Callable[[], object] = lambda: None
    of: str = ""
    judge: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer


@dataclass
class Bench:
    """A benchmark that is running. work: folder for data, requests and logs. say: shows a line of progress."""

    work: Path
    record: Record
    repeat: int = 3
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    _versions: dict[tuple[str, tuple[str, ...]], dict[str, str | None]] = field(default_factory=dict)
    _calls: int = 0

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ConfigError(f"--repeat must be at least 1, got {self.repeat}")

    def begin(self, group: str, title: str, **facts: Any) -> None:
        """Start a group: how its table is headed, and facts of its data for the record."""
        self.record.groups[group] = {"title": title, "load": os.getloadavg(), **facts}
        self.record.save()
        self.say(f"{group}: {title}")

    def measure(self, group: str, probes: Sequence[Probe]) -> dict[str, Measurement]:
        """Run all probes of a group, `repeat` rounds of them. Returns the measurements by name."""
        made = {}
        for probe in probes:
            measurement = Measurement(group, probe.name, probe.side, probe.note, probe.metrics, probe.of)
            self.record.measurements.append(measurement)
            made[probe.name] = measurement
            self._find_versions(probe, measurement)
        for turn in range(1, self.repeat + 1):
            for probe in probes:
                if made[probe.name].problem is None:
                    self._run(probe, made[probe.name], turn)
        self.record.save()
        return made

    def _run(self, probe: Probe, measurement: Measurement, turn: int) -> None:
        load, began = os.getloadavg(), time.monotonic()
        try:
            probe.before()
            answer = probe.judge(self.call(probe.call))
        except (BluesError, OSError) as error:
            measurement.problem = str(error)
            self.say(f"  {probe.name}: FAILED: {error}")
        else:
            measurement.runs.append({**answer, "load": load, "process_s": time.monotonic() - began})
            shown = (
                f"{metric} {Spread((answer[metric],))}" for metric in probe.metrics if answer.get(metric) is not None
            )
            self.say(f"  {probe.name}, {turn} of {self.repeat}: {', '.join(shown)}")
        self.record.save()

    def figure(self, group: str, name: str, spread: Spread | None, unit: str, *, of: str = "", **goal: float) -> None:
        """Record a headline of a group, if there is a value for it. of: how much data, in words. goal: at_least or
        at_most."""
        if spread is not None:
            self.record.figures.append(Figure(group, name, spread, unit, of, **goal))
            self.record.save()

    def lose(self, group: str, problem: str) -> None:
        """Record that a group could not be measured (any further)."""
        self.record.groups.setdefault(group, {"title": "could not be set up"})
        self.record.measurements.append(Measurement(group, "the rest of the group", "blues", "", (), problem=problem))
        self.record.save()
        self.say(f"{group}: FAILED: {problem}")

    def call(self, call: Call) -> dict[str, Any]:
        """Make a call in a fresh process.

        Raises:
            MeasurementFailed: the process ended without an answer.
        """
        self._calls += 1
        folder = self.work / "calls"
        folder.mkdir(parents=True, exist_ok=True)
        request, reply, log = (folder / f"{self._calls:03d}-{call.function}.{kind}" for kind in ("in", "out", "log"))
        asked = {"file": call.file, "function": call.function, "arguments": dict(call.arguments)}
        write_atomic(request, json.dumps(asked).encode())
        reply.unlink(missing_ok=True)
        command = [call.python, "-P", worker.__file__, str(request), str(reply)]
        with open(log, "wb") as output:
            status = _spawn(command, output, os.environ | dict(call.environment))
        if status or not reply.exists():
            raise MeasurementFailed(_why(status, log))
        return json.loads(reply.read_text(encoding="utf-8"))

    def missing(self, call: Call) -> str | None:
        """Which packages a call needs and does not have, with the remedy; None if all are there."""
        absent = [name for name, version in self._installed(call).items() if version is None]
        if not absent:
            return None
        return f"{', '.join(absent)} not installed; {call.python} -m pip install {' '.join(absent)}"

    def _find_versions(self, probe: Probe, measurement: Measurement) -> None:
        measurement.problem = self.missing(probe.call)
        measurement.skipped = measurement.problem is not None
        measurement.versions = {name: version for name, version in self._installed(probe.call).items() if version}
        if measurement.skipped:
            self.say(f"  {probe.name}: skipped: {measurement.problem}")

    def _installed(self, call: Call) -> dict[str, str | None]:
        key = (call.python, call.packages)
        if key not in self._versions:
            self._versions[key] = installed(call.python, call.packages) if call.packages else {}
        return self._versions[key]


def installed(python: str, packages: Sequence[str]) -> dict[str, str | None]:
    """Version of each package in the environment of an interpreter, None where it is not there.

    Raises:
        ConfigError: the interpreter cannot be run.
    """
    try:
        done = subprocess.run([python, "-P", "-c", _ASK, *packages], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ConfigError(f"{python!r} is no Python of 3.11 or newer that runs ({error}); mend --peer-python") from None


def _spawn(command: Sequence[str], output: Any, environment: Mapping[str, str]) -> int:
    """Run a command to its end, in a process group of its own. Its exit status.

    Ctrl-C is passed on to the group, so that what it started (Ray, data loaders) ends with it.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
    )
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _why(status: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it wrote nothing"
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{last} ({ended}; everything it wrote: {log})"
