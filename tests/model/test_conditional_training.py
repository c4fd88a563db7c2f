"""Every option of the mixture layer and every choice of depth trains on real tokens, resumes bit for bit, generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blues import config as cfg
from blues.config import FAMILIES, parse_overrides
from blues.inference.engine import load_model, sample_text
from blues.training.checkpoint import read_checkpoint
from blues.training.observer import Recorder
from tests.training.tiny import experiment, make_dataset
from tuning.spaces import SPACES

STEPS = 5
OPTIONS = {
    "plain": "model.moe.shared_experts={variant: plain, number: 2}",
    "gated": "model.moe.shared_experts=gated",
    "zero_copy_constant": "model.moe.null_experts=zero_copy_constant",
    "skip_light": "model.moe.rules=[{variant: skip_light, in_training: true}]",
    "capacity_by_position": "model.moe.rules=[{variant: capacity_by_position, factor: 0.8}]",
    "capacity_by_weight": "model.moe.rules=[{variant: capacity_by_weight, factor: 0.8}]",
    "expert_dropout": "model.moe.rules=[{variant: expert_dropout, schedule: {variant: linear}}]",
    "pair_dropout": "model.moe.rules=[pair_dropout]",
    "early_exit": "model.depth={variant: early_exit, confidence: probability, threshold: 0.003}",
    "mixture_of_depths": "model.depth={variant: mixture_of_depths, capacity: 0.5}",
}
COUNTED = {
    "zero_copy_constant": "null",
    "skip_light": "skipped",
    "capacity_by_position": "over_capacity",
    "capacity_by_weight": "over_capacity",
    "expert_dropout": "dropped_out",
    "pair_dropout": "dropped_out",
    "mixture_of_depths": "layers",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def experiment_of(data: Path, name: str):
    base = experiment(data, steps=STEPS, checkpoint_every=3, validate_every=0, validation_samples=0)
    return base.override(parse_overrides([OPTIONS[name]]))


def train(exp: Any, run_dir: Path, stop_after: int | None = None) -> Recorder:
    recorder = Recorder(stop_after)
    exp.training.build(
        model=exp.model.build(seed=exp.training.seed),
        train_data=exp.data.build(split="train"),
        validation_data=exp.data.build(split="validation") if exp.training.validation_samples else None,
        run_dir=run_dir,
        tree=cfg.dump(exp),
        observer=recorder,
    ).run()
    return recorder


def test_every_registered_option_is_tried():
    families = ("shared_experts", "null_experts", "routing_rule", "depth")
    registered = {name for family in families for name in FAMILIES[family].variants}
    assert set(OPTIONS) == registered - {"switch_off"}  # which pruning sets


@pytest.mark.parametrize("name", OPTIONS)
def test_it_trains_resumes_and_generates(name, data, tmp_path):
    exp = experiment_of(data, name)
    whole = train(exp, tmp_path / "whole")
    train(exp, tmp_path / "cut", stop_after=3)
    train(exp, tmp_path / "cut")
    states = [read_checkpoint(tmp_path / run).load_model_state() for run in ("whole", "cut")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    events = [event.metrics for event in whole.events if event.kind == "train"]
    losses = [metrics["train/loss"] for metrics in events]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    if name in COUNTED:
        shares = [metrics.get(f"compute/{COUNTED[name]}", 0.0) for metrics in events]
        assert any(0 < share < 1 for share in shares) and all(m["compute/flops_per_token"] > 0 for m in events)
    elif name == "early_exit":  # training leaves nothing out
        assert all(m["compute/layers"] == 1 and m["train/exit_loss"] > 0 for m in events)
    else:
        assert not any(key.startswith("compute/") for metrics in events for key in metrics)
    text = sample_text(load_model(tmp_path / "cut"), "def main(", max_length=12, temperature=0.0)
    assert text == sample_text(load_model(tmp_path / "whole"), "def main(", max_length=12, temperature=0.0)


@pytest.mark.parametrize("name", ["early_exit", "mixture_of_depths", "plain"])
def test_validation_says_which_share_of_the_layers_it_computed(name, data, tmp_path):
    exp = experiment_of(data, name).override({"training.validation_samples": 4, "training.steps": 1})
    (found,) = (event.metrics for event in train(exp, tmp_path).events if event.kind == "validation")
    assert 0 < found["validation/layers"] < 1 if name != "plain" else "validation/layers" not in found


@pytest.mark.parametrize("name", ["shared_experts", "null_experts", "routing_rules", "depth", "conditional"])
def test_every_point_of_the_spaces_builds(name, data):
    base = experiment(data)
    points = list(SPACES[name](base))
    assert len(points) > 1
    for point in points:
        base.override(point).model.build()
