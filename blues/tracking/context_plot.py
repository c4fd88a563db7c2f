"""The figure of an extended context: perplexity by position, before and after.

In: curves of loss by position. Out: a PNG, written whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from blues.tracking.plots import DPI, GRID, INK, MUTED, write

COLORS = ("#9aa5b1", "#d1571f", "#2f6db3", "#1b9e77")
MARKERS = ("s", "^", "o", "D")
LARGEST = 230.0
"""More nats than this are drawn as e^230: the axis, which goes beyond, must not overflow."""
SPREAD_OF_LOG = 4.0
TICKS = 8
LABEL_POINTS = 11.0


class Curve(Protocol):
    """Stretch s lies between positions edges[s] and edges[s + 1]; nats: its mean loss; spread: half its interval."""

    @property
    def edges(self) -> Sequence[int]: ...
    @property
    def nats(self) -> Sequence[float]: ...
    @property
    def spread(self) -> Sequence[float]: ...


def perplexity_by_position(curves: Mapping[str, Curve], output: str | Path, *, trained_length: int, title: str) -> Path:
    """Draw the curves, their 95% intervals shaded, and where the trained length ended.

    Args:
        curves: by name, in the order of the legend; at most four.
        trained_length: tokens of the context before the extension.
    """
    figure = Figure(figsize=(9.0, 5.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values: list[float] = []
    ends: list[tuple[float, str]] = []
    for (name, curve), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
        edges, nats = np.array(curve.edges, dtype=float), np.array(curve.nats)
        half = np.nan_to_num(np.array(curve.spread))
        at = (edges[1:] + edges[:-1]) / 2
        middle, low, high = (_perplexity(x) for x in (nats, nats - half, nats + half))
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.plot(at, middle, color=color, linewidth=2.0, marker=marker, markersize=4.5, label=name)
        values += [value for value in (*low, *high) if math.isfinite(value)]
        ends.append((float(middle[-1]), color))
    length = max(curve.edges[-1] for curve in curves.values())
    _scale(axes, min(values), max(values))
    _mark_limit(axes, trained_length, length)
    _label_ends(axes, at[-1], ends)
    axes.set_xlim(0, length * 1.06)
    axes.set_xticks(np.unique(np.linspace(0, length, TICKS + 1).round()))
    axes.set_title(title, fontsize=13, color=INK, fontweight="bold", loc="left", pad=34)
    axes.set_xlabel("position in the text (tokens)", color=INK, fontsize=10)
    axes.set_ylabel("perplexity on held-out text", color=INK, fontsize=10)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.tick_params(which="minor", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=len(curves),
        loc="lower left",
        bbox_to_anchor=(-0.012, 1.0),
        labelcolor=INK,
        columnspacing=1.6,
        handlelength=1.6,
    )
    return write(figure, output)


def _scale(axes: Axes, lowest: float, highest: float) -> None:
    """A logarithmic scale where one curve leaves the others far below."""
    if highest > SPREAD_OF_LOG * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(lowest / 1.12, highest * 1.25)
    else:
        room = 0.08 * (highest - lowest)
        axes.set_ylim(lowest - room, highest + 1.5 * room)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _mark_limit(axes: Axes, trained_length: int, length: int) -> None:
    axes.axvspan(trained_length, length, color=INK, alpha=0.035, linewidth=0)
    axes.axvline(trained_length, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"trained on {trained_length:,} tokens before: all to the right is new",
        (trained_length, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(6, -4),
        textcoords="offset points",
        fontsize=9,
        color=MUTED,
        va="top",
    )


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str]]) -> None:
    """The last value of each curve beside it, moved apart where they would cover one another."""
    transform = axes.transData.transform
    taken = -math.inf
    for y, color in sorted(ends):
        height = transform((x, y))[1] * 72 / axes.figure.dpi
        place = max(height, taken + LABEL_POINTS)
        taken = place
        axes.annotate(
            f"{y:,.3g}",
            (x, y),
            xytext=(9, place - height),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
        )


def _perplexity(nats: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(nats, LARGEST))
