"""Every registered rope trains on real tokens, resumes bit for bit, and generates from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blues import config as cfg
from blues.data.mixture.batches import Mixture
from blues.experiment import Experiment
from blues.inference.engine import load_model, sample_text
from blues.training.checkpoint import read_checkpoint
from blues.training.observer import Recorder
from tests.model.rope.test_variants import VARIANTS
from tests.training.tiny import experiment, make_dataset

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def train(exp: Experiment, run_dir: Path, stop_after: int | None = None) -> Recorder:
    recorder = Recorder(stop_after)
    train_data: Mixture = exp.data.build(split="train")
    exp.training.build(
        model=exp.model.build(seed=exp.training.seed),
        train_data=train_data,
        validation_data=None,
        run_dir=run_dir,
        tree=cfg.dump(exp),
        observer=recorder,
    ).run()
    return recorder


@pytest.mark.parametrize(("rope", "layers"), [(name, "R") for name in VARIANTS] + [("plain", "RN")])
def test_it_trains_resumes_and_generates_beyond_the_original_length(rope, layers, data, tmp_path):
    exp = experiment(data, steps=STEPS, checkpoint_every=2, validate_every=0, validation_samples=0).override(
        {"model.attention.rope": rope, "model.attention.rope_layers": layers, "model.num_layers": 2}
    )
    whole = train(exp, tmp_path / "whole")
    train(exp, tmp_path / "cut", stop_after=2)
    train(exp, tmp_path / "cut")
    states = [read_checkpoint(tmp_path / run).load_model_state() for run in ("whole", "cut")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    losses = [event.metrics["train/loss"] for event in whole.events if event.kind == "train"]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    loaded = load_model(tmp_path / "cut")
    assert loaded.config == exp.model
    length = exp.model.max_seq_len // 2  # the original length is a quarter
    text = sample_text(loaded, "def main(", max_length=length, temperature=0.0)
    assert text == sample_text(load_model(tmp_path / "whole"), "def main(", max_length=length, temperature=0.0)
