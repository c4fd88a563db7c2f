"""The figure of an extended context: drawn for curves far apart, close together, with and without intervals."""

from __future__ import annotations

import math

import pytest
from matplotlib.image import imread

from blues.evaluation.positions import PositionLosses
from blues.tracking import context_plot
from blues.tracking.context_plot import perplexity_by_position

EDGES = (0, 16, 32, 48, 64)


def curve(*nats: float, spread: float = 0.05) -> PositionLosses:
    return PositionLosses(EDGES, nats, (spread,) * len(nats), 8)


@pytest.mark.parametrize(
    ("curves", "scale"),
    [
        ({"before": curve(4, 3, 6, 9), "after": curve(4, 3, 3, 3)}, "log"),
        ({"before": curve(3, 3, 3.1, 3.1), "after": curve(3, 3, 3.1, 3.1, spread=math.nan)}, "linear"),
        ({"before": curve(3, 3, 900, 900), "untrained": curve(3, 3, 3, 3), "after": curve(3, 3, 3, 3)}, "log"),
    ],
)
def test_every_curve_is_drawn_with_the_trained_length(curves, scale, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(context_plot, "write", lambda figure, output: figures.append(figure) or output)
    perplexity_by_position(curves, tmp_path / "x.png", trained_length=16, title="title")
    (axes,) = figures[0].axes
    assert axes.get_yscale() == scale
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)
    texts = [text.get_text() for text in axes.texts]
    assert texts[0].startswith("trained on 16 tokens") and len(texts) == 1 + len(curves)
    assert [line.get_xdata()[0] for line in axes.lines].count(16) == 1


def test_the_file_is_a_picture(tmp_path):
    path = perplexity_by_position({"a": curve(4, 3, 3, 3)}, tmp_path / "x.png", trained_length=32, title="t")
    assert imread(path).shape[1] == 9 * context_plot.DPI
