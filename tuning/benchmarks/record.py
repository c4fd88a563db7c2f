"""What a benchmark leaves: figures with their spread, and everything that decides them.

In: measurements as they come. Out: a JSON file that is rewritten after each of them, so that an interruption loses
none, and a table for the terminal.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

import blues
from blues.config import write_atomic
from blues.table import align
from blues.tracking.provenance import git_commit
from tuning.benchmarks.worker import COUNTER

FORMAT, FORMAT_VERSION = "blues-benchmark", 2
Side = Literal["blues", "peer", "reference"]


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (0 for a single value) and range of repeated runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def range(self) -> str:
        """` (800 to 824)`; nothing where all runs came to the same."""
        least, most = min(self.values), max(self.values)
        return f" ({number(least)} to {number(most)})" if most > least else ""

    def tree(self) -> dict[str, Any]:
        found = {"mean": self.mean, "deviation": self.deviation, "min": min(self.values), "max": max(self.values)}
        return {**found, "values": list(self.values)}

    def __str__(self) -> str:
        """`812 +- 12`; without a spread where there was one run."""
        shown = number(self.mean)
        return f"{shown} ± {number(self.deviation)}" if len(self.values) > 1 else shown


@dataclass
class Measurement:
    """One thing that was measured, run after run.

    side: ours, another project's, or a bound that neither can beat. note: what it does, and where that differs from the
    others. metrics: the columns of the table, the first one is drawn. of: how much data it worked on, in words.
    problem: why there are no (more) runs; skipped: whether that is because it is not installed.
    """

    group: str
    name: str
    side: Side
    note: str
    metrics: tuple[str, ...]
    of: str = ""
    runs: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    skipped: bool = False

    @property
    def title(self) -> str:
        """The name with how much data."""
        return f"{self.name}, {self.of}" if self.of else self.name

    def spread(self, metric: str) -> Spread | None:
        """Of a metric over the runs; None if no run has it."""
        values = tuple(float(run[metric]) for run in self.runs if run.get(metric) is not None)
        return Spread(values) if values else None

    def tree(self) -> dict[str, Any]:
        spreads = {metric: self.spread(metric) for metric in self.metrics}
        summary = {metric: spread.tree() for metric, spread in spreads.items() if spread is not None}
        return {**asdict(self), "metrics": list(self.metrics), "summary": summary}


@dataclass(frozen=True)
class Figure:
    """A headline: what was asked of this group, and what came out. of: of how much data, in words. at_least, at_most:
    the goal, if there is one."""

    group: str
    name: str
    spread: Spread
    unit: str
    of: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the mean reaches the goal; None without a goal."""
        return self._reaches(self.spread.mean)

    @property
    def met_in(self) -> int | None:
        """How many of the repeats reach it; None without a goal."""
        return None if self.met is None else sum(bool(self._reaches(value)) for value in self.spread.values)

    @property
    def verdict(self) -> str:
        """`met`, `met, but not in every repeat`, or `NOT met`; nothing without a goal."""
        if not self.met:
            return "" if self.met is None else "NOT met"
        repeats = len(self.spread.values)
        return "met" if self.met_in == repeats else f"met, but not in every repeat ({self.met_in} of {repeats})"

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f">= {number(self.at_least)}"
        return "" if self.at_most is None else f"<= {number(self.at_most)}"

    def tree(self) -> dict[str, Any]:
        judged = {"met": self.met, "met_in": self.met_in, "verdict": self.verdict}
        return {**asdict(self), "spread": self.spread.tree(), **judged}

    def __str__(self) -> str:
        """`name, of how much: 62.0 ± 1.2 MB/s (61.0 to 63.3), goal >= 60.0: met`."""
        name = f"{self.name}, {self.of}" if self.of else self.name
        verdict = f", goal {self.goal}: {self.verdict}" if self.verdict else ""
        return f"{name}: {self.spread} {self.unit}".rstrip() + self.spread.range + verdict

    def _reaches(self, value: float) -> bool | None:
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


@dataclass
class Record:
    """Everything of one benchmark. `groups`: title of each group that was begun, and the load of the machine then."""

    path: Path
    options: Mapping[str, Any]
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    interrupted: bool = False

    def save(self) -> None:
        """Write the file, atomically."""
        commit, dirty = git_commit(Path(blues.__file__).parent)
        tree = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "began": self.began,
            "interrupted": self.interrupted,
            "options": dict(self.options),
            "commit": commit,
            "dirty": dirty,
            "device": device(),
            "versions": versions(),
            "groups": self.groups,
            "figures": [figure.tree() for figure in self.figures],
            "measurements": [measurement.tree() for measurement in self.measurements],
        }
        write_atomic(self.path, json.dumps(tree, indent=1, ensure_ascii=False).encode())

    @property
    def failed(self) -> list[Measurement]:
        """What could not be measured though it was there."""
        return [measurement for measurement in self.measurements if measurement.problem and not measurement.skipped]

    def table(self) -> str:
        """Every group with its measurements and figures, for a terminal."""
        return "\n\n".join("\n".join(self._group(name)) for name in self.groups)

    def _group(self, name: str) -> list[str]:
        own = [measurement for measurement in self.measurements if measurement.group == name]
        lines = [f"{name}: {self.groups[name]['title']}"]
        columns = list(dict.fromkeys(metric for m in own if m.runs for metric in m.metrics))
        rows = [["", *columns]]
        for measurement in own:
            if measurement.runs:
                spreads = [measurement.spread(column) for column in columns]
                rows.append([_label(measurement), *("" if spread is None else str(spread) for spread in spreads)])
        lines += [f"  {line}" for line in align(rows)] if len(rows) > 1 else []
        lines += [f"  {_label(measurement)}: {_why(measurement)}" for measurement in own if measurement.problem]
        lines += self.busy(own) + self._uncounted(own)
        return lines + [f"  = {figure}" for figure in self.figures if figure.group == name]

    def busy(self, own: Sequence[Measurement]) -> list[str]:
        """How busy the machine was with other work when the runs began, if it was."""
        loads = [run["load"][0] for measurement in own for run in measurement.runs]
        cores = len(os.sched_getaffinity(0))
        if max(loads, default=0.0) <= cores:
            return []
        busy = f"load {min(loads):.1f} to {max(loads):.1f} on {cores} cores"
        return [f"  the machine was busy with other work, {busy}; trust rates a core"]

    def _uncounted(self, own: Sequence[Measurement]) -> list[str]:
        """Where processor time could not be counted as it should be, see `ProcessorTime`."""
        ways = {run.get("processor_time", COUNTER) for measurement in own for run in measurement.runs} - {COUNTER}
        remedy = "sysctl kernel.perf_event_paranoid=2, or run as root"
        return [f"  processor time by {way}, without that of Ray's processes; {remedy}" for way in sorted(ways)]


def _label(measurement: Measurement) -> str:
    return f"{measurement.side:<9}  {measurement.title}"


def _why(measurement: Measurement) -> str:
    return f"{'skipped' if measurement.skipped else 'FAILED'}: {measurement.problem}"


def number(value: float) -> str:
    """Three significant digits without an exponent: `0.123`, `12.3`, `1,234`."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def ratio(numerator: Spread, denominator: Spread, scale: float = 1.0) -> Spread:
    """The ratio of runs that were made one after the other in the same round; of the means if a run is missing."""
    if len(numerator.values) == len(denominator.values):
        return Spread(tuple(scale * a / b for a, b in zip(numerator.values, denominator.values, strict=True)))
    return Spread((scale * numerator.mean / denominator.mean,))


def device() -> dict[str, Any]:
    """The machine: processor, cores (of the machine, and open to this process), memory and system."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(packages: Sequence[str] = ("numpy", "pyarrow", "ray", "tiktoken", "torch", "xxhash")) -> dict[str, str]:
    """Blues, Python, and those of the packages that are installed."""
    found = {"blues": blues.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
