"""The chart shows what was measured, also where half of it is missing."""

from __future__ import annotations

from tests.tuning.benchmarks.test_record import record
from tuning.benchmarks.chart import draw
from tuning.benchmarks.record import Record


def test_a_chart_is_a_png_of_what_was_measured(tmp_path):
    drawn = draw(record(tmp_path), tmp_path / "r.png")
    assert drawn is not None and drawn.read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_no_chart(tmp_path):
    empty = Record(tmp_path / "r.json", {}, groups={"loader": {"title": "windows"}})
    assert draw(empty, tmp_path / "r.png") is None and not (tmp_path / "r.png").exists()
