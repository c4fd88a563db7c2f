"""Comparisons: runs are grouped by what they learned, figures are means over seeds, and the verdict is honest."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from blues import config as cfg
from blues.errors import DataError
from tuning.compare import Run, _against, compare, label, t_quantile
from tuning.experiments import resolve
from tuning.figures import draw_comparison


def make_run(folder, losses, *overrides, speed=(100.0, 300.0, 200.0), balance=(0.5,) * 10):
    folder.mkdir(parents=True)
    cfg.save(resolve("tiny", list(overrides)).replace(name=folder.name), folder / "experiment.yaml")
    lines = [{"step": 10 * (i + 1), "metrics": {"validation/loss": loss}} for i, loss in enumerate(losses)]
    lines += [{"step": i + 1, "metrics": {"throughput/tokens_per_second": value}} for i, value in enumerate(speed)]
    lines += [{"step": i + 1, "metrics": {"experts/balance": value}} for i, value in enumerate(balance)]
    from blues.tracking.spool import MetricsFile

    file = MetricsFile(folder / "metrics.jsonl")
    for line in lines:
        file.append(line["metrics"], line["step"])
    file.close()
    return Run.read(folder)


def variants(tmp_path, noisy, softmax):
    """Runs of two routers, one for each final loss; the seed is the position."""
    runs = []
    for router, finals in (("noisy_top_k", noisy), ("softmax_top_k", softmax)):
        for seed, final in enumerate(finals):
            changes = [f"model.moe.router={router}", f"training.seed={seed}", f"data.seed={seed}"]
            runs.append(make_run(tmp_path / f"{router}-{seed}", [5.0, final], *changes))
    return compare(runs)


def test_runs_that_differ_in_seeds_alone_are_one_variant_named_by_what_differs(tmp_path):
    comparison = variants(tmp_path, [3.0, 3.2], [2.9, 3.0])
    assert [(variant.name, len(variant.runs)) for variant in comparison.variants] == [
        ("softmax_top_k", 2),
        ("noisy_top_k", 2),
    ]
    # the noise that only one router has comes along with it and is no second difference
    assert comparison.variants[1].settings == {"model.moe.router.variant": "noisy_top_k"}


def test_figures_are_means_and_standard_deviations_over_seeds(tmp_path):
    row = next(row for row in variants(tmp_path, [3.0, 3.2], [2.9, 3.0]).rows() if row["variant"] == "noisy_top_k")
    assert row["final_loss"] == pytest.approx(3.1) and row["final_loss_spread"] == pytest.approx(0.1 * math.sqrt(2))
    assert row["tokens_per_second"] == 200.0 and row["balance"] == 0.5
    assert (row["seeds"], row["steps"]) == (2, 20)


def test_the_best_loss_is_the_lowest_and_balance_is_that_of_the_end(tmp_path):
    run = make_run(tmp_path / "a", [4.0, 3.0, 3.5], balance=[1.0] * 8 + [0.2, 0.4])
    assert run.measures() == {
        "final_loss": 3.5,
        "best_loss": 3.0,
        "tokens_per_second": 200.0,
        "balance": pytest.approx(0.3),
    }


def test_one_seed_is_said_to_tell_nothing(tmp_path):
    comparison = variants(tmp_path, [3.0], [2.9])
    assert "0.1000 below noisy_top_k with one seed. One seed cannot tell" in comparison.verdict()
    assert "±" not in comparison.table().partition("\n")[2]


def test_paired_seeds_tell_a_steady_difference_from_chance(tmp_path):
    steady = variants(tmp_path / "steady", [3.10, 4.10, 5.11], [3.00, 4.00, 5.00])
    assert "more than chance (95% interval" in steady.verdict()
    noisy = variants(tmp_path / "noisy", [3.5, 2.9, 3.1], [3.0, 3.0, 3.1])
    assert "not told apart from chance" in noisy.verdict()


def test_the_interval_is_students(tmp_path):
    # Student's table, two-sided 95%; and 99% for each of five intervals that hold together at 95%
    for degrees, single, of_five in ((1, 12.706, 63.657), (2, 4.303, 9.925), (10, 2.228, 3.169), (100, 1.984, 2.626)):
        assert t_quantile(degrees) == pytest.approx(single, abs=0.001)
        assert t_quantile(degrees, pairs=5) == pytest.approx(of_five, abs=0.001)


def test_equal_variants_are_rarely_told_apart_however_many_there_are():
    generator, claims, sweeps = np.random.default_rng(0), 0, 400
    for _ in range(sweeps):
        losses = generator.normal(size=(6, 4))  # six equal variants, four seeds
        best, *others = (
            SimpleNamespace(name="v", by_seed={(seed, seed): {"final_loss": loss} for seed, loss in enumerate(row)})
            for row in losses[losses.mean(axis=1).argsort()].tolist()
        )
        claims += any("more than chance (" in _against(best, other, 15) for other in others)
    assert claims / sweeps <= 0.05


def test_different_data_is_warned_about(tmp_path):
    runs = [make_run(tmp_path / name, [3.0], f"data.path={name}") for name in ("a", "b")]
    assert "not measured on the same thing" in compare(runs).verdict()


def test_json_csv_and_png_say_the_same(tmp_path):
    comparison = variants(tmp_path, [3.0, 3.2], [2.9, 3.0])
    json_file, csv_file = comparison.save(tmp_path)
    png_file = draw_comparison(comparison, tmp_path / "comparison.png")
    tree = json.loads(json_file.read_text())
    assert [variant["name"] for variant in tree["variants"]] == ["softmax_top_k", "noisy_top_k"]
    assert [run["final_loss"] for run in tree["variants"][0]["runs"]] == [2.9, 3.0]
    rows = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert [float(row["final_loss"]) for row in rows] == pytest.approx([2.95, 3.1])
    assert png_file.read_bytes().startswith(b"\x89PNG")


def test_a_setting_that_is_off_in_one_variant_still_names_both(tmp_path):
    runs = [make_run(tmp_path / "a", [3.0]), make_run(tmp_path / "b", [3.1], "model.moe=null")]
    assert {variant.name for variant in compare(runs).variants} == {"moe=True", "moe=None"}


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="there is no run to compare"):
        compare([])
    run = make_run(tmp_path / "a", [3.0])
    with pytest.raises(DataError, match="two runs have the same settings and seeds"):
        compare([run, make_run(tmp_path / "b", [3.1])])
    (tmp_path / "a" / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="has no metrics.jsonl yet"):
        Run.read(tmp_path / "a")


def test_labels_are_short():
    assert (
        label({"model.moe.router.variant": "softmax_top_k", "training.optimizer.lr": 0.0003})
        == "softmax_top_k, lr=0.0003"
    )
