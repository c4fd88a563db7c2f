"""Figures of what each expert learned.

In: RUN/specialization (blues/tracking/specialization_files.py). Out: PNG files in RUN/figures, written whole or not at
all: coactivation.png, domain_affinity.png, language_affinity.png, vocabulary_{input,target,predicted}.png,
specialization_by_layer.png, and saturation.png where the probe was routed at least twice.

Shapes: L mixture-of-experts layers, E experts, G labels of a kind.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from blues.data.reports.visible import visible
from blues.tracking.plots import DPI, GRID, INK, LOAD_COLORS, MUTED, write
from blues.tracking.specialization_files import (
    FOLDER,
    SaturationCurve,
    figures_steps,
    read_figures,
    read_saturation,
)

MOST_LAYERS = 6
"""Panels of a figure; of more layers these are picked at even distances, the first and the last among them."""
MOST_LABELS = 16
MOST_EXPERTS = 12
"""Rows of a layer in a table of tokens, those of the busiest experts."""
MOST_NUMBERED = 12
"""Experts of a matrix whose cells have room for a number."""
CAPPED, MOST_TIMES = 0.995, 4.0
"""Where colours end: a quantile of co-activations, a multiple of an indifferent expert's share."""
CHIPS = 8
"""Tokens listed of each expert."""
CHIP_CHARACTERS = 12
TOKEN_KINDS = {
    "input": ("training", "input_token", "Tokens that each expert takes in"),
    "target": ("training", "target_token", "Tokens that follow what each expert takes in"),
    "predicted": ("probe", "predicted_token", "Tokens that the model predicts where an expert is used"),
}
SHORT = {
    "input_token": "input tokens",
    "target_token": "next tokens",
    "predicted_token": "predicted tokens",
    "domain": "domains",
    "language": "languages",
}
KIND_COLORS = ("#2f6db3", "#1b9e77", "#8e5bb5", "#d1571f", "#c2a21b")
SEQUENTIAL = ("#f7f6f2", "#bcd3e6", "#6c9fca", "#2a5d8f", "#14304c")
MONO = "DejaVu Sans Mono"

Report = Mapping[str, Any]
"""`read_figures`."""


def specialization_figures(run_dir: str | Path, *, name: str | None = None) -> list[Path]:
    """Draw the newest report of a run into RUN/figures; returns the files drawn, none if there is no report.

    Raises:
        TrackingError: a file of RUN/specialization is damaged.
    """
    run_dir = Path(run_dir)
    source, folder = run_dir / FOLDER, run_dir / "figures"
    steps = figures_steps(source)
    if not steps:
        return []
    folder.mkdir(exist_ok=True)
    report = read_figures(source, steps[-1])
    where = f"{name or run_dir.name} at step {report['step']:,}"
    main = report.get("training") or report["probe"]
    drawn = [
        coactivation_heatmap(main, folder / "coactivation.png", title=f"Experts used together: {where}"),
        by_layer(report, folder / "specialization_by_layer.png", title=f"Specialization by layer: {where}"),
    ]
    for kind, what in (("domain", "Domains"), ("language", "Languages")):
        if len(known_labels(main, kind)) > 1:
            path = folder / f"{kind}_affinity.png"
            drawn.append(affinity_heatmap(main, kind, path, title=f"{what} of the experts: {where}"))
    for kind, (part, labels, what) in TOKEN_KINDS.items():
        if part in report:
            path = folder / f"vocabulary_{kind}.png"
            drawn.append(vocabulary_table(report[part], labels, path, title=f"{what}: {where}"))
    curve = read_saturation(source)
    if curve is not None:
        path = folder / "saturation.png"
        drawn.append(saturation_figure(curve, path, title=f"Router saturation of {name or run_dir.name}"))
    return drawn


def coactivation_heatmap(part: Report, output: str | Path, *, title: str) -> Path:
    """One panel per layer: of the tokens of expert i (row), how many also go to expert j (column)."""
    layers = picked(part["layers"])
    tables = [np.array(layer["coactivation_EE"]) for layer in layers]
    for table in tables:
        np.fill_diagonal(table, np.nan)
    shares = np.concatenate([table[~np.isnan(table)] for table in tables])
    top = float(np.quantile(shares, CAPPED)) if shares.size else 0.0  # one odd pair must not fade all the others
    norm, colors = Normalize(0, max(top, 1e-6)), _colors("together", SEQUENTIAL)
    figure, panels = _panels(len(layers), _width(max(len(table) for table in tables)), None, title)
    for axes, layer, table in zip(panels, layers, tables, strict=True):
        mesh = _matrix(axes, table, norm, colors, f"layer {layer['layer']}", _evenly(layer))
        _expert_ticks(axes, len(table), "x")
        _expert_ticks(axes, len(table), "y")
    figure.supxlabel("also went to expert", fontsize=10, color=INK)
    figure.supylabel("of the tokens of expert", fontsize=10, color=INK)
    _bar(figure, panels, mesh, "share of the row's tokens", beyond=bool(shares.size) and shares.max() > top)
    return write(figure, output)


def affinity_heatmap(part: Report, kind: str, output: str | Path, *, title: str) -> Path:
    """One panel per layer: P(expert | label), blue below and orange above what an indifferent expert has (k / E)."""
    layers, labels = picked(part["layers"]), known_labels(part, kind)
    tokens_G, names = part["tokens_G"][kind], part["names"][kind]
    tables = [np.array(layer["kinds"][kind]["share_GE"])[labels] for layer in layers]
    even = [layer["experts_per_token"] / layer["num_experts"] for layer in layers]
    relative = [table / max(share, 1e-9) for table, share in zip(tables, even, strict=True)]
    top = min(max(2.0, *(float(table.max()) for table in relative)), MOST_TIMES)
    norm, colors = TwoSlopeNorm(1.0, 0.0, top), _colors("affinity", LOAD_COLORS)
    widest = max(table.shape[1] for table in tables)
    figure, panels = _panels(len(layers), _width(widest), 0.34 * len(labels), title, share_y=True)
    total = max(1, sum(tokens_G))
    for number, (axes, layer, table, ratio, share) in enumerate(
        zip(panels, layers, tables, relative, even, strict=True)
    ):
        mesh = _matrix(axes, ratio, norm, colors, f"layer {layer['layer']}", f"k/E = {100 * share:.3g}%", shown=table)
        _expert_ticks(axes, table.shape[1], "x")
        if number % _columns(len(layers)) == 0:
            texts = [f"{shorten(names[label], 20)}  {_percent(tokens_G[label] / total)}" for label in labels]
            axes.set_yticks(np.arange(len(labels)) + 0.5, texts)
    numbers = "; numbers are % of the row's tokens that it takes" if widest <= MOST_NUMBERED else ""
    figure.supxlabel(f"expert{numbers}", fontsize=10, color=INK)
    beyond = any(table.max() > top for table in relative)
    _bar(figure, panels, mesh, "times an indifferent expert's share", ratio=True, beyond=beyond)
    return write(figure, output)


def vocabulary_table(part: Report, kind: str, output: str | Path, *, title: str) -> Path:
    """The most specific tokens of each expert, with the share of their occurrences that went to it."""
    rows: list[tuple[Report, int]] = []  # a layer with an expert, or -1 for the layer's heading
    for layer in picked(part["layers"], 4):
        rows.append((layer, -1))
        busiest = np.argsort(-np.array(layer["load_E"]), kind="stable")[:MOST_EXPERTS]
        rows += [(layer, expert) for expert in sorted(busiest.tolist())]
    width, row_height, top = 13.2, 0.34, 0.85
    height = top + row_height * len(rows) + 0.25
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.3, 0.36, title, fontsize=13, color=INK, fontweight="bold", va="center")
    axes.text(0.3, 0.68, _how_to_read(part, kind), fontsize=9, color=MUTED, va="center")
    for number, (layer, expert) in enumerate(rows):
        y = top + row_height * (number + 0.5)
        if expert < 0:
            _layer_heading(axes, layer, kind, y + 0.03, width)
        else:
            _expert_row(axes, layer, kind, expert, y)
    return write(figure, output)


def by_layer(report: Report, output: str | Path, *, title: str) -> Path:
    """Specialization and mutual information of every kind of label, layer by layer."""
    figure = Figure(figsize=(10.5, 4.3), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    layers = (report.get("training") or report["probe"])["layers"]
    numbers = [layer["layer"] for layer in layers]
    kinds: dict[str, list[Report]] = {}
    for part in ("training", "probe"):
        for layer in report.get(part, {}).get("layers", []):
            for kind, figures in layer["kinds"].items():
                kinds.setdefault(kind, []).append(figures)
    for color, (kind, own) in zip(KIND_COLORS, kinds.items(), strict=False):
        style = {"color": color, "marker": "o", "markersize": 4.5, "linewidth": 1.6, "label": SHORT.get(kind, kind)}
        left.plot(numbers, [_number(figures["specialization"]) for figures in own], **style)
        right.plot(numbers, [_number(figures["information"]) for figures in own], **style)
    even = [layer["experts_per_token"] / layer["num_experts"] for layer in layers]
    left.plot(numbers, even, color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)), label="indifferent (k/E)")
    left.set_ylim(0, 1.02)
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylim(bottom=0)
    for axes, what, unit in (
        (left, "share of a label's tokens at its main expert", "mean over labels"),
        (right, "what a label tells about the expert", "mutual information (nats)"),
    ):
        _plain_axes(axes)
        axes.set_title(what, fontsize=10.5, color=INK, loc="left")
        axes.set_ylabel(unit, fontsize=9.5, color=INK)
        axes.set_xlabel("layer", fontsize=9.5, color=INK)
        axes.set_xticks(numbers if len(numbers) <= 16 else numbers[:: math.ceil(len(numbers) / 16)])
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=6, frameon=False, fontsize=9, labelcolor=INK)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.01, ha="left")
    return write(figure, output)


def saturation_figure(curve: SaturationCurve, output: str | Path, *, title: str) -> Path:
    """Share of the final experts that the probe's tokens already had at each step, by layer."""
    figure = Figure(figsize=(9.0, 4.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    table = np.array(curve.share_SL)
    colors = _colors("depth", ("#8fc1c8", "#3f7fae", "#2b2f6b"))
    for number in range(len(curve.layers)):
        color = colors(number / max(1, len(curve.layers) - 1))
        axes.plot(curve.steps, table[:, number], color=color, linewidth=1.7, marker="o", markersize=3.5)
    even = sum(curve.even_L) / len(curve.even_L)
    axes.axhline(even, color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)))
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-4, -4), "textcoords": "offset points"}
    text = f"experts drawn evenly: {100 * even:.3g}%"
    axes.annotate(text, (0.995, even), color=MUTED, fontsize=9, ha="right", va="top", **place)
    _depth_key(axes, curve, colors)
    _plain_axes(axes)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step", fontsize=10, color=INK)
    axes.set_ylabel(f"experts shared with step {curve.steps[-1]:,}", fontsize=10, color=INK)
    axes.set_title(title, fontsize=13, color=INK, fontweight="bold", loc="left", pad=14)
    return write(figure, output)


def known_labels(part: Report, kind: str) -> list[int]:
    """Labels with tokens, the most frequent ones first; at most MOST_LABELS."""
    tokens_G = part["tokens_G"].get(kind, [])
    order = sorted(range(len(tokens_G)), key=lambda label: (-tokens_G[label], label))
    return [label for label in order if tokens_G[label] > 0][:MOST_LABELS]


def picked(layers: Sequence[Report], most: int = MOST_LAYERS) -> list[Report]:
    """At most so many layers, at even distances."""
    places = np.unique(np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int))
    return [layers[place] for place in places]


def token_label(text: str) -> str:
    """A token as it can be printed: spaces and control characters visible, and escapes for characters that the font
    has no picture of."""
    known = _pictures()
    shown = visible(text.replace(" ", "\u2423"))
    shown = "".join(char if ord(char) in known else f"\\u{ord(char):04x}" for char in shown)
    return shorten(shown, CHIP_CHARACTERS)


def shorten(text: str, most: int) -> str:
    """Its beginning and an ellipsis where it is longer."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


@functools.cache
def _pictures() -> frozenset[int]:
    return frozenset(get_font(findfont(MONO)).get_charmap())


def _how_to_read(part: Report, kind: str) -> str:
    return (
        f"the most specific first, over {part['tokens']:,} tokens; % of a token's occurrences that went to the expert "
        "(ranked by the lower end of its interval, so that rare tokens count less); \u2423 is a space"
    )


def _layer_heading(axes: Axes, layer: Report, kind: str, y: float, width: float) -> None:
    figures = layer["kinds"][kind]
    even = layer["experts_per_token"] / layer["num_experts"]
    hidden = layer["num_experts"] - MOST_EXPERTS
    axes.text(0.3, y, f"layer {layer['layer']}", fontsize=10.5, color=INK, fontweight="bold", va="center")
    mean = "-" if figures["specialization"] is None else f"{100 * figures['specialization']:.0f}%"
    note = f"a token's main expert gets {mean} of it on average, an indifferent one {100 * even:.3g}%"
    if hidden > 0:
        note += f"; the {MOST_EXPERTS} busiest of {layer['num_experts']} experts"
    axes.text(1.45, y, note, fontsize=9, color=MUTED, va="center")
    axes.plot([0.3, width - 0.3], [y + 0.16, y + 0.16], color=GRID, linewidth=0.8)


def _expert_row(axes: Axes, layer: Report, kind: str, expert: int, y: float) -> None:
    colors = _colors("together", SEQUENTIAL)
    axes.text(0.62, y, str(expert), fontsize=9.5, color=INK, va="center", ha="right", fontweight="bold")
    axes.text(1.3, y, _percent(layer["load_E"][expert]), fontsize=8.5, color=MUTED, va="center", ha="right")
    step, left = 1.45, 1.45
    even = layer["experts_per_token"] / layer["num_experts"]
    for place, entry in enumerate(layer["kinds"][kind]["specific_EN"][expert][:CHIPS]):
        x, color = left + step * place, colors(0.75 * max(0.0, entry["share"] - even) / max(1 - even, 1e-6))
        box = FancyBboxPatch(
            (x, y - 0.125), step - 0.1, 0.25, boxstyle="round,pad=0,rounding_size=0.06", facecolor=color, linewidth=0
        )
        axes.add_patch(box)
        ink = "white" if _is_dark(color) else INK
        text = token_label(entry["text"])
        common: dict[str, Any] = {"va": "center_baseline", "color": ink, "parse_math": False}
        axes.text(x + 0.07, y + 0.005, text, fontsize=8.5, family=MONO, **common)
        axes.text(x + step - 0.16, y + 0.005, f"{100 * entry['share']:.0f}", fontsize=7, ha="right", **common)


def _width(num_experts: int) -> float:
    """Inches of a panel with a column for each expert."""
    return 0.46 * num_experts if num_experts <= MOST_NUMBERED else 4.2


def _columns(panels: int) -> int:
    return min(3, panels)


def _panels(
    number: int, width: float, height: float | None, title: str, *, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """Panels of so many inches (square without a height), three in a row."""
    columns = _columns(number)
    rows = math.ceil(number / columns)
    width = max(width, 1.9)
    height = width if height is None else max(height, 0.9)
    size = (max(6.4, 2.6 + columns * (width + 0.35)), 1.5 + rows * (height + 0.5))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.01, ha="left")
    return figure, list(grid.flat[:number])


def _matrix(
    axes: Axes,
    table: np.ndarray,
    norm: Normalize,
    colors: Colormap,
    title: str,
    note: str,
    *,
    shown: np.ndarray | None = None,
) -> Any:
    """Cells coloured by `table`, with the numbers of `shown` (as %) where there is room."""
    shown = table if shown is None else shown
    small = table.shape[1] <= MOST_NUMBERED
    mesh = axes.pcolormesh(table, cmap=colors, norm=norm, edgecolors="white", linewidth=1.2 if small else 0.0)
    axes.set_facecolor("#eceef0")
    axes.set_ylim(len(table), 0)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_title(note, fontsize=8.5, color=MUTED, loc="right")
    if small:
        for (row, column), share in np.ndenumerate(shown):
            if np.isnan(share):
                continue
            ink = "white" if _is_dark(colors(norm(table[row, column]))) else INK
            text = f"{100 * share:.0f}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=ink)
    return mesh


def _evenly(layer: Report) -> str:
    """The co-activation of pairs that are drawn evenly."""
    k, experts = layer["experts_per_token"], layer["num_experts"]
    return f"even {100 * max(0.0, k - 1) / (experts - 1):.3g}%" if experts > 1 else ""


def _expert_ticks(axes: Axes, num_experts: int, side: str) -> None:
    every = max(1, math.ceil(num_experts / MOST_NUMBERED))
    experts = np.arange(0, num_experts, every)
    (axes.xaxis if side == "x" else axes.yaxis).set_ticks(experts + 0.5, [str(expert) for expert in experts])


def _bar(
    figure: Figure, panels: list[Axes], mesh: Any, label: str, *, ratio: bool = False, beyond: bool = False
) -> None:
    extend: Any = "max" if beyond else "neither"
    bar = figure.colorbar(mesh, ax=panels, pad=0.02, aspect=24, shrink=0.9, extend=extend)
    bar.ax.tick_params(labelsize=8.5, length=2, labelcolor=MUTED)
    if ratio:
        ticks = [0.0, 0.5, 1.0, (1 + mesh.norm.vmax) / 2, mesh.norm.vmax]
        bar.set_ticks(ticks, labels=[f"{tick:.2g}\u00d7" for tick in ticks])
        bar.ax.axhline(1.0, color=INK, linewidth=1.6)
    else:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.set_label(label, fontsize=9, color=INK)
    bar.outline.set_visible(False)


def _depth_key(axes: Axes, curve: SaturationCurve, colors: Colormap) -> None:
    """The layers' names: all, or the first and the last."""
    last = len(curve.layers) - 1
    named = range(last + 1) if last < 8 else (0, last // 2, last)
    for number in named:
        axes.plot([], [], color=colors(number / max(1, last)), linewidth=2, label=f"layer {curve.layers[number]}")
    axes.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=INK)


def _plain_axes(axes: Axes) -> None:
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _colors(name: str, colors: Sequence[str]) -> Colormap:
    return LinearSegmentedColormap.from_list(name, colors)


def _is_dark(color: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = color
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.095 else f"{100 * share:.1f}%"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
