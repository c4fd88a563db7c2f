"""Figures of a run: loss curve, expert load now, expert load over time.

In: RUN/metrics.jsonl, or a table of loads. Out: PNG files, written whole or not at all.

Drawn on matplotlib's own canvas objects: no pyplot, no display, nothing global is changed.
Shapes: L mixture-of-experts layers, E experts, N points in time.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blues.config import write_atomic
from blues.errors import TrackingError
from blues.tracking.spool import read_history

DPI = 150
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
TRAIN, VALIDATION = "#2f6db3", "#d1571f"
SOURCES = ("#1b9e77", "#8e5bb5", "#c2a21b", "#c7407f", "#4a90a4", "#7a6a53")
LOAD_COLORS = ("#2a5d8f", "#8fb8d8", "#f7f6f2", "#eda96a", "#a8400f")
MAX_NUMBERED_EXPERTS = 24

History = Mapping[str, Sequence[tuple[int, float]]]


def figures(run_dir: str | Path, *, name: str | None = None, unigram_entropy: float | None = None) -> list[Path]:
    """Draw what RUN/metrics.jsonl has values for into RUN/figures.

    Args:
        run_dir: the run folder.
        name: of the run, for the titles; that of the folder when None.
        unigram_entropy: as for `loss_curve`.

    Returns the files drawn: loss.png, and for a mixture of experts expert_load.png and expert_load_over_time.png.
    """
    run_dir = Path(run_dir)
    name = name or run_dir.name
    metrics, folder = run_dir / "metrics.jsonl", run_dir / "figures"
    history = read_history(metrics)
    folder.mkdir(exist_ok=True)
    drawn = []
    if _training_loss(history)[1].size or _series(history, "validation/loss")[1].size:
        path = folder / "loss.png"
        drawn.append(loss_curve(metrics, path, title=f"Loss of {name}", unigram_entropy=unigram_entropy))
    if load_history(history):
        layers, load_LE, step = latest_expert_load(metrics)
        title = f"Expert load of {name} at step {step}"
        drawn.append(expert_load_heatmap(load_LE, folder / "expert_load.png", layers=layers, title=title))
        path = folder / "expert_load_over_time.png"
        drawn.append(expert_load_over_time(metrics, path, title=f"Expert load of {name} over training"))
    return drawn


def loss_curve(
    metrics_path: str | Path, output: str | Path, *, title: str = "Loss", unigram_entropy: float | None = None
) -> Path:
    """Training cross-entropy (faint, and smoothed), validation loss, and validation loss per source.

    Args:
        metrics_path: a metrics.jsonl.
        output: the PNG to write.
        unigram_entropy: nats per token of a model that knows only how frequent tokens are; drawn as a line to beat.

    Raises:
        TrackingError: the file holds no loss yet.
    """
    history = read_history(metrics_path)
    steps, values = _training_loss(history)
    validation = _series(history, "validation/loss")
    if not (values.size or validation[1].size):
        raise TrackingError(f"{str(metrics_path)!r} holds no loss yet, so there is no curve to draw")
    figure, axes = _canvas(9.0, 5.2, title)
    smooth = _smooth(values)
    if values.size:
        axes.plot(steps, values, color=TRAIN, alpha=0.35, linewidth=0.9)
        axes.plot(steps, smooth, color=TRAIN, linewidth=2.0, label="training (smoothed)")
    if validation[1].size:
        (line,) = axes.plot(*validation, color=VALIDATION, linewidth=1.6, marker="o", markersize=4.5, zorder=3)
        line.set_label("validation")
        _label_end(axes, validation)
    shown = [smooth, validation[1]]
    for color, (source, (at, loss)) in zip(_cycle(SOURCES), _sources(history).items(), strict=False):
        axes.plot(at, loss, color=color, linewidth=1.2, linestyle=(0, (4, 2)), label=f"validation: {source}")
        shown.append(loss)
    low, high = _range(shown, unigram_entropy)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)))
        axes.annotate(
            f"unigram entropy {unigram_entropy:.2f}",
            (0.5, unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            color=MUTED,
            fontsize=9.5,
            ha="center",
        )
    axes.set_ylim(low, high)
    axes.margins(x=0.02)
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=INK)
    return write(figure, output)


def expert_load_heatmap(
    load_LE: Sequence[Sequence[float]] | np.ndarray,
    output: str | Path,
    *,
    layers: Sequence[int] | None = None,
    title: str = "Expert load",
) -> Path:
    """Share of each layer's tokens that each expert got: blue below the balanced 1 / E, orange above.

    Args:
        load_LE: shares; rows sum to 1. Layers may differ in their experts: shorter rows, or NaN at their ends.
        output: the PNG to write.
        layers: index of each layer within the transformer; 0, 1, ... when None.
    """
    load_LE = _table(load_LE)
    num_layers, num_experts = load_LE.shape
    names = [str(layer) for layer in (range(num_layers) if layers is None else layers)]
    width, height = min(max(6.4, 2.6 + 0.72 * num_experts), 16.0), max(2.8, 1.7 + 0.46 * num_layers)
    figure, axes = _canvas(width, height, title, grid=False)
    relative_LE, norm, colors = _relative(load_LE), _load_norm(load_LE), _load_colors()
    mesh = axes.pcolormesh(relative_LE, cmap=colors, norm=norm, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    _expert_ticks(axes.xaxis, num_experts)
    axes.set_yticks(np.arange(num_layers) + 0.5, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    if num_experts <= MAX_NUMBERED_EXPERTS:
        for (layer, expert), share in np.ndenumerate(load_LE):
            if np.isnan(share):
                continue
            red, green, blue, _ = colors(norm(relative_LE[layer, expert]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(
                expert + 0.5,
                layer + 0.5,
                f"{100 * share:.1f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else INK,
            )
    for layer, relative_E in enumerate(relative_LE):
        violation = f"{np.nanmax(relative_E) - 1:.2f}"
        axes.annotate(
            violation,
            (num_experts, layer + 0.5),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MUTED,
            annotation_clip=False,
        )
    axes.annotate(
        "MaxVio",
        (num_experts, 0),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=8.5,
        color=MUTED,
        annotation_clip=False,
    )
    _load_bar(figure, [axes], mesh, _common_size([load_LE]), pad=0.02)
    return write(figure, output)


def expert_load_over_time(
    metrics_path: str | Path, output: str | Path, *, title: str = "Expert load over training"
) -> Path:
    """One panel per layer: experts by step, coloured like `expert_load_heatmap`.

    Raises:
        TrackingError: the file holds no expert load.
    """
    loads = load_history(read_history(metrics_path))
    if not loads:
        raise TrackingError(f"{str(metrics_path)!r} holds no expert load (experts/layer_../load_..), nothing to draw")
    tables = [load_NE for _, load_NE in loads.values()]
    columns = min(3, len(loads))
    rows = math.ceil(len(loads) / columns)
    figure = Figure(figsize=(2.0 + 3.5 * columns, 1.3 + 2.15 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=_common_size(tables) is not None, squeeze=False)
    norm = max((_load_norm(load_NE) for load_NE in tables), key=lambda norm: norm.vmax or 0.0)
    for axes, (layer, (steps, load_NE)) in zip(panels.flat, loads.items(), strict=False):
        num_experts = load_NE.shape[1]
        edges, relative_NE = np.arange(num_experts + 1), _relative(load_NE)
        mesh = axes.pcolormesh(_edges(steps), edges, relative_NE.T, cmap=_load_colors(), norm=norm)
        axes.set_title(f"layer {layer}", fontsize=10, color=INK, loc="left")
        _expert_ticks(axes.yaxis, num_experts)
        axes.set_ylim(num_experts, 0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(colors=MUTED, labelsize=8.5, length=2)
        axes.spines[:].set_visible(False)
    for axes in panels.flat[len(loads) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.02, ha="left")
    figure.supxlabel("training step", fontsize=10, color=INK)
    figure.supylabel("expert", fontsize=10, color=INK)
    _load_bar(figure, list(panels.flat), mesh, _common_size(tables), pad=0.02)
    return write(figure, output)


def load_history(history: History) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{layer: (steps_N, load_NE)}; NaN for experts that a layer does not have at that step, because it was pruned."""
    found: dict[int, dict[int, dict[int, float]]] = {}
    for name, points in history.items():
        match = re.fullmatch(r"experts/layer_(\d+)/load_(\d+)", name)
        if match:
            layer, expert = int(match[1]), int(match[2])
            for step, share in points:
                found.setdefault(layer, {}).setdefault(step, {})[expert] = share
    loads = {}
    for layer, by_step in sorted(found.items()):
        num_experts, steps = 1 + max(max(shares) for shares in by_step.values()), sorted(by_step)
        table = [[by_step[step].get(expert, np.nan) for expert in range(num_experts)] for step in steps]
        loads[layer] = (np.array(steps), np.array(table))
    return loads


def latest_expert_load(metrics_path: str | Path) -> tuple[list[int], np.ndarray, int]:
    """(layers, load_LE, step) of the last step that a metrics file has loads of; NaN beyond a layer's own experts.

    Raises:
        TrackingError: it has none.
    """
    loads = load_history(read_history(metrics_path))
    if not loads:
        raise TrackingError(f"{str(metrics_path)!r} holds no expert load (experts/layer_../load_..)")
    step = max(int(steps[-1]) for steps, _ in loads.values())
    return list(loads), _table([load_NE[-1] for _, load_NE in loads.values()]), step


def _canvas(width: float, height: float, title: str, grid: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=13, color=INK, fontweight="bold", loc="left", pad=14)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)
    if grid:
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, axes


def write(figure: Figure, output: str | Path) -> Path:
    """Save as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_atomic(output, buffer.getvalue())
    return Path(output)


def _series(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, without the values that are not finite."""
    points = np.array(history.get(name, ()), dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return points[:, 0], points[:, 1]


def _training_loss(history: History) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy without the routers' auxiliary losses where it is known: it compares with validation."""
    name = "train/cross_entropy" if "train/cross_entropy" in history else "train/loss"
    return _series(history, name)


def _sources(history: History) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    prefix = "validation/loss/"
    return {name.removeprefix(prefix): _series(history, name) for name in sorted(history) if name.startswith(prefix)}


def _smooth(values: np.ndarray) -> np.ndarray:
    """A line fitted around each point with Gaussian weights (local linear regression, Fan 1992).

    Unlike a running average it neither lags behind a falling loss nor bends at the ends. The weights' deviation is a
    fiftieth of the curve, at least one point.
    """
    width = max(1.0, len(values) / 50)
    reach = min(math.ceil(3 * width), max(len(values) - 1, 0) // 2)
    if reach < 1:
        return values
    offset = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offset / width) ** 2)

    def moment(signal: np.ndarray, power: int) -> np.ndarray:
        """sum over j of kernel(j) j**power signal(i + j), within the curve."""
        return np.convolve(signal, (kernel * offset**power)[::-1], mode="same")

    ones = np.ones_like(values)
    s0, s1, s2 = (moment(ones, power) for power in range(3))
    t0, t1 = moment(values, 0), moment(values, 1)
    return (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)


def _range(shown: Sequence[np.ndarray], reference: float | None) -> tuple[float, float]:
    """Limits that hold every smoothed curve; single spikes of the faint one may leave the picture."""
    values = np.concatenate([*shown, np.array([] if reference is None else [reference])])
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _label_end(axes: Axes, series: tuple[np.ndarray, np.ndarray]) -> None:
    step, value = series[0][-1], series[1][-1]
    axes.annotate(
        f"{value:.2f}",
        (step, value),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=VALIDATION,
        fontsize=10,
        fontweight="bold",
        annotation_clip=False,
    )


def _table(load_LE: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Layers with fewer experts than the widest end in NaN."""
    if not len(load_LE) or not all(len(load_E) for load_E in load_LE):
        raise ValueError("expected a table of layers x experts, got none")
    table = np.full((len(load_LE), max(map(len, load_LE))), np.nan)
    for row, load_E in zip(table, load_LE, strict=True):
        row[: len(load_E)] = load_E
    return table


def _relative(load_NE: np.ndarray) -> np.ndarray:
    """Shares in units of the balanced one of their own row, 1 / E."""
    return load_NE * (~np.isnan(load_NE)).sum(1, keepdims=True)


def _common_size(tables: Sequence[np.ndarray]) -> int | None:
    """The number of experts of all rows of all tables; None if they differ."""
    sizes = {int(size) for table in tables for size in (~np.isnan(table)).sum(1)}
    return sizes.pop() if len(sizes) == 1 else None


def _load_norm(load_NE: np.ndarray) -> TwoSlopeNorm:
    """0 .. 1 .. the largest share in units of the balanced one, at least 2, so that noise does not look alarming."""
    return TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(np.nanmax(_relative(load_NE)))))


def _load_colors() -> Colormap:
    return LinearSegmentedColormap.from_list("load", LOAD_COLORS)


def _load_bar(figure: Figure, axes: list[Axes], mesh: Any, num_experts: int | None, pad: float) -> None:
    """`num_experts`: of all layers; None if they differ, then shares are told as multiples of 1 / E."""
    top = mesh.norm.vmax
    bar = figure.colorbar(mesh, ax=axes, pad=pad, aspect=28)
    shares = [0.0, 0.5, 1.0, (1.0 + top) / 2, top]
    bar.ax.tick_params(labelsize=8.5, length=2, labelcolor=MUTED)
    bar.ax.axhline(1.0, color=INK, linewidth=1.6)
    if num_experts is None:
        labels = [f"{share:.3g}/E" for share in shares]
    else:
        labels = [f"{100 * share / num_experts:.3g}%" for share in shares]
        labels[2] += f" = 1/{num_experts}"
    bar.set_ticks(shares, labels=labels)
    bar.ax.get_yticklabels()[2].set(fontweight="bold", color=INK)
    bar.set_label("share of tokens", fontsize=9, color=INK)
    bar.outline.set_visible(False)


def _expert_ticks(axis, num_experts: int) -> None:
    every = max(1, math.ceil(num_experts / 16))
    experts = np.arange(0, num_experts, every)
    axis.set_ticks(experts + 0.5, [str(expert) for expert in experts])


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the columns around each step."""
    steps = steps.astype(float)
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _cycle(colors: Sequence[str]):
    while True:
        yield from colors
