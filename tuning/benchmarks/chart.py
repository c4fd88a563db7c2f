"""The chart of a benchmark.

In: a `Record`. Out: a PNG, written whole: a panel for each group, a bar for each measurement with its standard
deviation, ours in colour, and the goal of the group's first figure as a line where it is in the bars' unit.
"""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blues.config import write_atomic
from tuning.benchmarks.record import Measurement, Record, number

COLORS = {"blues": "#2f6db3", "peer": "#b9c2cc", "reference": "#e0d3b4"}
INK, MUTED, GRID, GOAL = "#1f2933", "#6b7785", "#e4e8ec", "#d1571f"
DPI, BAR_INCHES, HEAD_INCHES = 150, 0.3, 0.95


def draw(record: Record, output: str | Path) -> Path | None:
    """Draw what was measured; None if nothing was."""
    panels = {name: [m for m in record.measurements if m.group == name and _drawn(m)] for name in record.groups}
    panels = {name: measurements for name, measurements in panels.items() if measurements}
    if not panels:
        return None
    heights = [HEAD_INCHES + BAR_INCHES * len(measurements) for measurements in panels.values()]
    figure = Figure(figsize=(9.5, sum(heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, measurements) in zip(axes, panels.items(), strict=True):
        _panel(panel, name, measurements)
        _goal(panel, record, name, measurements[0].metrics[0])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_atomic(output, buffer.getvalue())
    return Path(output)


def _drawn(measurement: Measurement) -> bool:
    return bool(measurement.metrics) and measurement.spread(measurement.metrics[0]) is not None


def _panel(axes: Axes, name: str, measurements: list[Measurement]) -> None:
    unit = measurements[0].metrics[0]
    for place, measurement in enumerate(reversed(measurements)):
        spread = measurement.spread(unit)
        if spread is None:  # measured in another unit than the first of its group
            continue
        error = spread.deviation if len(spread.values) > 1 else None
        axes.barh(place, spread.mean, xerr=error, color=COLORS[measurement.side], ecolor=MUTED, height=0.68)
        end = (spread.mean + (error or 0.0), place)
        axes.annotate(number(spread.mean), end, (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(measurements)), [m.title for m in reversed(measurements)], fontsize=8, color=INK)
    axes.set_ylim(-0.6, len(measurements) - 0.4)
    axes.set_title(f"{name}: {unit}", fontsize=11, color=INK, fontweight="bold", loc="left")
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.1)


def _goal(axes: Axes, record: Record, name: str, unit: str) -> None:
    for figure in record.figures:
        goal = figure.at_least if figure.at_least is not None else figure.at_most
        if figure.group == name and figure.unit == unit and goal is not None:
            axes.axvline(goal, color=GOAL, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.set_title(f"goal {figure.goal}", fontsize=9, color=GOAL, loc="right")
            return
