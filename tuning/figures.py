"""The figure of a comparison.

In: a `Comparison`. Out: a PNG, written whole: left the loss over training of every variant (mean and range over
seeds), right the final loss of every run with the variant's mean.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blues.config import write_atomic
from tuning.compare import Comparison, Variant

COLORS = ("#2f6db3", "#d1571f", "#1b9e77", "#8e5bb5", "#c2a21b", "#c7407f", "#4a90a4", "#7a6a53")
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
DPI = 150


def draw_comparison(comparison: Comparison, output: str | Path) -> Path:
    """Draw `comparison` into a PNG file."""
    variants = comparison.variants
    figure = Figure(figsize=(11, max(4.0, 1.8 + 0.45 * len(variants))), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for position, variant in enumerate(variants):
        color = COLORS[position % len(COLORS)]
        _draw_curve(curves, variant, color)
        _draw_ends(ends, variant, len(variants) - 1 - position, color)
    measure = comparison.measure
    _style(curves, f"{measure.capitalize()} over training", "step", "loss (nats per token)")
    _style(ends, f"Final {measure} of every seed", "loss (nats per token)", "")
    curves.legend(frameon=False, fontsize=9, labelcolor=INK)
    ends.set_yticks(range(len(variants)), [variant.name for variant in reversed(variants)], fontsize=9, color=INK)
    ends.set_ylim(-0.6, len(variants) - 0.4)
    ends.xaxis.set_major_locator(MaxNLocator(4))
    curves.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ends.margins(x=0.15)
    ends.grid(axis="x", color=GRID, linewidth=0.8)
    if all(len(variant.runs) == 1 for variant in variants):
        ends.set_xlabel("loss (nats per token); one seed: no spread is known")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_atomic(output, buffer.getvalue())
    return Path(output)


def _draw_curve(axes: Axes, variant: Variant, color: str) -> None:
    """The mean over seeds at the steps that all of them have, in a band from the lowest to the highest."""
    by_step = [dict(run.losses) for run in variant.runs]
    steps = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    losses_SN = np.array([[points[step] for step in steps] for points in by_step])
    if not steps:
        return
    axes.plot(steps, losses_SN.mean(axis=0), color=color, linewidth=1.8, label=variant.name)
    if len(by_step) > 1:
        axes.fill_between(steps, losses_SN.min(axis=0), losses_SN.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _draw_ends(axes: Axes, variant: Variant, height: int, color: str) -> None:
    finals = [values["final_loss"] for values in variant.by_seed.values()]
    axes.plot(finals, [height] * len(finals), "o", color=color, alpha=0.55, markersize=6, markeredgewidth=0)
    mean = variant.mean("final_loss")
    axes.plot([mean, mean], [height - 0.22, height + 0.22], color=color, linewidth=2.5)
    axes.annotate(f"{mean:.3f}", (mean, height + 0.28), ha="center", fontsize=8, color=MUTED)


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, color=INK, fontweight="bold", loc="left", pad=10)
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
