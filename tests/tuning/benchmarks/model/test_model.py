"""Variants at equal tokens: what is measured, that it goes on after an interruption, and what the figures may say."""

from __future__ import annotations

import json
import math

import pytest

from blues import config as cfg
from blues.cli import main
from blues.errors import ConfigError
from tuning.benchmarks import model, record
from tuning.benchmarks.bench import Bench, MeasurementFailed
from tuning.benchmarks.model import Options, benchmark, results
from tuning.benchmarks.model.results import Difference, against_default, table
from tuning.benchmarks.model.subjects import groups_of, name_of, run_of, subjects_of
from tuning.benchmarks.record import Measurement, Record
from tuning.compare import t_quantile
from tuning.experiments import resolve
from tuning.spaces import SPACES, Space

SMALL = (
    "model.dim=32",
    "model.num_layers=2",
    "model.ffn_dim=64",
    "model.moe.ffn_dim=32",
    "model.attention.head_dim=8",
    "model.max_seq_len=64",
    "data.sequence_length=64",
    "training.validation_samples=8",
)


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """The record asks for the commit at every saving."""
    monkeypatch.setattr(record, "git_commit", lambda folder: ("0" * 40, False))


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    """A small experiment as a file, and little data."""
    monkeypatch.setattr(model, "CODE_BYTES", 60_000)
    cfg.save(resolve("tiny", SMALL), tmp_path / "small.yaml")
    return str(tmp_path / "small.yaml")


class Stand:
    """Answers in the place of a training run; `fails` names a router that cannot be trained; stops after `most`."""

    def __init__(self, fails: str = "", most: int = 10**6) -> None:
        self.fails, self.most, self.trees = fails, most, []

    def __call__(self, call):
        if len(self.trees) == self.most:
            raise KeyboardInterrupt
        tree = call.arguments["tree"]
        self.trees.append(tree)
        router, seed = tree["model"]["moe"]["router"]["variant"], tree["training"]["seed"]
        if router == self.fails:
            raise MeasurementFailed("no such kernel")
        return {
            "step ms": 100.0 + len(router),
            "cpu ms": 90.0,
            "peak MB": 50.0 + seed,
            "validation loss": 5.0 + seed + len(router) / 10,
        }


def bench(tmp_path, stand) -> Bench:
    made = Bench(tmp_path / "work", Record(tmp_path / "r.json", {}), say=lambda line: None)
    made.call = stand
    return made


def test_every_variant_is_trained_with_every_seed_on_equal_tokens_round_by_round(tmp_path, small):
    stand = Stand()
    made = bench(tmp_path, stand)
    benchmark(made, Options(size=small, steps=5, seeds=2, seed=3), "router")
    routers = [tree["model"]["moe"]["router"]["variant"] for tree in stand.trees]
    assert len(routers) == 2 * len(SPACES["router"](resolve("tiny"))) and routers[0] == "noisy_top_k"
    assert routers[: len(routers) // 2] == routers[len(routers) // 2 :], "rounds"
    assert {(tree["training"]["seed"], tree["data"]["seed"]) for tree in stand.trees} == {(3, 3), (4, 4)}
    assert {tree["training"]["steps"] for tree in stand.trees} == {5}
    saved = json.loads((tmp_path / "r.json").read_text())
    group = saved["groups"]["router"]
    assert group["default"] == "noisy_top_k" and group["tokens"] == 5 * 8 * 64
    assert group["against default"]["softmax_top_k"]["validation loss"]["values"] == pytest.approx([0.2, 0.2])
    assert not (tmp_path / "work" / "model").exists(), "a whole run leaves nothing"


def test_an_interrupted_run_goes_on_with_what_is_missing_and_other_code_is_measured_anew(tmp_path, small, monkeypatch):
    options, first, second, third = Options(size=small, steps=5, seeds=1), Stand(most=4), Stand(), Stand()
    with pytest.raises(KeyboardInterrupt):
        benchmark(bench(tmp_path, first), options, "router")
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True
    again = bench(tmp_path, second)
    benchmark(again, options, "router", keep=True)
    everything = len(SPACES["router"](resolve("tiny")))
    assert len(first.trees) == 4 and len(second.trees) == everything - 4
    assert all(len(measurement.runs) == 1 for measurement in again.record.measurements)
    monkeypatch.setattr(model, "code_of", lambda *paths: "changed")
    benchmark(bench(tmp_path, third), options, "router")
    assert len(third.trees) == everything


def test_what_fails_stops_no_other_and_is_not_tried_with_the_next_seed(tmp_path, small):
    stand = Stand(fails="relu")
    made = bench(tmp_path, stand)
    benchmark(made, Options(size=small, steps=5, seeds=2), "router")
    [failed] = made.record.failed
    assert failed.name == "relu" and "no such kernel" in table(made.record)
    assert [tree["model"]["moe"]["router"]["variant"] for tree in stand.trees].count("relu") == 1


def test_a_point_that_cannot_be_built_is_skipped_with_the_reason(tmp_path, small, monkeypatch):
    monkeypatch.setitem(SPACES, "top_k", lambda base: Space(({"model.moe.top_k": 2}, {"model.moe.top_k": 9})))
    made = bench(tmp_path, Stand())
    benchmark(made, Options(size=small, steps=5, seeds=1), "top_k")
    assert made.record.measurements[1].skipped and not made.record.failed
    assert "top_k=9: skipped: model.moe: top_k: cannot exceed num_experts" in table(made.record)


def test_the_default_comes_first_and_is_added_where_a_space_lacks_it(monkeypatch):
    base = resolve("tiny")
    assert subjects_of("router", base)[0].name == "noisy_top_k"
    monkeypatch.setitem(SPACES, "other", lambda base: Space(({"model.moe.top_k": 1}, {"model.moe.top_k": 1})))
    assert [subject.name for subject in subjects_of("other", base)] == ["as it is", "top_k=1"]


def test_groups_are_the_spaces_that_change_the_model_alone_unless_named():
    base = resolve("tiny")
    assert {"router", "rope", "attention_pattern", "top_k"} <= set(groups_of(None, base))
    assert not {"learning_rate", "schedule"} & set(groups_of(None, base))
    assert groups_of("rope, router,rope", base) == ["rope", "router"]
    assert "router" not in groups_of(None, resolve("tiny", ["model.moe=null"]))
    with pytest.raises(ConfigError, match="unknown group 'ruoter' in --only. Did you mean 'router'"):
        groups_of("ruoter", base)


def test_a_run_is_one_process_that_reports_nothing_and_warms_up_within_its_steps(tmp_path):
    subject = subjects_of("router", resolve("tiny"))[1]
    training = run_of(subject, data=tmp_path, steps=20, seed=7).training
    assert (training.steps, training.seed, training.parallel.num_workers, training.log_every) == (20, 7, 1, 1)
    assert training.schedule.warmup_steps == 2 and training.specialization.probe_samples == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "as it is"),
        ({"model.moe.router": "hash"}, "hash"),
        ({"a.pattern": "sliding_window", "a.pattern.window": 64}, "sliding_window, window=64"),
        ({"model.moe.shared_experts": None}, "none"),
        ({"model.moe.rules": []}, "none"),
        ({"model.moe.rules": [{"variant": "skip_light", "beta": 0.3}]}, "skip_light beta=0.3"),
        ({"a.patterns": ["causal", {"variant": "strided", "stride": 4}]}, "causal + strided stride=4"),
    ],
)
def test_points_have_short_names(changes, name):
    assert name_of(changes) == name


def test_differences_are_paired_and_cannot_tell_where_the_interval_crosses_zero():
    apart = Difference("validation loss", (-0.30, -0.31, -0.29), 2)
    half = t_quantile(2, 2) * 0.01 / math.sqrt(3)
    assert apart.half == pytest.approx(half) and apart.verdict == "better" and apart.tells
    assert str(apart) == f"-0.3000 ± {half:.4f} better"
    assert Difference("step ms", (4.0, 5.0, 6.0), 1).verdict == "slower"
    assert Difference("step ms", (4.0, 5.0, 6.0), 10).verdict == "cannot tell", "ten chances to be wrong"
    assert Difference("peak MB", (-9.0, 2.0, 5.0), 1).verdict == "cannot tell"
    one = Difference("peak MB", (-9.0,), 1)
    assert one.half is None and one.verdict == "cannot tell" and one.tree()["half"] is None


def test_only_shared_seeds_are_compared():
    def measurement(name, **losses):
        same = {"step ms": 10.0, "cpu ms": 9.0, "peak MB": 1.0}
        runs = [{"seed": int(seed[1:]), "validation loss": loss, **same} for seed, loss in losses.items()]
        return Measurement("g", name, "blues", "", results.METRICS, runs=runs)

    made = [measurement("a", s0=1.0, s1=2.0), measurement("b", s1=2.5, s2=9.0), measurement("c", s2=9.0)]
    [(other, differences)] = against_default(made)
    assert other.name == "b" and differences["validation loss"].values == (0.5,)
    assert against_default([measurement("a"), measurement("b", s0=1.0)]) == []


def test_a_picture_is_drawn_of_what_was_compared_and_of_nothing_else(tmp_path, small):
    made = bench(tmp_path, Stand())
    assert model.draw(made.record, tmp_path / "x.png") is None
    benchmark(made, Options(size=small, steps=5, seeds=2), "router,top_k")
    assert model.draw(made.record, tmp_path / "x.png").stat().st_size > 10_000
    assert "noisy_top_k (default)" in table(made.record)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "ruoter"], "unknown group 'ruoter' in --only. Did you mean 'router'?"),
        (["--size", "tyni"], "unknown experiment 'tyni'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_what_a_person_gets_wrong_is_one_sentence(tmp_path, words, sentence, capsys):
    place = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "r.json")]
    assert main(["benchmark", "model", *place, *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run_is_measured_recorded_and_drawn(tmp_path, small, capsys):
    place = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "r.json")]
    assert main(["benchmark", "model", "--size", small, "--only", "top_k", "--steps", "4", "--seeds", "1", *place]) == 0
    out, err = capsys.readouterr()
    assert "top_k=2 (default)" in out and "cannot tell" in out and "3 of 3: top_k=4, seed 0" in err
    saved = json.loads((tmp_path / "r.json").read_text())
    for measurement in saved["measurements"]:
        [run] = measurement["runs"]
        assert 0 < run["active parameters"] <= run["parameters"] and run["tokens"] == 4 * 8 * 64
        assert 7 < run["validation loss"] < 9 and run["step ms"] > 0 and run["cpu ms"] > 0 and run["peak MB"] > 0
    assert (tmp_path / "r.png").exists()
