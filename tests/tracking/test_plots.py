"""Figures: what is drawn, from what, and that nothing global changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from blues.errors import TrackingError
from blues.tracking import plots
from blues.tracking.metrics import load_metric
from blues.tracking.spool import MetricsFile


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written."""
    seen: list[Figure] = []
    write = plots.write
    monkeypatch.setattr(plots, "write", lambda figure, output: seen.append(figure) or write(figure, output))
    return seen


def run_folder(folder: Path, steps: int = 20, experts: int = 4, layers: tuple[int, ...] = (1, 3)) -> Path:
    file = MetricsFile(folder / "metrics.jsonl")
    random = np.random.default_rng(0)
    for step in range(1, steps + 1):
        metrics = {"train/loss": 5.1 - 0.1 * step, "train/cross_entropy": 5 - 0.1 * step}
        for layer in layers:
            for expert, share in enumerate(random.dirichlet(np.ones(experts))):
                metrics[load_metric(layer, expert)] = share
        file.append(metrics, step)
        if step % 10 == 0:
            file.append(
                {"validation/loss": 4 - 0.1 * step, "validation/loss/code": 3.0, "validation/loss/text": 4.0}, step
            )
    file.close()
    return folder


def texts(figure: Figure) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_a_run_gets_its_figures(tmp_path: Path, drawn: list[Figure]) -> None:
    paths = plots.figures(run_folder(tmp_path / "tiny"), unigram_entropy=4.5)
    assert [path.name for path in paths] == ["loss.png", "expert_load.png", "expert_load_over_time.png"]
    assert sorted(path.name for path in (tmp_path / "tiny" / "figures").iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        height, width, _ = imread(path).shape
        assert width >= 640
        assert height >= 400
    curve, heatmap, over_time = map(texts, drawn)
    for words in (
        "Loss of tiny",
        "training step",
        "nats per token",
        "unigram entropy 4.50",
        "validation: code",
        "2.00",
    ):
        assert words in curve
    assert "Expert load of tiny at step 20" in heatmap
    assert "25% = 1/4" in heatmap
    assert "layer 1" in over_time
    assert "layer 3" in over_time
    assert "matplotlib.pyplot" not in sys.modules


def test_the_curve_shows_cross_entropy_and_skips_what_is_not_finite(tmp_path: Path, drawn: list[Figure]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step, value in enumerate([5.0, float("nan"), 4.0, float("inf"), 3.0], start=1):
        file.append({"train/loss": 100.0, "train/cross_entropy": value}, step)
    plots.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    raw, _ = drawn[0].axes[0].lines
    assert raw.get_xydata().tolist() == [[1, 5], [3, 4], [5, 3]]
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 3
    assert high < 6


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 40, 400])
def test_smoothing_keeps_lines_and_removes_noise(size: int) -> None:
    line = 7 - 0.01 * np.arange(size)
    np.testing.assert_allclose(plots._smooth(line), line, atol=1e-9)  # neither lag nor bend
    noise = np.random.default_rng(0).normal(size=size)
    if size >= 40:
        assert plots._smooth(line + noise).std() < 0.6 * (line + noise).std() + line.std()


def test_numbers_stand_in_the_cells_where_they_fit(tmp_path: Path, drawn: list[Figure]) -> None:
    load_LE = [[0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]
    plots.expert_load_heatmap(load_LE, tmp_path / "small.png", layers=[1, 3])
    plots.expert_load_heatmap(np.full((2, 64), 1 / 64), tmp_path / "large.png")
    small, large = map(texts, drawn)
    for words in ("50.0", "20.0", "10.0", "25.0", "MaxVio", "1.00", "0.00"):
        assert words in small.splitlines()
    assert "1.6" not in large.splitlines()
    assert "1.56% = 1/64" in large
    with pytest.raises(ValueError, match="layers x experts"):
        plots.expert_load_heatmap([], tmp_path / "none.png")


def test_the_latest_load_is_read_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({load_metric(1, 0): 0.9, load_metric(1, 1): 0.1}, 1)
    file.append({load_metric(1, 0): 0.6, load_metric(1, 1): 0.4}, 2)
    layers, load_LE, step = plots.latest_expert_load(tmp_path / "metrics.jsonl")
    assert (layers, load_LE.tolist(), step) == ([1], [[0.6, 0.4]], 2)


def test_a_run_without_values_has_no_figures(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").close()
    assert plots.figures(tmp_path) == []
    for draw in (plots.loss_curve, plots.expert_load_over_time):
        with pytest.raises(TrackingError, match="holds no"):
            draw(tmp_path / "metrics.jsonl", tmp_path / "x.png")
    with pytest.raises(TrackingError, match="holds no"):
        plots.latest_expert_load(tmp_path / "metrics.jsonl")
    assert not (tmp_path / "x.png").exists()
