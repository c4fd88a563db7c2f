"""The validation loss outside of training is the trainer's; samples are drawn by a seed."""

from __future__ import annotations

import pytest

from blues.evaluation.held_out import draw_samples, validation_loss
from blues.inference.loading import load_model
from tests.training.test_trainer import train
from tests.training.tiny import experiment, make_dataset


def test_it_is_the_loss_that_the_trainer_reports(tmp_path):
    exp = experiment(make_dataset(tmp_path / "data"), steps=2, validation_samples=7)
    _, recorder = train(exp, tmp_path / "run")
    (reported,) = recorder.metrics("validation/loss").values()
    model, held_out = load_model(tmp_path / "run").model, exp.data.build(split="validation")
    for batch_size in (2, 5):
        loss = validation_loss(model, held_out, samples=7, batch_size=batch_size)
        assert loss == pytest.approx(reported, rel=1e-6)
    first = draw_samples(held_out, tokens=100, seed=0)
    assert first == draw_samples(held_out, tokens=100, seed=0) == sorted(set(first)) and len(first) == 4
    assert first != draw_samples(held_out, tokens=100, seed=1)
    assert len(draw_samples(held_out, tokens=10**9, seed=0)) == held_out.num_samples_per_epoch
