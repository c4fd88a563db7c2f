"""What a benchmark of variants says: differences to the default with what chance alone would make of them.

In: measurements of a group, the default first, whose runs have a seed. Out: `Difference`s, and a table.

Runs of the same seed are compared with one another, so that what a seed does to both falls out. An interval is
Student's for 95%, widened for the number of variants that are compared with the same default (Bonferroni): of groups
in which nothing differs at most one in twenty shows a difference. Where it holds zero, the figures cannot tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blues.table import align
from tuning.benchmarks.record import Measurement, Record, Spread
from tuning.compare import t_quantile

METRICS = ("step ms", "cpu ms", "peak MB", "validation loss")
WORDS = {
    "step ms": ("faster", "slower"),
    "cpu ms": ("less", "more"),
    "peak MB": ("less", "more"),
    "validation loss": ("better", "worse"),
}
"""What less of a metric is called, and what more of it is."""
RELATIVE = ("step ms", "cpu ms")
"""Metrics whose differences are in percent of the default."""


@dataclass(frozen=True)
class Difference:
    """Of a metric to the default, seed by seed. comparisons: variants that are compared with this default."""

    metric: str
    values: tuple[float, ...]
    comparisons: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half(self) -> float | None:
        """Half the width of the interval; None for one seed."""
        seeds = len(self.values)
        if seeds < 2:
            return None
        return t_quantile(seeds - 1, self.comparisons) * statistics.stdev(self.values) / math.sqrt(seeds)

    @property
    def tells(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `cannot tell`."""
        less, more = WORDS[self.metric]
        return (less if self.mean < 0 else more) if self.tells else "cannot tell"

    def tree(self) -> dict[str, Any]:
        unit = "%" if self.metric in RELATIVE else self.metric
        found = {"mean": self.mean, "half": self.half, "verdict": self.verdict, "comparisons": self.comparisons}
        return {**found, "unit": unit, "values": list(self.values)}

    def __str__(self) -> str:
        """`-0.0310 ± 0.0120 better`."""
        if self.metric in RELATIVE:
            form, unit = ".1f", "%"
        else:
            form, unit = (".4f", "") if "loss" in self.metric else (".1f", " MB")
        half = "" if self.half is None else f" ± {self.half:{form}}"
        return f"{self.mean:+{form}}{half}{unit} {self.verdict}"


def against_default(made: Sequence[Measurement]) -> list[tuple[Measurement, dict[str, Difference]]]:
    """Every variant that shares a seed with the default, which is the first, with its differences by metric."""
    default, *others = made
    measured = [other for other in others if other.runs]
    base = {run["seed"]: run for run in default.runs}
    found = []
    for other in measured:
        pairs = [(run, base[run["seed"]]) for run in other.runs if run["seed"] in base]
        if pairs:
            differences = {
                metric: Difference(metric, tuple(_difference(metric, *pair) for pair in pairs), len(measured))
                for metric in METRICS
            }
            found.append((other, differences))
    return found


def _difference(metric: str, run: dict[str, Any], default: dict[str, Any]) -> float:
    if metric in RELATIVE:
        return 100 * (run[metric] / default[metric] - 1)
    return run[metric] - default[metric]


def table(record: Record) -> str:
    """Every group for a terminal: the figures, then the differences to the default, paired by seed."""
    return "\n\n".join("\n".join(_group(record, name)) for name in record.groups)


def _group(record: Record, name: str) -> list[str]:
    own = [measurement for measurement in record.measurements if measurement.group == name]
    lines = [f"{name}: {record.groups[name]['title']}"]
    if any(measurement.runs for measurement in own):
        rows = [_row(measurement, own[0]) for measurement in own if measurement.runs]
        lines += [f"  {line}" for line in align([["mean ± deviation over seeds", "seeds", *METRICS], *rows])]
    if compared := against_default(own) if own else []:
        head = ["difference ± half of the 95% interval", *METRICS]
        rows = [[other.name, *(str(found[metric]) for metric in METRICS)] for other, found in compared]
        lines += ["", *(f"  {line}" for line in align([head, *rows]))]
    for measurement in own:
        if measurement.problem:
            lines.append(
                f"  {measurement.name}: {'skipped' if measurement.skipped else 'FAILED'}: {measurement.problem}"
            )
    return lines + record.busy(own)


def _row(measurement: Measurement, default: Measurement) -> list[str]:
    name = f"{measurement.name} (default)" if measurement is default else measurement.name
    spreads = {metric: measurement.spread(metric) for metric in METRICS}
    figures = [_figure(metric, spread) for metric, spread in spreads.items() if spread is not None]
    return [name, str(len(measurement.runs)), *figures]


def _figure(metric: str, spread: Spread) -> str:
    """A loss has four digits: it differs in the third."""
    if "loss" not in metric:
        return str(spread)
    return f"{spread.mean:.4f}" + (f" ± {spread.deviation:.4f}" if len(spread.values) > 1 else "")
