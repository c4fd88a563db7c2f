"""The figure of a benchmark of variants.

In: a `Record`. Out: a PNG, written whole: for each group a row of panels (validation loss, step time, processor time,
memory) with a line for each variant: its difference to the default, the interval, and a point for each seed. What the
figures cannot tell from the default is grey.
"""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blues.config import write_atomic
from tuning.benchmarks.chart import DPI, GRID, INK, MUTED
from tuning.benchmarks.model.results import Difference, against_default
from tuning.benchmarks.record import Measurement, Record

LESS, MORE, UNTOLD = "#2f6db3", "#d1571f", "#9aa5b1"
PANELS = {
    "validation loss": "validation loss to the default, nats",
    "step ms": "step time to the default, %",
    "cpu ms": "processor time to the default, %",
    "peak MB": "peak memory to the default, MB",
}
ROW_INCHES, HEAD_INCHES = 0.27, 1.05
Compared = list[tuple[Measurement, dict[str, Difference]]]


def draw(record: Record, output: str | Path) -> Path | None:
    """Draw the differences to the default; None if nothing was compared."""
    groups: dict[str, Compared] = {}
    for name in record.groups:
        own = [measurement for measurement in record.measurements if measurement.group == name]
        compared = against_default(own) if own else []
        if compared:
            groups[name] = sorted(compared, key=lambda pair: pair[1]["validation loss"].mean)
    if not groups:
        return None
    heights = [HEAD_INCHES + ROW_INCHES * len(compared) for compared in groups.values()]
    figure = Figure(figsize=(14.0, sum(heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), len(PANELS), squeeze=False, height_ratios=heights, width_ratios=(5, 4, 4, 4))
    for row, (name, compared) in zip(axes, groups.items(), strict=True):
        for panel, metric in zip(row, PANELS, strict=True):
            _panel(panel, compared, metric)
        default = record.groups[name].get("default", "the default")
        row[0].set_yticks(range(len(compared)), [m.name for m, _ in reversed(compared)], fontsize=8, color=INK)
        row[0].set_title(f"{name}, beside {default}", fontsize=11, color=INK, fontweight="bold", loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_atomic(output, buffer.getvalue())
    return Path(output)


def _panel(axes: Axes, compared: Compared, metric: str) -> None:
    for place, (_, differences) in enumerate(reversed(compared)):
        difference = differences[metric]
        color = (LESS if difference.mean < 0 else MORE) if difference.tells else UNTOLD
        axes.plot(difference.values, [place] * len(difference.values), "o", color=color, alpha=0.35, markersize=4)
        axes.errorbar(difference.mean, place, xerr=difference.half, fmt="D", color=color, markersize=5, elinewidth=1.6)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(compared) - 0.4)
    axes.set_xlabel(PANELS[metric], fontsize=8, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    widest = max(max(map(abs, d[metric].values)) for _, d in compared)
    if widest > 0:  # the intervals of few seeds may be far wider than what was seen; they leave the panel then
        axes.set_xlim(-1.6 * widest, 1.6 * widest)
