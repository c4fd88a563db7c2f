"""Training in chunks and with offloaded activations: the same run, at ZeRO stages that can, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blues.errors import ConfigError
from blues.training.checkpoint import read_checkpoint
from tests.training.test_trainer import NOISELESS, assert_identical, train
from tests.training.tiny import experiment, make_dataset

CHUNKED = {"model.sequence_chunk": 12, "model.gradient_checkpointing": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that reads its sequences whole: losses and weights."""
    folder = tmp_path_factory.mktemp("whole")
    _, recorder = train(experiment(data, steps=4).override(NOISELESS), folder)
    return recorder.metrics("train/loss"), read_checkpoint(folder).load_model_state()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_run_in_chunks_is_the_run_of_whole_sequences(data, whole, tmp_path, zero_stage):
    changes = NOISELESS | CHUNKED | {"training.parallel.zero_stage": zero_stage}
    _, recorder = train(experiment(data, steps=4).override(changes), tmp_path)
    losses, weights = whole
    assert recorder.metrics("train/loss") == pytest.approx(losses, abs=1e-6)
    for name, weight in read_checkpoint(tmp_path).load_model_state().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-5)


def test_zero_3_with_chunks_is_refused(data):
    with pytest.raises(ConfigError, match="model.sequence_chunk=12 uses every weight several times"):
        experiment(data).override(CHUNKED | {"training.parallel.zero_stage": 3})


def test_a_run_with_offloaded_activations_is_the_same_to_the_last_bit(data, monkeypatch, tmp_path):
    monkeypatch.setattr("blues.model.offload.MIN_BYTES", 0)
    for name, offload in (("with", True), ("without", False)):
        train(experiment(data, steps=2).override({"model.activation_offload": offload}), tmp_path / name)
    assert_identical(tmp_path / "with", tmp_path / "without")


def test_a_run_in_chunks_resumes_bit_for_bit(data, tmp_path):
    exp = experiment(data, steps=4, checkpoint_every=0).override(CHUNKED)
    train(exp, tmp_path / "unbroken")
    train(exp, tmp_path / "broken", stop_after=2)
    train(exp, tmp_path / "broken")
    assert_identical(tmp_path / "unbroken", tmp_path / "broken")
