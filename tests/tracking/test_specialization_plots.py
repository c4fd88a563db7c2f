"""Figures of specialization: what is drawn, from what, and that any run can be drawn."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from blues.errors import TrackingError
from blues.tracking import specialization_plots as plots
from blues.tracking.specialization import Labels, SpecializationCounts, describe
from blues.tracking.specialization_files import (
    figures_steps,
    forget_after,
    probe_steps,
    read_figures,
    read_probe,
    read_saturation,
    write_probe,
)
from tests.tracking.test_specialization import random_routing

TEXTS = (" the", "\n\n", "$x$", "\u4e2d", "\x1b[0m", "a very long token indeed", "\ufffd", "")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All texts of each figure that was written, by its file's name."""
    seen: dict[str, str] = {}
    write = plots.write

    def record(figure: Figure, output: str | Path) -> Path:
        seen[Path(output).name] = "\n".join(text.get_text() for text in figure.findobj(Text))
        return write(figure, output)

    monkeypatch.setattr(plots, "write", record)
    return seen


def make_report(folder: Path, step: int, sizes: list[int], domains: int = 2, languages: int = 0) -> None:
    random = np.random.default_rng(step)
    kinds = [Labels(name, 8) for name in ("input_token", "target_token")]
    kinds.append(Labels("domain", domains, tuple(f"source {number}" for number in range(domains))))
    if languages:
        kinds.append(Labels("language", languages, tuple(f"language {number}" for number in range(languages))))
    layers = [1 + 2 * number for number in range(len(sizes))]
    counts = SpecializationCounts(layers, sizes, kinds)
    probed = SpecializationCounts(layers, sizes, [Labels("predicted_token", 8)])
    routing = [random_routing(random, 400, experts, min(experts, 2)) for experts in sizes]
    labels = {kind.name: torch.from_numpy(random.integers(kind.size, size=400)) for kind in kinds}
    counts.update(routing, labels)
    probed.update(routing, {"predicted_token": labels["input_token"]})
    tree = {
        name: describe(own.read(), TEXTS.__getitem__).tree() for name, own in (("training", counts), ("probe", probed))
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-{step:08d}.json").write_text(json.dumps({"step": step, "updates": 1, "saturation": [], **tree}))
    ids_NLK = torch.from_numpy(random.integers(max(sizes) + 1, size=(20, len(sizes), 2)))
    write_probe(folder, step, ids_NLK, layers, sizes)


def test_a_run_gets_its_figures(tmp_path: Path, drawn: dict[str, str]) -> None:
    folder = tmp_path / "tiny" / "specialization"
    make_report(folder, 10, [4, 4], languages=3)
    make_report(folder, 20, [4, 4], languages=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of characters without a picture
        paths = plots.specialization_figures(tmp_path / "tiny")
    names = ["coactivation", "specialization_by_layer", "domain_affinity", "language_affinity"]
    names += [f"vocabulary_{kind}" for kind in ("input", "target", "predicted")] + ["saturation"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert sorted(path.name for path in (tmp_path / "tiny" / "figures").iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        height, width, _ = imread(path).shape
        assert width >= 640 and height >= 300
    assert "Experts used together: tiny at step 20" in drawn["coactivation.png"]
    assert "source 1  " in drawn["domain_affinity.png"] and "language 2  " in drawn["language_affinity.png"]
    for words in (
        "\u2423the",
        "\u21b5\u21b5",
        "$x$",
        "\\u4e2d",
        "\\u241b[0m",
        "a\u2423very\u2423long\u2026",
        "layer 3",
    ):
        assert words in drawn["vocabulary_input.png"], words
    assert "experts shared with step 20" in drawn["saturation.png"]


@pytest.mark.parametrize(
    ("sizes", "domains"), [([1], 1), ([4, 3], 2), ([64] * 8, 40), ([2], 1)], ids=["one", "unequal", "many", "two"]
)
def test_any_number_of_layers_experts_and_labels_can_be_drawn(tmp_path: Path, sizes: list[int], domains: int) -> None:
    make_report(tmp_path / "specialization", 5, sizes, domains)
    paths = plots.specialization_figures(tmp_path)
    assert {path.name for path in paths} >= {"coactivation.png", "vocabulary_input.png"}
    assert (tmp_path / "figures" / "domain_affinity.png").exists() == (domains > 1)
    for path in paths:
        height, width, _ = imread(path).shape
        assert max(height, width) <= 3_600


def test_a_run_without_reports_has_no_figures(tmp_path: Path) -> None:
    assert plots.specialization_figures(tmp_path) == []
    assert read_saturation(tmp_path / "specialization") is None
    assert not (tmp_path / "figures").exists()


def test_layers_are_picked_from_first_to_last() -> None:
    layers = [{"layer": number} for number in range(20)]
    assert [layer["layer"] for layer in plots.picked(layers, 4)] == [0, 6, 13, 19]
    assert plots.picked(layers[:3], 4) == layers[:3]


def test_files_are_read_back_and_later_ones_forgotten(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_report(tmp_path, step, [300, 4])
    record = read_probe(tmp_path, 20)
    assert (record.layers, record.num_experts) == ((1, 3), (300, 4))
    assert int(record.ids_NLK.max()) > 255
    forget_after(tmp_path, 20)
    assert probe_steps(tmp_path) == figures_steps(tmp_path) == [10, 20]
    assert read_figures(tmp_path, 10)["step"] == 10
    curve = read_saturation(tmp_path)
    assert curve is not None and (curve.steps, curve.share_SL[-1]) == ([10, 20], [1.0, 1.0])


def test_probes_of_other_tokens_are_not_compared_and_damage_is_named(tmp_path: Path) -> None:
    make_report(tmp_path, 10, [4])
    make_report(tmp_path, 20, [4])
    write_probe(tmp_path, 30, torch.zeros(7, 1, 2, dtype=torch.long), [1], [4])
    assert read_saturation(tmp_path) is None
    (tmp_path / "step-00000030.npz").write_bytes(b"PK nothing")
    with pytest.raises(TrackingError, match=r"step-00000030.npz' cannot be read .*; remove it"):
        read_saturation(tmp_path)
    (tmp_path / "step-00000020.json").write_text("{")
    with pytest.raises(TrackingError, match=r"step-00000020.json' cannot be read"):
        read_figures(tmp_path, 20)
