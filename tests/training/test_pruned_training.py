"""Pruned models in training: uneven layers, merged and constant experts resume; so does switching experts off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from blues import config as cfg
from blues.cli import main
from blues.experiment import Experiment
from blues.model.moe.rules import RandomRegrowth, SwitchOff
from tests.training.test_trainer import assert_identical, tensors, train
from tests.training.tiny import experiment, make_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def big(data, tmp_path_factory) -> Path:
    """Two mixture layers, trained for two steps."""
    folder = tmp_path_factory.mktemp("runs") / "big"
    train(experiment(data, steps=2, validate_every=0).override({"model.num_layers": 4}), folder)
    return folder


def prune(run_dir: Path, output: Path, *words: str) -> Experiment:
    flags = ["prune", "--checkpoint", str(run_dir), "--output", str(output), "--tokens", "300"]
    assert main([*flags, *words]) == 0
    return cfg.read(Experiment, output / "experiment.yaml").override(
        {"training.steps": 4, "training.checkpoint_every": 2, "training.schedule.warmup_steps": 1}
    )


@pytest.mark.parametrize("action", ["remove", "mean_output", "merge"])
def test_uneven_layers_train_resume_bit_for_bit_and_generate(action, big, tmp_path):
    words = ["--action", action, "--ratio", "0.25", "--scope", "global", "--criterion", "ean"]
    smaller = prune(big, tmp_path / "a", *words)
    sizes = smaller.model.experts_per_layer
    assert sizes is not None and sum(sizes) == 6
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = tensors(tmp_path / "a")
    train(smaller, tmp_path / "a")
    train(smaller, tmp_path / "b", stop_after=2)
    train(smaller, tmp_path / "b")
    assert_identical(tmp_path / "a", tmp_path / "b")
    after = tensors(tmp_path / "a")
    moved = [name for name in before if "experts." in name or "constant" in name]
    assert moved and not any(torch.equal(before[name], after[name]) for name in moved if "/" not in name)
    assert main(["generate", "--checkpoint", str(tmp_path / "a"), "--prompt", "def ", "--max-length", "3"]) == 0


@pytest.mark.parametrize("router", ["noisy_top_k", "sigmoid_bias"])
def test_experts_are_switched_off_while_training_resumed_and_taken_away(router, data, tmp_path, capsys):
    rule = SwitchOff.Config(share=0.5, start=2, until=4, every=1, regrowth=RandomRegrowth.Config())
    exp = experiment(data, checkpoint_every=1).override({"model.moe.router": router, "model.moe.num_experts": 6})
    exp = exp.replace(model=exp.model.replace(moe=exp.model.moe.replace(rules=(rule,))))
    _, recorder = train(exp, tmp_path / "unbroken")
    assert recorder.metrics("experts/layer_01/switched_on") == {1: 6, 2: 4, 3: 3, 4: 3, 5: 3, 6: 3}
    train(exp, tmp_path / "broken", stop_after=3)
    train(exp, tmp_path / "broken")
    assert_identical(tmp_path / "unbroken", tmp_path / "broken")
    state = tensors(tmp_path / "unbroken")
    assert int(state["blocks.1.feed_forward.router.off_E"].sum()) == 3
    assert int(state["blocks.1.feed_forward.rules.0.updates"]) == 6
    smaller = prune(tmp_path / "unbroken", tmp_path / "small", "--dead")
    assert smaller.model.moe.num_experts == 3 and smaller.model.moe.rules == ()
    lines = capsys.readouterr().out.splitlines()
    (after,) = [line.split() for line in lines if line.startswith("after ")]
    assert float(after[2]) == pytest.approx(0, abs=1e-4)  # what was off is not missed
