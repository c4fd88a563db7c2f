"""The figure of a pruning: layers of unequal sizes, equal scores, losses alone."""

from __future__ import annotations

import pytest

from blues.tracking.pruning_plots import pruning_figure

LOSSES = {"before": 3.0, "after": 3.2, "recovered": 3.05}


@pytest.mark.parametrize(
    ("layers", "scores", "kept"),
    [
        ([1, 3], [[1.0, 2.0, 3.0], [0.5, 0.5]], [[1, 2], [0]]),
        ([0], [[float(e) for e in range(40)]], [[39]]),
        ([], [], []),
    ],
)
def test_it_is_drawn_whole(layers, scores, kept, tmp_path):
    path = pruning_figure(layers, scores, kept, LOSSES, tmp_path / "a.png", title="A run", criterion="reap")
    assert path.read_bytes().startswith(b"\x89PNG") and [child.name for child in tmp_path.iterdir()] == ["a.png"]
