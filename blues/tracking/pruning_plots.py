"""A figure of one pruning: each layer's scores with who stayed, and the validation losses.

In: scores and kept experts by layer, losses by name. Out: a PNG, written whole or not at all.

Legend: L mixture layers, E experts of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blues.tracking.plots import DPI, GRID, INK, MAX_NUMBERED_EXPERTS, MUTED, TRAIN, VALIDATION, write


def pruning_figure(
    layers: Sequence[int],
    scores: Sequence[Sequence[float]],
    kept: Sequence[Sequence[int]],
    losses: Mapping[str, float],
    output: str | Path,
    *,
    title: str,
    criterion: str,
) -> Path:
    """Scores are coloured within their layer (layers differ in scale); an expert that went is crossed out. Without
    layers, the losses alone."""
    widest = max((len(row) for row in scores), default=1)
    width, height = min(max(8.4, 5.2 + 0.72 * widest), 18.0), max(3.2, 1.9 + 0.46 * len(layers))
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.01, ha="left")
    if layers:
        left, right = figure.subplots(1, 2, width_ratios=[max(2.0, 0.5 * widest), 2.4])
        _draw_scores(left, layers, scores, kept, widest, criterion)
    else:
        right = figure.subplots()
    _draw_losses(right, losses)
    return write(figure, output)


def _draw_scores(axes, layers, scores, kept, widest: int, criterion: str) -> None:
    table_LE = np.full((len(layers), widest), np.nan)
    for row, values in enumerate(scores):
        low, high = min(values), max(values)
        table_LE[row, : len(values)] = [(value - low) / (high - low) if high > low else 0.5 for value in values]
    axes.pcolormesh(table_LE, cmap="Blues", vmin=-0.15, vmax=1.3, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    for row, values in enumerate(scores):
        for expert, value in enumerate(values):
            if widest <= MAX_NUMBERED_EXPERTS:
                color = "white" if table_LE[row, expert] > 0.7 else INK
                axes.text(expert + 0.5, row + 0.5, f"{value:.3g}", ha="center", va="center", fontsize=8, color=color)
            if expert not in kept[row]:
                axes.plot([expert + 0.1, expert + 0.9], [row + 0.9, row + 0.1], color=VALIDATION, linewidth=1.6)
    axes.set_xticks(np.arange(widest) + 0.5, [str(expert) for expert in range(widest)])
    axes.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    axes.tick_params(length=0, colors=MUTED, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("expert", color=INK)
    axes.set_ylabel("layer", color=INK)
    axes.set_title(f"{criterion} (crossed out: gone)", fontsize=10, color=INK, loc="left")


def _draw_losses(axes, losses: Mapping[str, float]) -> None:
    names, values = list(losses), list(losses.values())
    bars = axes.bar(names, values, color=[TRAIN, VALIDATION, *[MUTED] * len(names)][: len(names)], width=0.6)
    axes.bar_label(bars, fmt="%.4f", fontsize=9, color=INK, padding=2)
    spread = max(values) - min(values)
    axes.set_ylim(max(0.0, min(values) - max(2 * spread, 0.02)), max(values) + max(0.5 * spread, 0.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.set_title("validation loss", fontsize=10, color=INK, loc="left")
    axes.set_ylabel("nats per token, not from 0", color=INK, fontsize=9)
