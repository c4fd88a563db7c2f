"""Figures of a dataset as pictures.

In: what `blues.data.reports.inspection` found. Out: a PNG, SVG or PDF, as the name of the
file says, written whole or not at all.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blues.config import write_atomic
from blues.data.reports.inspection import Overview
from blues.data.reports.visible import visible
from blues.data.storage.store import SPLITS

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
DPI = 150
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
COLORS = {"train": "#2f6db3", "validation": "#d1571f"}
COLUMNS = 3


def lengths_figure(found: Overview, output: str | Path) -> Path:
    """Share of the documents by length, in bins that double: a panel for each source, training and validation beside
    each
    other. The name of the file ends in one of FIGURE_SUFFIXES."""
    columns = min(COLUMNS, len(found.sources))
    rows = math.ceil(len(found.sources) / columns)
    figure = Figure(figsize=(1.6 + 4.2 * columns, 0.9 + 2.9 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, source in zip(panels.flat, found.sources, strict=False):
        bins = [split.lengths.bins for split in source.splits]
        last = max(map(len, bins))
        first = min((k for counts in bins for k, count in enumerate(counts) if count), default=0)
        for place, (split, counts) in enumerate(zip(SPLITS, bins, strict=True)):
            share = 100 * np.array([*counts, *[0] * (last - len(counts))]) / max(1, sum(counts))
            at = np.arange(first, last) + (0.3 if place == 0 else 0.7)
            axes.bar(at, share[first:], width=0.38, color=COLORS[split], label=split)
        step = max(1, (last - first) // 7)
        axes.set_xticks(np.arange(first, last + 1, step), [_short(2**k) for k in range(first, last + 1, step)])
        # A dollar sign would begin a formula.
        axes.set_title(visible(source.name).replace("$", r"\$"), fontsize=11, color=INK, fontweight="bold", loc="left")
        axes.tick_params(colors=MUTED, labelsize=8.5, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in panels.flat[len(found.sources) :]:
        axes.set_visible(False)
    panels.flat[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.supxlabel("tokens of a document", fontsize=10, color=INK)
    figure.supylabel("% of the documents", fontsize=10, color=INK)
    buffer = io.BytesIO()
    output = Path(output)
    figure.savefig(buffer, format=output.suffix[1:].lower(), facecolor="white")
    write_atomic(output, buffer.getvalue())
    return output


def _short(number: int) -> str:
    """512, 2k, 1M."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size:
            return f"{number // size}{letter}"
    return str(number)
